"""The file that `--train.agent_func_path` names: OpenRLHF loads it in the process of every engine, and nowhere else."""

from __future__ import annotations

import functools
from typing import Any

from openrlhf.utils.agent import SingleTurnAgentExecutor

from ngrpo_ops.integrations.openrlhf import MixedSample, action_ranges, read_settings, substitute
from ngrpo_ops.integrations.vllm import engine_kwargs, read_records, records_call, request_kwargs


class AgentExecutor(SingleTurnAgentExecutor):
    """OpenRLHF's single turn, with a record. Rewards are its own: by URL, or by a Python file's `reward_func`."""

    def __init__(self) -> None:
        self.config, reward_url = read_settings()
        super().__init__(reward_url.split(","))
        # OpenRLHF makes its engine next, in this process, and has no setting that reaches these arguments.
        substitute("vllm:AsyncEngineArgs", lambda kind: functools.partial(kind, **engine_kwargs(self.config)))

    async def execute(
        self, prompt: str, label: str, sampling_params: Any, max_length: int, hf_tokenizer: Any, llm_engine: Any,
        images: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        """
        Args:
            images: an iterator over the row ids of this prompt's samples (see `generator`); None: do not mix.

        Raises:
            RuntimeError: the engine has no records.
        """
        if images is None:
            return await super().execute(prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine)
        engine = _RecordedEngine(llm_engine, next(images))
        response = await super().execute(prompt, label, sampling_params, max_length, hf_tokenizer, engine)
        sample = engine.sample.cut(max_length)
        response["mm_train_inputs"] = sample
        if not self.config.loss_on_mixed_steps:
            response["action_ranges"] = action_ranges(sample)
        return response


class _RecordedEngine:
    """An engine for one request, which asks for it to be mixed and fetches its record."""

    def __init__(self, engine: Any, row_id: int) -> None:
        self.engine, self.row_id = engine, row_id
        self.sample: MixedSample

    async def generate(self, prompt_token_ids: list[int], sampling_params: Any, **kwargs: Any) -> Any:
        extra = {**(sampling_params.extra_args or {}), **request_kwargs(self.row_id)}
        sampling_params.extra_args = extra
        output = await self.engine.generate(prompt_token_ids, sampling_params, **kwargs)
        call = records_call([self.row_id], [len(output.outputs[0].token_ids)])
        try:
            replies = await self.engine.llm.collective_rpc(*call)
        except Exception as error:
            raise RuntimeError(
                f"the engine has no record of a mixed sample ({error}). If it does not know {call[0]!r}, the plugin "
                "'ngrpo_ops' was not loaded in its process: is ngrpo-ops installed on every node, and is it among "
                "VLLM_PLUGINS where that is set?"
            ) from error
        self.sample = MixedSample.of(read_records(replies), len(prompt_token_ids))
        return output
