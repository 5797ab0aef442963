"""The input embeddings of a Hugging Face checkpoint, read without building its model, and what its rows stand for.

Needs safetensors and tokenizers, which come with transformers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .ops.nearest_neighbors.equal_rows import equal_rows, row_hashes
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
            ValueError: the text is several tokens, with their names, or none.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) != 1:
            pieces = ", ".join(repr(self.names[i]) for i in ids) or "none"
            raise ValueError(f"{text!r} must be a single token, got {len(ids)}: {pieces}")
        return int(ids[0])


def load_vocabulary(model: str) -> Vocabulary:
    """The vocabulary of a checkpoint: a folder with safetensors, or a name on the Hugging Face hub.

    Only the tensor of the input embedding is read; of a checkpoint in several files only the one that holds it.

    Raises:
        ImportError: without safetensors or tokenizers. FileNotFoundError: no safetensors or no tokenizer.json there.
        ValueError: no tensor of a known name, with the names of those that might be it.
    """
    try:
        from safetensors import safe_open
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("reading a checkpoint needs safetensors and tokenizers: pip install transformers") from error
    path, name = _find_embedding(model)
    with safe_open(path, "pt") as tensors:
        embedding = tensors.get_tensor(name)
    description = _file(model, "tokenizer.json")
    if description is None:
        raise FileNotFoundError(f"no tokenizer.json in {model!r}")
    tokenizer = Tokenizer.from_file(str(description))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    rows = embedding.shape[0]
    tokens = dict.fromkeys(range(rows)) | {i: token for token, i in tokenizer.get_vocab().items() if i < rows}
    special = torch.zeros(rows, dtype=torch.bool)
    special[[i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special and i < rows]] = True
    unused = torch.tensor([token is None or is_reserved(token) for token in tokens.values()])
    names = [
        f"<unused {i}>" if token is None else token if special[i] else tokenizer.decode([i]) or token
        for i, token in tokens.items()
    ]
    return Vocabulary(embedding, names, special, unused, equal_rows(row_hashes(embedding)), tokenizer)


def _file(model: str, name: str) -> Path | None:
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.exists() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(model, name))
    except EntryNotFoundError:
        return None


def _find_embedding(model: str) -> tuple[Path, str]:
    """The file that holds the input embedding, and the tensor's name in it."""
    from safetensors import safe_open

    index = _file(model, "model.safetensors.index.json")
    if index is not None:
        where = json.loads(index.read_text())["weight_map"]
        name = _embedding_name(list(where))
        path = _file(model, where[name])
    else:
        path = _file(model, "model.safetensors")
        if path is not None:
            with safe_open(path, "pt") as tensors:
                name = _embedding_name(list(tensors.keys()))
    if path is None:
        raise FileNotFoundError(f"no model.safetensors, and no index of one, in {model!r}")
    return path, name


def _embedding_name(names: Sequence[str]) -> str:
    for ending in _NAMES:
        found = sorted((name for name in names if name.endswith(ending)), key=len)
        if found:
            return found[0]
    like = sorted(name for name in names if "emb" in name) or sorted(names)
    raise ValueError(f"the input embedding was not found: none of {', '.join(_NAMES)} among {', '.join(like[:8])}")
