"""`--ngrpo.dry_run`: one rollout and its replay, before GPUs are reserved. Runs in the launcher, without Ray."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ngrpo_ops import MixingConfig

from .settings import read_settings
from .workers import install, replaying

_PROMPTS = 2
_TOKENS = 128  # at most, of a sample


def strongly_mixed(config: MixingConfig) -> MixingConfig:
    """The configuration with mixes so strong that a policy which does not replay them shows a difference.

    At the paper's settings the mixes may be within bfloat16's rounding of the anchor.

    Examples:
        >>> from ngrpo_ops import MixingConfig
        >>> from ngrpo_ops.integrations.openrlhf.dry_run import strongly_mixed
        >>> strong = strongly_mixed(MixingConfig(k=5))
        >>> strong.k, strong.mixing_rate, strong.temperature
        (5, 0.5, 4.0)
    """
    return replace(
        config, mixing_rate=max(config.mixing_rate, 0.5), temperature=max(config.temperature or 1.0, 4.0),
        variant="paper", entropy_threshold=None, stop_token_ids=(), loss_on_mixed_steps=True,
    )  # fmt: skip


def dry_run(strategy: Any) -> int:
    """Two prompts, rolled out with and without mixes by an engine, then scored by the policy; in this process.

    The engine, the executor, the records and the policy's forward are those of a training run. The mixes are stronger
    (see `strongly_mixed`). DeepSpeed, the optimizer and Ray are left out.

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
    batches = itertools.islice(loader, _PROMPTS)
    prompts = [(texts[0], labels[0]) for _, texts, labels, _ in batches]
    plain, mixed = asyncio.run(_roll_out(args, tokenizer, prompts))
    actor = _load_actor(args)
    rows = {
        "plain rollouts": _differences(actor, plain, args.data.max_len, replay=False),
        "mixed, replayed": _differences(actor, mixed, args.data.max_len, replay=True),
        "mixed, plain ids": _differences(actor, mixed, args.data.max_len, replay=False),
    }
    steps = sum(len(response["mm_train_inputs"].steps) for response in mixed)
    print(f"{len(prompts)} prompts, {len(mixed)} mixed rollouts with {steps} mixed steps")
    print("log-probabilities, engine against policy:       tokens  mean |diff|   max |diff|")
    for title, values in rows.items():
        mean, largest = (float(values.mean()), float(values.max())) if len(values) else (float("nan"),) * 2
        print(f"  {title:44} {len(values):7} {mean:12.2e} {largest:12.2e}")
    plain_rollouts, replayed, plain_ids = rows.values()
    mixes = read_settings()[0].k > 1  # a mix of one token is the token
    status, text = verdict(plain_rollouts, replayed, plain_ids, mixes)
    print(text)
    return status


def verdict(plain: Tensor, replayed: Tensor, plain_ids: Tensor, mixes: bool) -> tuple[int, str]:
    """The exit status of a dry run, and its words.

    Args:
        plain: differences of log-probabilities on plain rollouts.
        replayed: the same on mixed rollouts, replayed.
        plain_ids: the same on mixed rollouts, given to the policy without their mixes.
        mixes: whether a mix is more than the anchor.

    Examples:
        >>> import torch
        >>> from ngrpo_ops.integrations.openrlhf.dry_run import verdict
        >>> small, large = torch.tensor([1e-6]), torch.tensor([0.1])
        >>> verdict(small, small, large, mixes=True)
        (0, 'parity: the policy agrees with the engine on mixed rollouts as it does on plain ones')
        >>> verdict(small, large, large, mixes=True)[0]
        1
    """
    if not len(replayed):
        return 1, "no token follows a mixed step: nothing was compared"
    bound = max(2 * float(plain.mean()), 1e-5)
    if not float(replayed.mean()) <= bound:
        return 1, f"NO PARITY: on mixed rollouts the mean is to be at most {bound:.2e}, twice that on plain ones"
    if mixes and not float(plain_ids.mean()) > bound:
        return 1, "INCONCLUSIVE: given plain ids the policy agrees as well, so that a replay cannot be told from none"
    return 0, "parity: the policy agrees with the engine on mixed rollouts as it does on plain ones"


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
        max_tokens=min(args.rollout.max_new_tokens or _TOKENS, _TOKENS),
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
