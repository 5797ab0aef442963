"""The agent file that `--train.agent_func_path` names. Runs in the actor of every engine, and nowhere else.

OpenRLHF loads the file by its path, outside the package, so every import here is absolute.
"""

from __future__ import annotations

import functools
from typing import Any

from openrlhf.utils.agent import SingleTurnAgentExecutor

from ngrpo_ops import MixRecord
from ngrpo_ops.integrations.openrlhf.samples import action_ranges
from ngrpo_ops.integrations.openrlhf.settings import read_settings
from ngrpo_ops.integrations.openrlhf.workers import substitute
from ngrpo_ops.integrations.vllm import engine_kwargs, fetch_records, request_kwargs


class AgentExecutor(SingleTurnAgentExecutor):
    """OpenRLHF's single turn, with a record. Rewards are OpenRLHF's: by URL, or by the `reward_func` of a file."""

    def __init__(self) -> None:
        self.config, reward_url = read_settings()
        super().__init__(reward_url.split(","))
        # OpenRLHF makes its engine next, in this process, and has no setting that reaches these arguments.
        substitute("vllm:AsyncEngineArgs", lambda kind: functools.partial(kind, **engine_kwargs(self.config)))

    async def execute(
        self, prompt: str, label: str, sampling_params: Any, max_length: int, hf_tokenizer: Any, llm_engine: Any,
        images: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        """One sample of a prompt, with its record in `mm_train_inputs`.

        Args:
            images: an iterator over the row ids of this prompt's samples (see `patch_dispatch_prompts`). None: the
                sample is not mixed.

        Raises:
            RuntimeError: the engine has no records.
        """
        if images is None:
            return await super().execute(prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine)
        engine = _RecordingEngine(llm_engine, next(images))
        response = await super().execute(prompt, label, sampling_params, max_length, hf_tokenizer, engine)
        kept = max(max_length - engine.first, 0)  # OpenRLHF cuts the sample to `max_length` tokens
        record = engine.record.cut(kept).sparse(0, engine.first)
        response["mm_train_inputs"] = record
        if not self.config.loss_on_mixed_steps:
            response["action_ranges"] = action_ranges(record)
        return response


class _RecordingEngine:
    """An engine for one request, which is mixed and whose record is fetched.

    Attributes:
        first: the length of the request's prompt, once it has been generated.
        record: the record, of one row, once it has been generated.
    """

    first: int
    record: MixRecord

    def __init__(self, engine: Any, row_id: int) -> None:
        self.engine, self.row_id = engine, row_id

    async def generate(self, prompt_token_ids: list[int], sampling_params: Any, **kwargs: Any) -> Any:
        sampling_params.extra_args = {**(sampling_params.extra_args or {}), **request_kwargs(self.row_id)}
        output = await self.engine.generate(prompt_token_ids, sampling_params, **kwargs)
        length = len(output.outputs[0].token_ids)
        self.first = len(prompt_token_ids)
        self.record = await fetch_records(self.engine.llm, [self.row_id], [length])
        return output
