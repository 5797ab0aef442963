"""What the rows of an input table stand for, as a tokenizer tells. Nothing of transformers is imported."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Tokens that hold a place for later use: of BERT, Gemma, Llama 3, Qwen.
_RESERVED = re.compile(r"\[unused\d+\]|<unused\d+>|<\|reserved_special_token_\d+\|>|<\|extra_\d+\|>")


class SpecialRows(NamedTuple):
    """Rows that stand for no text of the model's, as a tokenizer tells.

    Attributes:
        beyond: bool [V], rows beyond the tokenizer: it has no token of this id.
        special: bool [V], rows of the tokenizer's special tokens, and of tokens that only hold a place.
    """

    beyond: Tensor
    special: Tensor


def is_reserved(token: str) -> bool:
    """Whether the name of a token says that it only holds a place, as ``<unused7>`` does."""
    return bool(_RESERVED.fullmatch(token))


def special_rows(tokenizer: Any, vocabulary: int) -> SpecialRows:
    """The rows that ``excluded_token_ids="special"`` leaves out by what a tokenizer says.

    Special are the tokenizer's `all_special_ids`, added tokens that were added as special ones, and tokens whose name
    says that they only hold a place, such as ``<unused7>``. Ordinary tokens that a user has added are not.

    Args:
        tokenizer: of transformers, fast or slow, or a processor with one; also a `Tokenizer` of tokenizers.
        vocabulary: V, the rows of the input table.

    Raises:
        TypeError: a tokenizer that cannot list its vocabulary.

    Examples:
        >>> from tokenizers import AddedToken, Tokenizer, models
        >>> from ngrpo_ops.tokens import special_rows
        >>> tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
        >>> added = tokenizer.add_special_tokens(["<eos>"]), tokenizer.add_tokens(["<mine>"])
        >>> beyond, special = special_rows(tokenizer, 6)
        >>> beyond.tolist()
        [False, False, False, False, True, True]
        >>> special.tolist()
        [False, False, True, False, False, False]
    """
    given = tokenizer
    if not hasattr(tokenizer, "get_vocab"):
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    if not hasattr(tokenizer, "get_vocab"):
        raise TypeError(f"tokenizer must be a tokenizer of transformers, or have one, got {type(given).__name__}")
    tokens = tokenizer.get_vocab()
    if hasattr(tokenizer, "get_added_tokens_decoder"):
        added = tokenizer.get_added_tokens_decoder()
    else:
        added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i in getattr(tokenizer, "all_special_ids", ()) if i is not None}
    special |= {i for i, token in added.items() if token.special}
    special |= {i for token, i in tokens.items() if is_reserved(token)}
    known = {*tokens.values(), *added, *special}
    return SpecialRows(~_mask(known, vocabulary), _mask(special, vocabulary))


def _mask(ids: set[int], vocabulary: int) -> Tensor:
    mask = torch.zeros(vocabulary, dtype=torch.bool, device="cpu")
    mask[[i for i in ids if 0 <= i < vocabulary]] = True
    return mask


def read_excluded(words: str | int | Sequence[str | int] | None) -> Any:
    """A value of `MixingConfig.excluded_token_ids` as a command line or a file has it.

    Args:
        words: "special" or "none", or token ids; alone or in a list.

    Returns:
        "special", None or a list of ids. What is none of them is returned as it is, for `MixingConfig` to refuse.

    Examples:
        >>> from ngrpo_ops.tokens import read_excluded
        >>> read_excluded(["special"]), read_excluded("none"), read_excluded(["5", "6"])
        ('special', None, [5, 6])
    """
    listed = [words] if isinstance(words, str | int) else words
    if not isinstance(listed, list | tuple):
        return words
    if len(listed) == 1 and isinstance(listed[0], str) and listed[0].lower() in ("special", "none"):
        return None if listed[0].lower() == "none" else "special"
    if not all(isinstance(word, int) or (isinstance(word, str) and word.isdecimal()) for word in listed):
        return words
    return [word if isinstance(word, int) else int(word) for word in listed]
