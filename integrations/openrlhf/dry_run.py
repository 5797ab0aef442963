"""`--ngrpo.dry_run`: one rollout and its replay, before GPUs are reserved. Runs in the launcher, without Ray."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ngrpo_ops.parity import PLAIN, PLAIN_IDS, PROMPTS, REPLAYED, TOKENS, parity_table, verdict

from .settings import read_settings
from .workers import install, replaying


def dry_run(strategy: Any) -> int:
    """Two prompts, rolled out with and without mixes by an engine, then scored by the policy; in this process.

    The engine, the executor, the records and the policy's forward are those of a training run. The mixes are stronger
    (see `parity.strongly_mixed`). DeepSpeed, the optimizer and Ray are left out.

    Args:
        strategy: OpenRLHF's own object of that name, which holds its arguments.

    Returns:
        An exit status. It is 0 if the policy agrees with the engine on mixed rollouts as well as on plain ones, and
        disagrees where it is not given the mixes.
    """
    from openrlhf.trainer.ppo_trainer import prepare_datasets
    from openrlhf.utils import get_tokenizer

    install()
    args = strategy.args
    fast = not args.data.disable_fast_tokenizer
    tokenizer = get_tokenizer(args.actor.model_name_or_path, None, "left", strategy, use_fast=fast)
    loader, _, _ = prepare_datasets(strategy, tokenizer)
    batches = itertools.islice(loader, PROMPTS)
    prompts = [(texts[0], labels[0]) for _, texts, labels, _ in batches]
    plain, mixed = asyncio.run(_roll_out(args, tokenizer, prompts))
    actor = _load_actor(args)
    differences = {
        PLAIN: _differences(actor, plain, args.data.max_len, replay=False),
        REPLAYED: _differences(actor, mixed, args.data.max_len, replay=True),
        PLAIN_IDS: _differences(actor, mixed, args.data.max_len, replay=False),
    }
    steps = sum(len(response["mm_train_inputs"].steps) for response in mixed)
    print(f"{len(prompts)} prompts, {len(mixed)} mixed rollouts with {steps} mixed steps")
    print(parity_table(differences))
    status, text = verdict(differences, mixes=read_settings()[0].k > 1)  # a mix of one token is the token
    print(text)
    return status


def _load_actor(args: Any) -> Any:
    from openrlhf.models import Actor

    actor = Actor(
        args.actor.model_name_or_path, attn_implementation=args.ds.attn_implementation,
        experts_implementation=args.ds.experts_implementation, param_dtype=args.ds.param_dtype,
        load_in_4bit=args.ds.load_in_4bit, lora_rank=args.ds.lora.rank, lora_alpha=args.ds.lora.alpha,
        lora_dropout=args.ds.lora.dropout, target_modules=args.ds.lora.target_modules,
        packing_samples=args.ds.packing_samples, temperature=args.rollout.temperature,
        use_liger_kernel=args.ds.use_liger_kernel,
    )  # fmt: skip
    return actor.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def _differences(actor: Any, responses: list[dict], max_len: int, replay: bool) -> Tensor:
    """|engine's - policy's log-probability| of the tokens that follow a mix, or of all tokens of plain rollouts."""
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    device = next(actor.parameters()).device
    found = []
    for response in responses:
        sample = SamplesGenerator._process_response_into_experience(None, response, max_len=max_len)
        record = response["mm_train_inputs"]
        with torch.no_grad(), replaying(actor, [[record]]) if replay else nullcontext():
            scored = actor(*(x.to(device) for x in (sample.sequences, sample.action_mask, sample.attention_mask)))
        first, end = response["action_ranges"][0][0], sample.sequences.shape[1]
        engine = sample.rollout_log_probs[0, first - 1 :] if record is None else record.logprobs
        difference = (scored[0, first - 1 : end - 1].float().cpu() - engine).abs()
        if record is not None:
            follows = int(record.steps[0]) + 1 if len(record.steps) else end
            difference = difference[follows:]
        found.append(difference)
    return torch.cat(found)


async def _roll_out(args: Any, tokenizer: Any, prompts: list[tuple[str, str]]) -> tuple[list[dict], list[dict]]:
    """Responses without mixes, and with them."""
    from openrlhf.trainer.ray import vllm_engine
    from vllm import SamplingParams

    os.environ.setdefault("RAY_ADDRESS", "local")  # else the engine's class asks Ray, which is not running
    kind = vllm_engine.RolloutRayActor.__ray_metadata__.modified_class
    engine = kind.__new__(kind)
    await engine.__init__(
        model=args.actor.model_name_or_path, agent_func_path=args.train.agent_func_path, num_gpus=1,
        seed=args.train.seed, max_model_len=args.data.max_len, dtype="bfloat16", trust_remote_code=True,
        enforce_eager=args.vllm.enforce_eager, gpu_memory_utilization=args.vllm.gpu_memory_utilization,
        distributed_executor_backend="uni", enable_prefix_caching=False, logprobs_mode="processed_logprobs",
    )  # fmt: skip
    settings = SamplingParams(
        temperature=args.rollout.temperature, min_tokens=1, logprobs=1, skip_special_tokens=False,
        max_tokens=min(args.rollout.max_new_tokens or TOKENS, TOKENS),
    )  # fmt: skip
    count = args.rollout.n_samples_per_prompt

    async def responses(rows: Iterator[int] | None) -> list[dict]:
        found = []
        for prompt, label in prompts:
            found += await engine.generate_responses(
                prompt, label, settings, args.data.max_len, tokenizer, count, images=rows
            )
        return found

    try:
        return await responses(None), await responses(itertools.count())
    finally:
        engine.llm.shutdown()
