"""What the caller of an engine uses. Runs in the trainer's or user's process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from ngrpo_ops import MixingConfig, MixRecord
from ngrpo_ops.random import philox
from ngrpo_ops.wire import KEY

from .records import unpack

TAKE = "take_mix_records"  # the workers' method that `collective_rpc` calls

_REMEDY = (
    "Run `python -m ngrpo_ops env` in its environment to see which. `pip install .` in a checkout of ngrpo_ops "
    "installs the plugin."
)


def engine_kwargs(config: MixingConfig) -> dict[str, Any]:
    """Keyword arguments of `LLM` or `EngineArgs` for an engine that can mix.

    Prefix caching is switched off in them. `register` says why.

    Examples:
        >>> from ngrpo_ops import MixingConfig
        >>> from ngrpo_ops.integrations.vllm import engine_kwargs
        >>> kwargs = engine_kwargs(MixingConfig(k=3, mixing_rate=0.1))
        >>> kwargs["additional_config"]["ngrpo_ops"]["mixing_rate"], kwargs["enable_prefix_caching"]
        (0.1, False)
    """
    return {"additional_config": {KEY: asdict(config)}, "enable_prefix_caching": False}


def request_kwargs(row_id: int) -> dict[str, Any]:
    """`SamplingParams.extra_args` of a request that is mixed.

    Args:
        row_id: int64. The gates of the request are drawn by it, and its record is taken by it. Two requests must not
            share a row id while one of them is running or its record has not been taken.

    Examples:
        >>> from ngrpo_ops.integrations.vllm import request_kwargs
        >>> request_kwargs(7)
        {'ngrpo_ops': {'row_id': 7}}
    """
    return {KEY: {"row_id": int(row_id)}}


def request_seed(seed: int, row_id: int) -> int:
    """A `SamplingParams.seed` for one row. The row's tokens then do not depend on the batch or the time of sampling.

    Examples:
        >>> from ngrpo_ops.integrations.vllm import request_seed
        >>> request_seed(0, 7) == request_seed(0, 7) != request_seed(0, 8)
        True
    """
    words = philox(
        torch.tensor(seed, device="cpu"), torch.tensor(row_id, device="cpu"), torch.tensor(-1, device="cpu")
    )  # no step has this number
    return int(words[0]) << 31 | int(words[1]) >> 1


def take_records(llm: Any, row_ids: Sequence[int], lengths: Sequence[int]) -> MixRecord:
    """Fetches the record of finished requests from an engine. The engine forgets these records.

    For an asynchronous engine: `fetch_records`.

    Args:
        llm: an engine with a `collective_rpc` method, such as `LLM`.
        row_ids: the row ids of the requests; with n > 1, of every sequence.
        lengths: the number of tokens that each request returned. 0 is for an aborted request: its record is dropped.

    Returns:
        MixRecord: B rows in the order of `row_ids`, T the largest length, on the CPU, with prompt_length 0.

    Raises:
        RuntimeError: at a mixed step the logits were no distribution.
        ValueError: the engine has no record of that length for a row, or several requests have the row's id.

    Examples:
        >>> import torch
        >>> from ngrpo_ops import MixRecord
        >>> from ngrpo_ops.integrations.vllm import records, take_records
        >>> class Engine:  # stands for vllm.LLM: two rows without a mixed step
        ...     def collective_rpc(self, method, args):
        ...         shape = len(args[0]), max(args[1]), 3
        ...         empty = MixRecord(torch.zeros(shape[:2]).bool(), torch.zeros(shape).long(), torch.zeros(shape), 0)
        ...         return [records.pack(empty)]
        >>> record = take_records(Engine(), row_ids=[4, 5], lengths=[20, 7])
        >>> len(record), record.length
        (2, 20)
    """
    method, _, args = records_call(row_ids, lengths)
    return read_records(llm.collective_rpc(method, args=args))


async def fetch_records(engine: Any, row_ids: Sequence[int], lengths: Sequence[int]) -> MixRecord:
    """`take_records` from an asynchronous engine.

    Args:
        engine: an engine with an asynchronous `collective_rpc` method, such as `AsyncLLM`.
        row_ids, lengths: see `take_records`. Empty: only whether the engine can mix is found out.

    Raises:
        RuntimeError: the engine has no records, or at a mixed step the logits were no distribution.
        ValueError: see `take_records`.

    Examples:
        >>> import asyncio
        >>> from ngrpo_ops.integrations.vllm.client import fetch_records
        >>> class Engine:  # stands for vllm.AsyncLLM without the plugin
        ...     async def collective_rpc(self, method, timeout, args):
        ...         raise NotImplementedError(f"no method {method}")
        >>> asyncio.run(fetch_records(Engine(), [4], [20]))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        RuntimeError: the engine has no record of a mixed sample (no method take_mix_records). If it does not know ...
    """
    call = records_call(row_ids, lengths)
    try:
        replies = await engine.collective_rpc(*call)
    except Exception as error:
        raise RuntimeError(
            f"the engine has no record of a mixed sample ({error}). If it does not know {call[0]!r}, the plugin "
            "'ngrpo_ops' was not loaded in its process: is ngrpo-ops installed on every node, and is it among "
            f"VLLM_PLUGINS where that is set? {_REMEDY}"
        ) from error
    return read_records(replies)


def require_mixing(llm: Any) -> None:
    """Checks that an engine can mix.

    Args:
        llm: an engine with a `collective_rpc` method, such as `LLM`.

    Raises:
        ValueError: the engine cannot mix.

    Examples:
        >>> from ngrpo_ops.integrations.vllm import require_mixing
        >>> class Engine:  # stands for a vllm.LLM without the plugin
        ...     def collective_rpc(self, method, args):
        ...         raise NotImplementedError(f"no method {method}")
        >>> require_mixing(Engine())  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: the engine cannot mix, the plugin 'ngrpo_ops' was not loaded in it (no method take_mix_records): ...
    """
    try:
        take_records(llm, [], [])
    except (NotImplementedError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the engine cannot mix, the plugin 'ngrpo_ops' was not loaded in it ({error}): is ngrpo-ops installed, "
            f"and is it among VLLM_PLUGINS where that is set? {_REMEDY}"
        ) from error


def records_call(row_ids: Sequence[int], lengths: Sequence[int]) -> tuple[str, None, tuple[list[int], list[int]]]:
    """The arguments (method, timeout, args) of the `collective_rpc` call whose result `read_records` reads.

    Args:
        row_ids, lengths: see `take_records`.

    Raises:
        ValueError: the numbers of row ids and lengths differ, or two row ids are equal.

    Examples:
        >>> from ngrpo_ops.integrations.vllm import records_call
        >>> records_call([4, 5], [20, 7])
        ('take_mix_records', None, ([4, 5], [20, 7]))
    """
    if len(row_ids) != len(lengths):
        raise ValueError(f"lengths must be one for each of the {len(row_ids)} row_ids, got {len(lengths)}")
    if len(set(row_ids)) != len(row_ids):
        raise ValueError(f"row_ids must be different from each other, got {list(row_ids)}")
    return TAKE, None, ([int(row) for row in row_ids], [int(length) for length in lengths])


def read_records(replies: Sequence[bytes]) -> MixRecord:
    """The record in the workers' replies. All tensor-parallel workers reply the same.

    Raises:
        RuntimeError, ValueError: see `take_records`.

    Examples:
        >>> from ngrpo_ops.integrations.vllm import read_records, records
        >>> read_records([records.pack(ValueError("row 4: the engine has a record of 3 steps, asked for 20"))])
        Traceback (most recent call last):
        ValueError: row 4: the engine has a record of 3 steps, asked for 20
    """
    return unpack(replies[0])
