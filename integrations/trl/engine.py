"""Runs in the trainer's process, which holds TRL's colocated vLLM engine: starts the engine and has its requests mixed.

Importing this file imports vLLM: the trainer does so only with ``use_vllm``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor
from trl.generation import vllm_generation

from ngrpo_ops import MixingConfig, MixRecord
from ngrpo_ops._patching import replaced

from ..vllm import engine_kwargs, request_kwargs, request_seed, take_records


def mixing_engine(config: MixingConfig) -> AbstractContextManager[Any]:
    """Within it TRL starts its colocated engine with mixing. No setting of TRL reaches the engine's arguments."""
    engine = functools.partial(vllm_generation.LLM, **engine_kwargs(config))
    return replaced(vllm_generation, "LLM", engine)


@contextmanager
def mixing_requests(llm: Any, seed: int, row_ids: Tensor, rank: int) -> Iterator[list[MixRecord]]:
    """Within it the engine mixes what TRL asks it for. The list yielded gains the record of `row_ids` with each call.

    Every request has a seed of its own, so that its tokens belong to its row too, also after a resume. The engine of a
    tensor-parallel group generates the rows of all its ranks on each of them, in the order of the ranks.

    Args:
        llm: the engine.
        seed: of the mixing.
        row_ids: int64 [B], consecutive: the rows of this rank.
        rank: this process's within its tensor-parallel group.
    """
    records: list[MixRecord] = []
    rows = len(row_ids)

    def generate(prompts: list, sampling_params: Any, **kwargs: Any) -> Any:
        first = int(row_ids[0]) - rank * rows
        group = range(first, first + len(prompts))
        requests = []
        for row in group:
            request = sampling_params.clone()
            request.extra_args = {**(request.extra_args or {}), **request_kwargs(row)}
            if request.seed is None:
                request.seed = request_seed(seed, row)
            requests.append(request)
        outputs = original(prompts, sampling_params=requests, **kwargs)
        record = take_records(llm, group, [len(output.outputs[0].token_ids) for output in outputs])
        records.append(record[rank * rows : (rank + 1) * rows])
        return outputs

    with replaced(llm, "generate", generate) as original:
        yield records
