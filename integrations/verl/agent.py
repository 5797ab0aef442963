"""verl's agent loop of one turn, which asks for mixes. Runs in the agent loops' workers."""

from __future__ import annotations

from typing import Any

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from ngrpo_ops.record import SparseRecord
from ngrpo_ops.wire import KEY

from .checks import check_parameters
from .samples import pack_record
from .settings import mixing_config

check_parameters("agent")

AGENT = "ngrpo"
"""The agent loop's name in verl's registry, and the value of a training sample's `agent_name`."""

FIRST_ROW = "ngrpo_first_row"
"""The column of the row id of each prompt's first sample."""


@register(AGENT)
class MixingAgentLoop(SingleTurnAgentLoop):
    """A training sample is mixed, and has its record in `extra_fields`. A validation sample has no row id."""

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        if FIRST_ROW not in kwargs:
            return await super().run(sampling_params, priority, **kwargs)
        from ..vllm import request_kwargs

        row_id = int(kwargs[FIRST_ROW]) + int(kwargs["session_id"])
        # A prompt's samples share the dict.
        asked = {**sampling_params, "extra_args": {**sampling_params.get("extra_args", {}), **request_kwargs(row_id)}}
        output = await super().run(asked, priority, **kwargs)
        found: tuple[SparseRecord, list[int]] | None = output.extra_fields.pop(KEY, None)
        if found is None:  # the training workers refuse a sample without a record, which stops the run with the reason
            return output
        record, tokens = found
        kept = len(output.response_ids)
        record = record.cut(kept)
        output.extra_fields[KEY] = pack_record(record, tokens[:kept])
        if not mixing_config(self.config).loss_on_mixed_steps:
            for step in record.steps.tolist():
                output.response_mask[step] = 0
        return output
