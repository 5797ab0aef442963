"""Registration of the operations with torch: schema, implementation, shape function, autograd.

`backend` is an argument of the operations that have kernels, so that a compiled graph shows what runs. Each backward is
an operation of its own whose derivative is refused: a second one raises instead of being silently wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

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


@Operation
def mix_embeddings(
    embedding: Tensor, ids: Tensor, weights: Tensor, padding_id: int | None, deterministic: bool, backend: str
) -> Tensor:
    if backend == "triton":
        return kernels("mix_embeddings").forward(embedding, ids, weights, padding_id)
    implementation = cpu if embedding.device.type == "cpu" else reference
    return implementation.mix_embeddings(embedding, ids, weights, padding_id)


@mix_embeddings.register_fake
def _(
    embedding: Tensor, ids: Tensor, weights: Tensor, padding_id: int | None, deterministic: bool, backend: str
) -> Tensor:
    return embedding.new_empty(ids.shape[0], embedding.shape[1])


@Operation
def mix_embeddings_grad_embedding(
    grad: Tensor,
    embedding: Tensor,
    ids: Tensor,
    weights: Tensor,
    padding_id: int | None,
    deterministic: bool,
    backend: str,
) -> Tensor:
    if backend == "triton":
        deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
        return kernels("mix_embeddings").grad_embedding(grad, embedding, ids, weights, padding_id, deterministic)
    return reference.mix_embeddings_grad_embedding(grad, embedding, ids, weights, padding_id)


@mix_embeddings_grad_embedding.register_fake
def _(
    grad: Tensor,
    embedding: Tensor,
    ids: Tensor,
    weights: Tensor,
    padding_id: int | None,
    deterministic: bool,
    backend: str,
) -> Tensor:
    return embedding.new_empty(embedding.shape)


@Operation
def mix_embeddings_grad_weights(
    grad: Tensor, embedding: Tensor, ids: Tensor, weights: Tensor, padding_id: int | None, backend: str
) -> Tensor:
    if backend == "triton":
        return kernels("mix_embeddings").grad_weights(grad, embedding, ids, weights, padding_id)
    implementation = cpu if embedding.device.type == "cpu" else reference
    return implementation.mix_embeddings_grad_weights(grad, embedding, ids, weights, padding_id)


@mix_embeddings_grad_weights.register_fake
def _(grad: Tensor, embedding: Tensor, ids: Tensor, weights: Tensor, padding_id: int | None, backend: str) -> Tensor:
    return weights.new_empty(weights.shape)


def _mix_setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *saved, ctx.padding_id, ctx.deterministic, ctx.backend = inputs
    ctx.save_for_backward(*saved)


def _mix_backward(ctx, grad):  # type: ignore[no-untyped-def]
    saved, backend = ctx.saved_tensors, ctx.backend
    embedding = weights = None
    if ctx.needs_input_grad[0]:
        embedding = mix_embeddings_grad_embedding(grad, *saved, ctx.padding_id, ctx.deterministic, backend)
    if ctx.needs_input_grad[2]:
        weights = mix_embeddings_grad_weights(grad, *saved, ctx.padding_id, backend)
    return embedding, None, weights, None, None, None


mix_embeddings.register_autograd(_mix_backward, setup_context=_mix_setup_context)
mix_embeddings_grad_embedding.refuse_derivative("mix_embeddings")
mix_embeddings_grad_weights.refuse_derivative("mix_embeddings")


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


# Selective log-softmax --------------------------------------------------------------------------------------------


@Operation
def selective_log_softmax(
    logits: Tensor, ids: Tensor, temperature: float, entropy: bool, in_place_backward: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Also what the kernels' backward needs of each row, [2, n]; the eager one computes it again."""
    if backend == "triton":
        return kernels("log_softmax").forward(logits, ids, temperature, entropy)
    return *reference.selective_log_softmax(logits, ids, temperature, entropy), logits.new_empty(2, 0)


@selective_log_softmax.register_fake
def _(
    logits: Tensor, ids: Tensor, temperature: float, entropy: bool, in_place_backward: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = ids.shape[0], reference.compute_dtype(logits)
    return (
        logits.new_empty(ids.shape, dtype=dtype),
        logits.new_empty(n if entropy else 0, dtype=dtype),
        logits.new_empty(2, n, dtype=dtype) if backend == "triton" else logits.new_empty(2, 0),
    )


def _log_softmax_gradient(
    grad: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    ids: Tensor,
    entropy: Tensor,
    normalizer: Tensor,
    temperature: float,
    backend: str,
    in_place: bool,
) -> Tensor:
    if backend == "triton":
        return kernels("log_softmax").backward(
            grad, grad_entropy, logits, ids, entropy, normalizer, temperature, in_place
        )
    return reference.selective_log_softmax_backward(
        grad, grad_entropy, logits, ids, temperature, entropy.numel() > 0, in_place
    )


@Operation
def selective_log_softmax_backward(
    grad: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    ids: Tensor,
    entropy: Tensor,
    normalizer: Tensor,
    temperature: float,
    backend: str,
) -> Tensor:
    return _log_softmax_gradient(
        grad, grad_entropy, logits, ids, entropy, normalizer, temperature, backend, in_place=False
    )


@selective_log_softmax_backward.register_fake
def _(
    grad: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    ids: Tensor,
    entropy: Tensor,
    normalizer: Tensor,
    temperature: float,
    backend: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


@custom_op("ngrpo::selective_log_softmax_backward_", mutates_args=("logits",))
def selective_log_softmax_backward_(
    grad: Tensor,
    grad_entropy: Tensor,
    logits: Tensor,
    ids: Tensor,
    entropy: Tensor,
    normalizer: Tensor,
    temperature: float,
    backend: str,
) -> None:
    """The same, written over the logits."""
    _log_softmax_gradient(grad, grad_entropy, logits, ids, entropy, normalizer, temperature, backend, in_place=True)


def _log_softmax_setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, ids, ctx.temperature, _, ctx.in_place, ctx.backend = inputs
    ctx.save_for_backward(logits, ids, output[1], output[2])


def _log_softmax_backward(ctx, grad, grad_entropy, _):  # type: ignore[no-untyped-def]
    saved = ctx.saved_tensors
    if ctx.in_place:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "selective_log_softmax in place can be differentiated once: create_graph is refused"
            )
        selective_log_softmax_backward_(grad, grad_entropy, *saved, ctx.temperature, ctx.backend)
        return saved[0].detach(), *[None] * 5
    return selective_log_softmax_backward(grad, grad_entropy, *saved, ctx.temperature, ctx.backend), *[None] * 5


selective_log_softmax.register_autograd(_log_softmax_backward, setup_context=_log_softmax_setup_context)
selective_log_softmax_backward.refuse_derivative("selective_log_softmax")
