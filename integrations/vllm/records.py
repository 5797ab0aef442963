"""A worker's reply to `records_call`, as bytes. Packed in the engine's workers, unpacked in the caller's process.

vLLM carries bytes between its processes. It would turn an error that a worker raises into an error of another type, so
a reply carries errors too. A reply is one line of JSON and then the bytes of the record; reading it executes nothing.
"""

from __future__ import annotations

import json

from ngrpo_ops import MixRecord

_ERRORS: dict[str, type[Exception]] = {"ValueError": ValueError, "RuntimeError": RuntimeError}


def pack(reply: MixRecord | Exception) -> bytes:
    """A record, or a ValueError or RuntimeError in its place, as bytes for `unpack`.

    Examples:
        >>> import torch
        >>> from ngrpo_ops import MixRecord
        >>> from ngrpo_ops.integrations.vllm.records import pack, unpack
        >>> record = MixRecord(torch.tensor([[True]]), torch.tensor([[[5, 6]]]), torch.tensor([[[0.75, 0.25]]]), 0)
        >>> unpack(pack(record)).ids.tolist()
        [[[5, 6]]]
    """
    if isinstance(reply, MixRecord):
        return b"null\n" + reply.to_bytes()
    return json.dumps([type(reply).__name__, str(reply)]).encode() + b"\n"


def unpack(reply: bytes) -> MixRecord:
    """The record that `pack` made bytes of.

    Raises:
        ValueError, RuntimeError: the error that `pack` made bytes of. ValueError: bytes of something else.

    Examples:
        >>> from ngrpo_ops.integrations.vllm.records import pack, unpack
        >>> unpack(pack(RuntimeError("no token could be chosen at row 3")))
        Traceback (most recent call last):
        RuntimeError: no token could be chosen at row 3
    """
    header, _, content = reply.partition(b"\n")
    error = json.loads(header)
    if error is not None:
        kind, message = error
        raise _ERRORS.get(kind, RuntimeError)(message)
    return MixRecord.from_bytes(content)
