"""What a trainer and a vLLM server that mixes tell each other over HTTP: the names they use, and records as JSON.

A record is several times smaller than the tokens' own JSON: its bytes are compressed and then written as base64.
Reading a reply executes nothing.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from ._messages import shown
from .config import MixingConfig
from .record import MixRecord

KEY = "ngrpo_ops"
"""The key of this package in an engine's `additional_config`, in a request's `extra_args` and in its `vllm_xargs`."""

OPEN, TAKE = "open_mix_records", "take_mix_records_json"
"""The workers' methods that a trainer calls by ``/collective_rpc``."""

SERVED_DEFAULTS = {"excluded_token_ids": "special"}
"""Defaults of NGRPOConfig that differ from those of MixingConfig. A field that a server's flags leave out has these."""

FORMAT = 1
"""The number of this form of the replies. A server and a trainer must have the same."""

_ERRORS: dict[str, type[Exception]] = {"ValueError": ValueError, "RuntimeError": RuntimeError}
_LEVEL = 1  # of zlib: most of what higher levels save, at a third of their time, and an engine's step waits for it


def read_config(settings: Any, where: str) -> MixingConfig:
    """The configuration in settings that came from another process. A strategy of the user's own is imported here.

    Args:
        settings: what is to be a mapping with fields of `MixingConfig`.
        where: what they are called, for the message.

    Raises:
        ValueError: not such a mapping, or a value that `MixingConfig` refuses.

    Examples:
        >>> from ngrpo_ops.wire import read_config
        >>> read_config({"k": 5}, "additional_config['ngrpo_ops']").k
        5
    """
    known = {field.name for field in fields(MixingConfig)}
    if not isinstance(settings, dict) or not {*settings} <= known:
        raise ValueError(f"{where} must hold fields of MixingConfig, got {shown(settings)}")
    return MixingConfig(**settings)


def checksum(tokens: Sequence[int]) -> int:
    """A number that tells completions apart.

    Examples:
        >>> from ngrpo_ops.wire import checksum
        >>> checksum([5, 6]) == checksum([5, 6]) != checksum([6, 5])
        True
    """
    return zlib.crc32(np.asarray(tokens, dtype="<i8").tobytes())


def error_reply(error: Exception) -> dict[str, Any]:
    """An error as a reply. It is read as a ValueError or a RuntimeError, whichever is nearer."""
    return {"error": [type(error).__name__, str(error)]}


def pack_reply(
    record: MixRecord, row_ids: Sequence[int], completions: Sequence[Sequence[int]], shorter: dict[int, int]
) -> dict[str, Any]:
    """One engine's reply to `TAKE`.

    Args:
        record: B rows.
        row_ids: of the B rows.
        completions: the tokens that the engine sampled for each of the B rows.
        shorter: the rows that were asked for and have fewer steps here, each with their number.

    Examples:
        >>> import torch
        >>> from ngrpo_ops import MixRecord
        >>> from ngrpo_ops.wire import pack_reply, read_replies
        >>> gate = torch.tensor([[True, False]])
        >>> record = MixRecord(gate, torch.ones(1, 2, 3, dtype=torch.int64), torch.ones(1, 2, 3) / 3, prompt_length=0)
        >>> reply = pack_reply(record, [7], [[1, 4]], {})
        >>> read_replies([reply], [7], [[1, 4]]).gate.tolist()
        [[True, False]]
    """
    return {
        "rows": list(row_ids),
        "checksums": [checksum(tokens) for tokens in completions],
        "record": base64.b64encode(zlib.compress(record.to_bytes(), _LEVEL)).decode(),
        "shorter": [list(item) for item in shorter.items()],
    }


def read_replies(
    replies: Sequence[dict[str, Any] | None], row_ids: Sequence[int], completions: Sequence[Sequence[int]]
) -> MixRecord:
    """The record of some rows, from the replies of all workers of all replicas of a server.

    A row's record is one whose engine sampled the tokens that the row's answer has. A request that was sent again has a
    record in two replicas, perhaps: the other one is passed over.

    Args:
        replies: None from workers that hold the same as another.
        row_ids: the rows that were asked for.
        completions: the tokens of each row's answer.

    Returns:
        MixRecord: B rows in the order of `row_ids`, T the largest length, on the CPU, with prompt_length 0.

    Raises:
        RuntimeError: an engine's error, such as logits that were no distribution, or no record of a row.
        ValueError: an engine's error, or a reply that is none.

    Examples:
        A record of other tokens is no record of the row:

        >>> import torch
        >>> from ngrpo_ops import MixRecord
        >>> from ngrpo_ops.wire import pack_reply, read_replies
        >>> record = MixRecord(torch.zeros(1, 2).bool(), torch.zeros(1, 2, 3).long(), torch.zeros(1, 2, 3), 0)
        >>> read_replies([pack_reply(record, [7], [[1, 4]], {})], [7], [[1, 5]])
        Traceback (most recent call last):
        RuntimeError: row 7: the server has a record of other tokens than those of its answer, asked for one of 2 steps
    """
    wanted = {row: checksum(tokens) for row, tokens in zip(row_ids, completions, strict=True)}
    found: dict[int, MixRecord] = {}
    instead: dict[int, str] = {}
    raise_errors(replies)
    for reply in replies:
        if reply is None:
            continue
        try:
            record = MixRecord.from_bytes(zlib.decompress(base64.b64decode(reply["record"], validate=True)))
            rows, checksums, shorter = reply["rows"], reply["checksums"], dict(reply["shorter"])
        except (KeyError, TypeError, ValueError, binascii.Error, zlib.error) as error:
            raise ValueError(f"replies must be those of {TAKE}, got one that is not: {error}") from error
        for place, (row, sampled) in enumerate(zip(rows, checksums, strict=True)):
            if sampled == wanted.get(row):
                found[row] = record[place : place + 1]
            else:
                instead[row] = "a record of other tokens than those of its answer"
        for row, steps in shorter.items():
            instead.setdefault(row, f"a record of {steps} steps alone")
    for row, tokens in zip(row_ids, completions, strict=True):
        if row not in found:
            raise RuntimeError(
                f"row {row}: the server has {instead.get(row, 'no record')}, asked for one of {len(tokens)} steps"
            )
    length = max(map(len, completions))
    return MixRecord.cat([found[row].cut(length) for row in row_ids])


def raise_errors(replies: Sequence[dict[str, Any] | None]) -> None:
    """Raises the first error among the replies.

    Raises:
        ValueError, RuntimeError: see `error_reply`.

    Examples:
        >>> from ngrpo_ops.wire import error_reply, raise_errors
        >>> raise_errors([None, error_reply(RuntimeError("no token could be chosen at row 3"))])
        Traceback (most recent call last):
        RuntimeError: no token could be chosen at row 3
    """
    for reply in replies:
        if reply is not None and "error" in reply:
            kind, message = reply["error"]
            raise _ERRORS.get(kind, RuntimeError)(message)


def read_opened(replies: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the engines of a server say to `OPEN`: the same, or one of them is no part of it.

    Raises:
        ValueError: an engine's error, or another form of the replies than `FORMAT`.

    Examples:
        >>> from ngrpo_ops.wire import FORMAT, read_opened
        >>> read_opened([{"format": FORMAT, "config": {}}])["config"]
        {}
    """
    raise_errors(replies)
    for reply in replies:
        if reply["format"] != FORMAT:
            raise ValueError(f"the server's ngrpo-ops sends records in form {reply['format']}, this one reads {FORMAT}")
    return replies[0]
