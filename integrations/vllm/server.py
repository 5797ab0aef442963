"""What a vLLM server adds to an engine that mixes: row ids and records over HTTP. Runs in every process of vLLM.

A server is ``vllm serve`` with ``VLLM_SERVER_DEV_MODE=1``, and the mixing among its arguments:

    vllm serve MODEL --additional-config.ngrpo_ops.mixing_rate 0.1

A request over HTTP is mixed if its ``vllm_xargs`` are ``{"ngrpo_ops": ROW}``, ROW the row id of the first of its n
sequences. A sequence without a seed of its own gets that of its row. The records are fetched by ``/collective_rpc``:

- ``open_mix_records(RUN, SEED)``: from now on the server's records are those of the trainer that is called RUN, and
  SEED is the mixing's. What was kept for another trainer is dropped. The reply says how the server mixes.
- ``take_mix_records_json(RUN, FIRST, STOP, ROW_IDS, LENGTHS)``: the records of finished rows. They are kept, so that a
  trainer that has lost the reply can ask again. Rows outside of [FIRST, STOP), the rollout under way, are forgotten. So
  a server never keeps more than one rollout.

A request that is sent again replaces the earlier one: the row's record is the later request's. Which of two it is in
two replicas is told by the checksum of its tokens.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from vllm import envs
from vllm.exceptions import VLLMValidationError

import ngrpo_ops
from ngrpo_ops._patching import Refusal, check_signature
from ngrpo_ops.versions import tested
from ngrpo_ops.wire import FORMAT, KEY, OPEN, TAKE, error_reply, pack_reply

from .client import request_seed


class RequestRefused(VLLMValidationError, ValueError):
    """A request that cannot be mixed. A server answers with 400 and the text.

    Another ValueError would become an empty 500, which clients send again.
    """


# Engines ----------------------------------------------------------------------------------------------------------


def server_refusals(vllm_config: Any) -> list[Refusal]:
    """The settings of a server under which requests over HTTP would not be mixed, or their records not be found."""
    parallel = vllm_config.parallel_config
    if (replicas := parallel.data_parallel_size > 1) and not parallel.local_engines_only:
        from vllm.v1.engine.core_client import DPLBAsyncMPClient

        expected = ["self", "method", "args", "engine"]
        check_signature(DPLBAsyncMPClient, "_call_utility_async", expected, "vLLM", tested("vllm"))
    return [
        Refusal(
            "enable_prefix_caching",
            vllm_config.cache_config.enable_prefix_caching,
            "cached blocks are found by token ids alone, and those of another mix would be taken for a request's own; "
            "leave the flag out, a server that mixes switches it off",
        ),
        Refusal(
            "data_parallel_size > 1 with a mixture of experts",
            replicas and vllm_config.model_config.is_moe,
            "its replicas run in lockstep, which was never tried with mixing; start a server for each replica",
        ),
        Refusal(
            "data_parallel_hybrid_lb or data_parallel_external_lb",
            replicas and parallel.local_engines_only,
            "the records of the replicas behind other addresses would not be fetched; let one server balance them all",
        ),
        Refusal(
            "VLLM_USE_RUST_FRONTEND",
            envs.VLLM_USE_RUST_FRONTEND,
            "the plugin reads requests in vLLM's Python front end",
        ),
    ]


# Requests ---------------------------------------------------------------------------------------------------------


def seed_served_row(sampling_params: Any, seed: int) -> bool:
    """Gives a request that came over HTTP the seed of its row, unless it has one.

    Returns:
        Whether it came over HTTP.
    """
    row_id = sampling_params.extra_args[KEY]
    if type(row_id) is not int:
        return False
    if sampling_params.seed is None:
        sampling_params.seed = request_seed(seed, row_id)
    return True


# Records ----------------------------------------------------------------------------------------------------------


def _replies(method: Callable) -> Callable:
    """A method of workers that replies with its error: raised, it would become a 500, which has no text."""

    @functools.wraps(method)
    @torch.inference_mode()  # as the engine's steps, whose tensors these are
    def replying(worker: Any, *arguments: Any) -> dict[str, Any] | None:
        try:
            return method(worker, *arguments)
        except Exception as error:
            return error_reply(error)

    return replying


@_replies
def open_mix_records(worker: Any, run: str, seed: int) -> dict[str, Any]:
    """The method `OPEN` of workers. See the head of this file."""
    from .plugin import mixer_of

    mixer = mixer_of(worker)
    if mixer is None:
        raise ValueError("it was not started to mix")
    mixer.run = run
    mixer.config = mixer.requests.config = replace(mixer.config, seed=seed)
    mixer.requests.forget_outside(range(0))
    model = worker.model_config
    return {
        "format": FORMAT,
        "version": ngrpo_ops.__version__,
        "config": asdict(mixer.config),
        "enable_prefix_caching": bool(worker.cache_config.enable_prefix_caching),
        "model": {
            "vocab_size": mixer.vocabulary,
            "hidden_size": model.get_hidden_size(),
            "num_hidden_layers": model.get_total_num_hidden_layers(),
        },
    }


@_replies
def take_mix_records_json(
    worker: Any, run: str, first: int, stop: int, row_ids: list[int], lengths: list[int]
) -> dict[str, Any] | None:
    """The method `TAKE` of workers. See the head of this file.

    Returns:
        What `read_replies` reads. None from a worker whose tensor-parallel group has answered.
    """
    from .plugin import mixer_of

    mixer = mixer_of(worker)
    if mixer is None or mixer.run is None:
        raise RuntimeError("the server knows no trainer: it was started anew, and its weights are its checkpoint's")
    if mixer.run != run:
        raise RuntimeError("another trainer has begun to use the server, and the weights there are that trainer's")
    mixer.requests.forget_outside(range(first, stop))
    if worker.rank % worker.parallel_config.world_size:
        return None
    steps = mixer.requests.steps(row_ids)
    here = {row: length for row, length in zip(row_ids, lengths, strict=True) if steps.get(row, 0) >= length > 0}
    rows = list(here)
    record, tokens = mixer.read(mixer.requests.find(rows, list(here.values())), rows)
    completions = [sampled[:length].tolist() for sampled, length in zip(tokens, here.values(), strict=True)]
    return pack_reply(record, rows, completions, {row: count for row, count in steps.items() if row not in here})


def patch_call_utility_async(original: Callable) -> Callable:
    """DPLBAsyncMPClient.call_utility_async: the replies of all replicas, where vLLM returns those of the first."""

    async def call_utility_async(self: Any, method: str, *args: Any) -> Any:
        if method != "collective_rpc" or args[0] not in (OPEN, TAKE):
            return await original(self, method, *args)
        calls = [self._call_utility_async(method, *args, engine=engine) for engine in self.core_engines]
        return [reply for replies in await asyncio.gather(*calls) for reply in replies]

    return call_utility_async
