"""Registration of the operations with torch: schema, implementation, shape function, autograd.

`backend` is an argument of the operations that have kernels, so that a compiled graph shows what runs. Each backward is
an operation of its own whose derivative is refused: a second one raises instead of being silently wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu, decoding, reference
from .ops._library import HostReadingOperation, Operation
from .ops._library import load_kernels as kernels


@HostReadingOperation
def nearest_neighbors(
    embedding: Tensor, k: int, metric: str, queries: Tensor | None, allowed: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    return reference.nearest_neighbors(embedding, k, metric, queries, allowed, backend)  # type: ignore[arg-type]


@nearest_neighbors.register_fake
def _(
    embedding: Tensor, k: int, metric: str, queries: Tensor | None, allowed: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    rows = embedding.shape[0] if queries is None else queries.shape[0]
    return embedding.new_empty(rows, k, dtype=torch.int64), embedding.new_empty(rows, k, dtype=torch.float32)


# Decode step ------------------------------------------------------------------------------------------------------


@HostReadingOperation
def mixing_candidates(
    logits: Tensor,
    neighbor_ids: Tensor | None,
    k: int,
    strategy: str,
    variant: str,
    temperature: Tensor,
    mixing_temperature: float | None,
    moi_beta: float,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor,
    step: Tensor,
    row_ids: Tensor | None,
    return_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    implementation = kernels("decode_step") if backend == "triton" else decoding
    return implementation.mixing_candidates(
        logits,
        neighbor_ids,
        k,
        strategy,
        variant,
        temperature,
        mixing_temperature,
        moi_beta,
        top_k,
        top_p,
        min_p,
        seed,
        step,
        row_ids,
        return_entropy,
    )


@mixing_candidates.register_fake
def _(
    logits: Tensor,
    neighbor_ids: Tensor | None,
    k: int,
    strategy: str,
    variant: str,
    temperature: Tensor,
    mixing_temperature: float | None,
    moi_beta: float,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor,
    step: Tensor,
    row_ids: Tensor | None,
    return_entropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, k, dtype=torch.int64),
        logits.new_empty(rows, k, dtype=torch.float32),
        logits.new_empty(rows if return_entropy else 0, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.int32),
    )


@HostReadingOperation
def decode_step(
    logits: Tensor,
    embedding: Tensor,
    neighbor_ids: Tensor | None,
    k: int,
    strategy: str,
    variant: str,
    mixing_rate: float,
    entropy_threshold: float | None,
    noise_scale: float,
    temperature: Tensor,
    mixing_temperature: float | None,
    moi_beta: float,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor,
    step: Tensor,
    row_ids: Tensor | None,
    enabled: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    implementation = kernels("decode_step") if backend == "triton" else cpu if logits.device.type == "cpu" else decoding
    return implementation.decode_step(
        logits, embedding, neighbor_ids, k, strategy, variant, mixing_rate, entropy_threshold, noise_scale,
        temperature, mixing_temperature, moi_beta, top_k, top_p, min_p, seed, step, row_ids, enabled,
    )  # fmt: skip


@decode_step.register_fake
def _(
    logits: Tensor,
    embedding: Tensor,
    neighbor_ids: Tensor | None,
    k: int,
    strategy: str,
    variant: str,
    mixing_rate: float,
    entropy_threshold: float | None,
    noise_scale: float,
    temperature: Tensor,
    mixing_temperature: float | None,
    moi_beta: float,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor,
    step: Tensor,
    row_ids: Tensor | None,
    enabled: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.bool),
        logits.new_empty(rows, k, dtype=torch.int64),
        logits.new_empty(rows, k, dtype=torch.float32),
        embedding.new_empty(rows, embedding.shape[1]),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.float32),
        logits.new_empty(rows, dtype=torch.int32),
    )


@Operation
def gaussian_noise(mixed: Tensor, scale: Tensor, seed: Tensor, row_ids: Tensor, steps: Tensor, backend: str) -> Tensor:
    implementation = kernels("decode_step") if backend == "triton" else decoding
    return implementation.gaussian_noise(mixed, scale, seed, row_ids, steps)


@gaussian_noise.register_fake
def _(mixed: Tensor, scale: Tensor, seed: Tensor, row_ids: Tensor, steps: Tensor, backend: str) -> Tensor:
    return mixed.new_empty(mixed.shape, dtype=reference.compute_dtype(mixed))


# Group advantages -------------------------------------------------------------------------------------------------


@Operation
def group_advantages(
    rewards: Tensor,
    weights: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    group_size: int,
    baseline: str,
    scale: str,
    ddof: int,
    eps: float,
    singles: str,
    omit_nan: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    implementation = kernels("group_advantages").forward if backend == "triton" else reference.group_advantages
    return implementation(rewards, weights, order, offsets, group_size, baseline, scale, ddof, eps, singles, omit_nan)


@group_advantages.register_fake
def _(
    rewards: Tensor,
    weights: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    group_size: int,
    baseline: str,
    scale: str,
    ddof: int,
    eps: float,
    singles: str,
    omit_nan: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    groups = rewards.shape[0] // group_size if offsets is None else offsets.shape[0] - 1
    spread = rewards.new_empty(groups, rewards.shape[1], dtype=reference.compute_dtype(rewards))
    return rewards.new_empty(rewards.shape), spread


@Operation
def group_advantages_backward(
    grad: Tensor,
    grad_spread: Tensor,
    rewards: Tensor,
    weights: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    group_size: int,
    baseline: str,
    scale: str,
    ddof: int,
    eps: float,
    singles: str,
    omit_nan: bool,
    backend: str,
) -> Tensor:
    module = kernels("group_advantages") if backend == "triton" else None
    implementation = module.backward if module else reference.group_advantages_backward
    return implementation(
        grad, grad_spread, rewards, weights, order, offsets, group_size, baseline, scale, ddof, eps, singles, omit_nan
    )


@group_advantages_backward.register_fake
def _(
    grad: Tensor,
    grad_spread: Tensor,
    rewards: Tensor,
    weights: Tensor | None,
    order: Tensor | None,
    offsets: Tensor | None,
    group_size: int,
    baseline: str,
    scale: str,
    ddof: int,
    eps: float,
    singles: str,
    omit_nan: bool,
    backend: str,
) -> Tensor:
    return rewards.new_empty(rewards.shape)


def _advantages_setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *saved, ctx.group_size, ctx.baseline, ctx.scale, ctx.ddof, ctx.eps, ctx.singles, ctx.omit_nan, ctx.backend = inputs
    ctx.save_for_backward(*saved)


def _advantages_backward(ctx, grad, grad_spread):  # type: ignore[no-untyped-def]
    options = ctx.group_size, ctx.baseline, ctx.scale, ctx.ddof, ctx.eps, ctx.singles, ctx.omit_nan, ctx.backend
    return group_advantages_backward(grad, grad_spread, *ctx.saved_tensors, *options), *[None] * 11


group_advantages.register_autograd(_advantages_backward, setup_context=_advantages_setup_context)
group_advantages_backward.refuse_derivative("group_advantages")
