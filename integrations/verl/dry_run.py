"""`+ngrpo.dry_run=True`: rollouts and their replay, before GPUs are reserved. Runs in the launcher, without Ray."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig
from tensordict import NonTensorStack, TensorDict
from torch import Tensor

from ngrpo_ops import MixingConfig, MixRecord
from ngrpo_ops.parity import PLAIN, PLAIN_IDS, PROMPTS, REPLAYED, TOKENS, parity_table, strongly_mixed, verdict
from ngrpo_ops.record import SparseRecord
from ngrpo_ops.wire import KEY

from .samples import pack_record
from .settings import mixing_config


class Rollout(NamedTuple):
    """A sample: the ids of its prompt and of its completion, and its record."""

    prompt: list[int]
    tokens: list[int]
    record: SparseRecord


def dry_run(config: DictConfig) -> int:
    """Two prompts, rolled out with and without mixes by an engine, then scored by the policy; in this process.

    The records and the policy's forward are those of a training run, the latter by verl's own worker on one device. The
    mixes are stronger (see `parity.strongly_mixed`). Ray, verl's servers and the weight sync are left out.

    Returns:
        An exit status. It is 0 if the policy agrees with the engine on mixed rollouts as well as on plain ones, and
        disagrees where it is not given the mixes.
    """
    from verl.utils.config import omega_conf_to_dataclass

    mixing = strongly_mixed(mixing_config(config))
    model = omega_conf_to_dataclass(config.actor_rollout_ref.model)
    prompts = _prompts(config, model)
    plain, mixed = _roll_out(config, model, mixing, prompts)
    worker = _make_worker(config, model)
    without = [rollout._replace(record=unmixed(rollout.record)) for rollout in mixed]
    follow = [_follow_a_mix(rollout.record) for rollout in mixed]
    differences = {
        PLAIN: torch.cat(_differences(worker, config, plain)),
        REPLAYED: _chosen(_differences(worker, config, mixed), follow),
        PLAIN_IDS: _chosen(_differences(worker, config, without), follow),
    }
    steps = sum(len(rollout.record.steps) for rollout in mixed)
    print(f"{len(prompts)} prompts, {len(mixed)} mixed rollouts with {steps} mixed steps")
    print(parity_table(differences))
    status, text = verdict(differences, mixes=mixing.k > 1)  # a mix of one token is the token
    print(text)
    return status


def _prompts(config: DictConfig, model: Any) -> list[list[int]]:
    """The ids of the data's first prompts, as verl's agent loops make them."""
    from verl.trainer.ppo.utils import create_rl_dataset
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    data = create_rl_dataset(
        config.data.train_files, config.data, model.tokenizer, model.processor, max_samples=PROMPTS
    )
    builder = create_continuous_token_builder(
        model.tokenizer, hf_model_type=model.hf_config.model_type,
        chat_template_kwargs=config.data.get("apply_chat_template_kwargs", {}),
    )  # fmt: skip
    count = min(PROMPTS, len(data))
    return [list(builder.build_initial_tokens(list(data[i]["raw_prompt"]))) for i in range(count)]


def _roll_out(
    config: DictConfig, model: Any, mixing: MixingConfig, prompts: Sequence[list[int]]
) -> tuple[list[Rollout], list[Rollout]]:
    """Samples without mixes, and with them."""
    from vllm import LLM, SamplingParams

    from ..vllm import engine_kwargs, request_kwargs, take_records

    rollout = config.actor_rollout_ref.rollout
    llm = LLM(
        model=model.local_path, tokenizer=model.local_tokenizer_path, trust_remote_code=model.trust_remote_code,
        dtype=rollout.dtype, enforce_eager=True, gpu_memory_utilization=rollout.gpu_memory_utilization,
        max_model_len=rollout.max_model_len or rollout.prompt_length + rollout.response_length,
        seed=rollout.seed, logprobs_mode="processed_logprobs", **engine_kwargs(mixing),
    )  # fmt: skip
    asked = [prompt for prompt in prompts for _ in range(rollout.n)]
    rows = range(len(asked))
    settings = SamplingParams(
        temperature=rollout.temperature, max_tokens=min(rollout.response_length, TOKENS), logprobs=0
    )

    def samples(is_mixed: bool) -> list[Rollout]:
        params = [settings.clone() for _ in asked]
        if is_mixed:
            for row, one in zip(rows, params, strict=True):
                one.extra_args = request_kwargs(row)
        outputs = [x.outputs[0] for x in llm.generate([{"prompt_token_ids": ids} for ids in asked], params)]
        tokens = [list(output.token_ids) for output in outputs]
        if is_mixed:
            found = take_records(llm, rows, [len(one) for one in tokens])
        else:
            found = _without_mixes(
                [[x[t].logprob for x, t in zip(o.logprobs, o.token_ids, strict=True)] for o in outputs]
            )
        records = [found[i : i + 1].cut(len(tokens[i])).sparse(0, len(asked[i])) for i in rows]
        return [Rollout(*one) for one in zip(asked, tokens, records, strict=True)]

    try:
        return samples(False), samples(True)
    finally:
        llm.llm_engine.engine_core.shutdown()


def _without_mixes(logprobs: Sequence[list[float]]) -> MixRecord:
    """The record of samples that were not mixed, with these log-probabilities."""
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in logprobs], batch_first=True)
    shape = (*padded.shape, 1)
    return MixRecord(
        torch.zeros(padded.shape, dtype=torch.bool),
        torch.zeros(shape, dtype=torch.int64),
        torch.zeros(shape),
        0,
        padded,
    )


def unmixed(record: SparseRecord) -> SparseRecord:
    """The record of the same sample without its mixes."""
    return replace(record, steps=record.steps[:0], ids=record.ids[:0], weights=record.weights[:0])


def _make_worker(config: DictConfig, model: Any) -> Any:
    """verl's training worker of the policy, the only rank of its process group."""
    from verl.utils.config import omega_conf_to_dataclass
    from verl.workers.config import TrainingWorkerConfig
    from verl.workers.engine_workers import TrainingWorker

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(rank)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    actor.engine.infer_micro_batch_size_per_gpu = 1
    actor.engine.use_dynamic_bsz = False
    actor.engine.ulysses_sequence_parallel_size = 1
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model", model_config=model, engine_config=actor.engine, optimizer_config=actor.optim,
            checkpoint_config=actor.checkpoint,
        )
    )  # fmt: skip
    worker.reset()
    return worker


def _differences(worker: Any, config: DictConfig, rollouts: Sequence[Rollout]) -> list[Tensor]:
    """|engine's - policy's log-probability| of every generated token."""
    from verl.workers.utils.padding import response_from_nested

    batch = training_batch(rollouts, config.actor_rollout_ref.rollout.temperature)
    scored = response_from_nested(worker.infer_batch(batch)["log_probs"], batch["response_mask"]).unbind()
    return [
        (logprobs.float().cpu() - rollout.record.logprobs).abs()
        for rollout, logprobs in zip(rollouts, scored, strict=True)
    ]


def _follow_a_mix(record: SparseRecord) -> slice:
    """The tokens that follow a mix."""
    return slice(int(record.steps[0]) + 1 if len(record.steps) else len(record.logprobs), None)


def _chosen(values: Sequence[Tensor], where: Sequence[slice]) -> Tensor:
    return torch.cat([value[one] for value, one in zip(values, where, strict=True)])


def training_batch(rollouts: Sequence[Rollout], temperature: float) -> TensorDict:
    """Samples as verl's training workers get them.

    Examples:
        >>> import torch
        >>> from ngrpo_ops.integrations.verl.dry_run import Rollout, training_batch
        >>> from ngrpo_ops.record import SparseRecord
        >>> ids, weights = torch.tensor([[7, 8]]), torch.tensor([[0.5, 0.5]])
        >>> record = SparseRecord(3, torch.tensor([0]), ids, weights, logprobs=torch.zeros(2))
        >>> training_batch([Rollout([4, 5, 6], [7, 9], record)], temperature=1.0)["input_ids"][0]
        tensor([4, 5, 6, 7, 9])
    """
    from verl.utils import tensordict_utils

    def jagged(rows: Sequence[list[int]]) -> Tensor:
        return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)

    whole = [rollout.prompt + rollout.tokens for rollout in rollouts]
    mask = jagged([[1] * len(rollout.tokens) for rollout in rollouts])
    batch = TensorDict(
        {
            "prompts": jagged([rollout.prompt for rollout in rollouts]),
            "responses": jagged([rollout.tokens for rollout in rollouts]),
            "input_ids": jagged(whole),
            "position_ids": jagged([list(range(len(ids))) for ids in whole]),
            "response_mask": mask,
            "loss_mask": mask,
            "extra_fields": NonTensorStack(*[{KEY: pack_record(x.record, x.tokens)} for x in rollouts]),
            "uid": NonTensorStack(*map(str, range(len(rollouts)))),
        },
        batch_size=[len(rollouts)],
    )
    tensordict_utils.assign_non_tensor(
        batch, temperature=temperature, calculate_entropy=False, compute_loss=False, pad_token_id=0
    )
    return batch
