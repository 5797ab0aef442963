"""Registration of the operations with torch: schema, implementation, shape function, autograd.

Every device runs the eager implementation of `reference` unless a kernel is registered for it. Each backward is an
operation of its own without an autograd formula: a second derivative raises instead of being silently wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

from . import reference


@custom_op("ngrpo::nearest_neighbors", mutates_args=())
def nearest_neighbors(
    embedding: Tensor, k: int, metric: str, queries: Tensor | None, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    return reference.nearest_neighbors(embedding, k, metric, queries, allowed)  # type: ignore[arg-type]


@nearest_neighbors.register_fake
def _(embedding: Tensor, k: int, metric: str, queries: Tensor | None, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = embedding.shape[0] if queries is None else queries.shape[0]
    return embedding.new_empty(rows, k, dtype=torch.int64), embedding.new_empty(rows, k, dtype=torch.float32)


@custom_op("ngrpo::mix_embeddings", mutates_args=())
def mix_embeddings(embedding: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return reference.mix_embeddings(embedding, ids, weights)


@mix_embeddings.register_fake
def _(embedding: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return embedding.new_empty(*ids.shape[:-1], embedding.shape[1])


@custom_op("ngrpo::mix_embeddings_grad_embedding", mutates_args=())
def mix_embeddings_grad_embedding(grad: Tensor, embedding: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return reference.mix_embeddings_grad_embedding(grad, embedding, ids, weights)


@mix_embeddings_grad_embedding.register_fake
def _(grad: Tensor, embedding: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return embedding.new_empty(embedding.shape)


@custom_op("ngrpo::mix_embeddings_grad_weights", mutates_args=())
def mix_embeddings_grad_weights(grad: Tensor, embedding: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return reference.mix_embeddings_grad_weights(grad, embedding, ids, weights)


@mix_embeddings_grad_weights.register_fake
def _(grad: Tensor, embedding: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return weights.new_empty(weights.shape)


def _mix_setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _mix_backward(ctx, grad):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    embedding = mix_embeddings_grad_embedding(grad, *saved) if ctx.needs_input_grad[0] else None
    weights = mix_embeddings_grad_weights(grad, *saved) if ctx.needs_input_grad[2] else None
    return embedding, None, weights


mix_embeddings.register_autograd(_mix_backward, setup_context=_mix_setup_context)


@custom_op("ngrpo::decode_step", mutates_args=())
def decode_step(
    logits: Tensor,
    embedding: Tensor,
    neighbor_ids: Tensor,
    mixing_rate: float,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: Tensor,
    step: Tensor,
    row_ids: Tensor,
    variant: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return reference.decode_step(
        logits, embedding, neighbor_ids, mixing_rate, temperature, top_k, top_p, seed, step, row_ids, variant
    )


@decode_step.register_fake
def _(
    logits: Tensor,
    embedding: Tensor,
    neighbor_ids: Tensor,
    mixing_rate: float,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: Tensor,
    step: Tensor,
    row_ids: Tensor,
    variant: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, k = logits.shape[0], neighbor_ids.shape[1] + 1
    return (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.bool),
        logits.new_empty(rows, k, dtype=torch.int64),
        logits.new_empty(rows, k, dtype=torch.float32),
        embedding.new_empty(rows, embedding.shape[1]),
        logits.new_empty(rows, dtype=torch.float32),
    )


@custom_op("ngrpo::group_advantages", mutates_args=())
def group_advantages(
    rewards: Tensor, group_ids: Tensor, baseline: str, scale: str, ddof: int, eps: float, mask: Tensor | None
) -> Tensor:
    return reference.group_advantages(rewards, group_ids, baseline, scale, ddof, eps, mask)


@group_advantages.register_fake
def _(
    rewards: Tensor, group_ids: Tensor, baseline: str, scale: str, ddof: int, eps: float, mask: Tensor | None
) -> Tensor:
    return rewards.new_empty(rewards.shape)


@custom_op("ngrpo::group_advantages_backward", mutates_args=())
def group_advantages_backward(
    grad: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    baseline: str,
    scale: str,
    ddof: int,
    eps: float,
    mask: Tensor | None,
) -> Tensor:
    return reference.group_advantages_backward(grad, rewards, group_ids, baseline, scale, ddof, eps, mask)


@group_advantages_backward.register_fake
def _(
    grad: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    baseline: str,
    scale: str,
    ddof: int,
    eps: float,
    mask: Tensor | None,
) -> Tensor:
    return rewards.new_empty(rewards.shape)


def _advantages_setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    rewards, group_ids, ctx.baseline, ctx.scale, ctx.ddof, ctx.eps, mask = inputs
    ctx.save_for_backward(rewards, group_ids, mask)


def _advantages_backward(ctx, grad):  # type: ignore[no-untyped-def]
    rewards, group_ids, mask = ctx.saved_tensors
    out = group_advantages_backward(grad, rewards, group_ids, ctx.baseline, ctx.scale, ctx.ddof, ctx.eps, mask)
    return out, None, None, None, None, None, None


group_advantages.register_autograd(_advantages_backward, setup_context=_advantages_setup_context)


@custom_op("ngrpo::selective_log_softmax", mutates_args=())
def selective_log_softmax(logits: Tensor, ids: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    return reference.selective_log_softmax(logits, ids, temperature, entropy)


@selective_log_softmax.register_fake
def _(logits: Tensor, ids: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    dtype = reference.compute_dtype(logits)
    return logits.new_empty(ids.shape, dtype=dtype), logits.new_empty(logits.shape[0] if entropy else 0, dtype=dtype)


@custom_op("ngrpo::selective_log_softmax_backward", mutates_args=())
def selective_log_softmax_backward(
    grad: Tensor, grad_entropy: Tensor, logits: Tensor, ids: Tensor, temperature: float, entropy: bool
) -> Tensor:
    return reference.selective_log_softmax_backward(grad, grad_entropy, logits, ids, temperature, entropy)


@selective_log_softmax_backward.register_fake
def _(grad: Tensor, grad_entropy: Tensor, logits: Tensor, ids: Tensor, temperature: float, entropy: bool) -> Tensor:
    return logits.new_empty(logits.shape)


def _log_softmax_setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, ids, ctx.temperature, ctx.entropy = inputs
    ctx.save_for_backward(logits, ids)


def _log_softmax_backward(ctx, grad, grad_entropy):  # type: ignore[no-untyped-def]
    logits, ids = ctx.saved_tensors
    out = selective_log_softmax_backward(grad, grad_entropy, logits, ids, ctx.temperature, ctx.entropy)
    return out, None, None, None


selective_log_softmax.register_autograd(_log_softmax_backward, setup_context=_log_softmax_setup_context)
