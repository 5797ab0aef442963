"""verl's vLLM server, which fetches the record of a mixed request before it answers. Runs in the server's actor."""

from __future__ import annotations

from typing import Any

import ray
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

from ngrpo_ops.wire import KEY

from ..vllm import fetch_records
from .checks import check_parameters

check_parameters("server")


class MixingHttpServer(vLLMHttpServer):
    """A mixed request's answer has its record in `extra_fields`.

    Whoever has generated a sample has its record: neither the load balancer nor the order of requests matters.
    """

    async def launch_server(self, *args: Any, **kwargs: Any) -> None:
        """verl's; then the engine is asked whether it can mix.

        Raises:
            RuntimeError: the plugin was not loaded in the engine's processes, or no mixing is among the settings.
        """
        await super().launch_server(*args, **kwargs)
        if self.node_rank == 0:
            await fetch_records(self.engine, [], [])

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **kwargs: Any
    ) -> Any:
        asked = (sampling_params.get("extra_args") or {}).get(KEY)
        output = await super().generate(prompt_ids, sampling_params, request_id, **kwargs)
        if asked is None:
            return output
        # verl's own `collective_rpc` drops what the workers answer.
        record = await fetch_records(self.engine, [asked["row_id"]], [len(output.token_ids)])
        output.extra_fields[KEY] = record.sparse(0, len(prompt_ids)), output.token_ids
        return output


class MixingReplica(vLLMReplica):
    """verl's replica, with the server above. Reward models and teachers have verl's own server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.is_reward_model and not self.is_teacher_model:
            self.server_class = ray.remote(MixingHttpServer)
