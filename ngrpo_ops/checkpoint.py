"""The input embeddings of a Hugging Face checkpoint, read without building its model, and what its rows stand for.

Needs safetensors and tokenizers, which come with transformers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._messages import shown
from .files import FileError, read_json, require_file
from .ops._checks import require_embedding
from .ops.nearest_neighbors.row_hashes import equal_rows, row_hashes
from .tokens import is_reserved

# How the input embedding is named in checkpoints: the Llama family, GPT-2, GPT-NeoX, BLOOM, OPT and BERT alike.
_NAMES = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "word_embedding.weight",
    "shared.weight",
)

_PLAIN_NAME = re.compile(r"[^./\\\0][^/\\\0]*")  # no folder, no "..", no hidden file


@dataclass
class Vocabulary:
    """An input table and the names of its rows.

    embedding [V, d]; names: V strings, special tokens as they are written, rows without a token as "<unused ID>";
    special, unused, equal: bool [V]; unused are rows without a token, and those of tokens that only hold a place; equal
    are rows with the values of another row. `excluded_token_ids` "special" leaves out all three.
    """

    embedding: Tensor
    names: list[str]
    special: Tensor
    unused: Tensor
    equal: Tensor
    tokenizer: Any

    def id_of(self, text: str) -> int:
        """The id of a text that is one token.

        Raises:
            ValueError: the text is several tokens, with their names, or none; or a token that has no row in the table.
        """
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # of tokenizers, for a text that is no UTF-8 or that its model cannot take apart
            raise ValueError(f"{text!r} cannot be encoded by this tokenizer: {error}") from error
        rows = len(self.names)
        if len(ids) != 1:
            pieces = ", ".join(repr(self.names[i]) if i < rows else f"token {i}" for i in ids) or "none"
            raise ValueError(f"{text!r} must be a single token, got {len(ids)}: {pieces}")
        if ids[0] >= rows:
            raise ValueError(f"{text!r} is token {ids[0]}, and the embedding has rows for tokens below {rows} alone")
        return int(ids[0])


def load_vocabulary(model: str) -> Vocabulary:
    """The vocabulary of a checkpoint: a folder with safetensors, or a name on the Hugging Face hub.

    Only the tensor of the input embedding is read; of a checkpoint in several files only the one that holds it.

    Raises:
        ImportError: without safetensors or tokenizers. FileNotFoundError: no safetensors or no tokenizer.json there.
        ValueError: no tensor of a known name, with the names of those that might be it. FileError: a file that cannot
            be read as what it should be, with its path.
    """
    try:
        from safetensors import safe_open
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("reading a checkpoint needs safetensors and tokenizers: pip install transformers") from error
    if os.path.lexists(model) and not os.path.isdir(model):
        raise FileError(f"{model}: must be a folder with safetensors, got a file")
    path, name = _find_embedding(model)
    with _errors_of(path, "is no safetensors file, or is damaged"), safe_open(path, "pt") as tensors:
        embedding = tensors.get_tensor(name)
    _require_table(embedding, f"{path}: {name}")
    description = _file(model, "tokenizer.json")
    if description is None:
        raise FileNotFoundError(f"no tokenizer.json in {_place(model)}")
    with _errors_of(description, "is no tokenizer, or is damaged"):
        tokenizer = Tokenizer.from_file(str(description))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return _vocabulary(embedding, tokenizer)


def _vocabulary(embedding: Tensor, tokenizer: Any) -> Vocabulary:
    rows = embedding.shape[0]
    tokens = dict.fromkeys(range(rows)) | {i: token for token, i in tokenizer.get_vocab().items() if i < rows}
    special = torch.zeros(rows, dtype=torch.bool, device="cpu")
    special[[i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special and i < rows]] = True
    unused = torch.tensor([token is None or is_reserved(token) for token in tokens.values()], device="cpu")
    names = [
        f"<unused {i}>" if token is None else token if special[i] else tokenizer.decode([i]) or token
        for i, token in tokens.items()
    ]
    return Vocabulary(embedding, names, special, unused, equal_rows(row_hashes(embedding)), tokenizer)


@contextmanager
def _errors_of(path: Path, what: str) -> Iterator[None]:
    """Within it the errors of a library that reads `path` become one that names the file. They have no common type."""
    try:
        yield
    except Exception as error:
        raise FileError(f"{path}: {what}: {error}") from error


def _require_table(embedding: Tensor, name: str) -> None:
    try:
        require_embedding(embedding, name)
    except ValueError as error:
        raise FileError(str(error)) from error


def _file(model: str, name: str) -> Path | None:
    """The path of a checkpoint's file; None: it has none. A link counts as there, wherever it leads."""
    if os.path.isdir(model):
        path = Path(model) / name
        return require_file(path) if os.path.lexists(path) else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(model, name))
    except EntryNotFoundError:
        return None


def _place(model: str) -> str:
    # Without a network the hub's files are those of its cache, and the hub's library does not tell the two apart.
    return repr(model) if os.path.isdir(model) else f"{model!r}, no folder here, on the hub or in its cache"


def _find_embedding(model: str) -> tuple[Path, str]:
    """The file that holds the input embedding, and the tensor's name in it."""
    from safetensors import safe_open

    index = _file(model, "model.safetensors.index.json")
    if index is not None:
        where = _weight_map(index)
        name = _embedding_name(list(where), f"{index}: ")
        path = _file(model, where[name])
        if path is None:
            raise FileError(f"{index}: names {where[name]!r}, which is not in {model!r}")
        return path, name
    path = _file(model, "model.safetensors")
    if path is None:
        raise FileNotFoundError(f"no model.safetensors, and no index of one, in {_place(model)}")
    with _errors_of(path, "is no safetensors file, or is damaged"), safe_open(path, "pt") as tensors:
        names = list(tensors.keys())
    return path, _embedding_name(names, f"{path}: ")


def _weight_map(index: Path) -> dict[str, str]:
    """Which file holds each tensor. A file is named by its plain name: a checkpoint reads nothing outside itself."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict):
        raise FileError(f"{index}: weight_map must map the names of tensors to those of files, got {shown(where)}")
    for file in where.values():
        if not isinstance(file, str) or not _PLAIN_NAME.fullmatch(file):
            raise FileError(f"{index}: weight_map must have names of files beside it, got {shown(file)}")
    return where


def _embedding_name(names: Sequence[str], source: str = "") -> str:
    for ending in _NAMES:
        found = sorted((name for name in names if name.endswith(ending)), key=len)
        if found:
            return found[0]
    like = sorted(name for name in names if "emb" in name) or sorted(names)
    raise ValueError(
        f"{source}the input embedding was not found: none of {', '.join(_NAMES)} among {', '.join(like[:8]) or 'none'}"
    )
