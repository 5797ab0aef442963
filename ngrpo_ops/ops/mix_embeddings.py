"""The weighted sum of embedding rows, with its gradients: contract, registration, oracle and CPU form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ._checks import (
    require_embedding,
    require_flag,
    require_floating,
    require_ids,
    require_ids_in_range,
    require_integer,
    require_same_device,
    require_shape,
    within,
)
from ._library import Operation, choose_backend, load_kernels
from ._precision import compute_dtype

_MAX_KERNEL_K = 32
_CPU_BLOCK = 256  # positions whose float32 rows stay in cache

# Contract ---------------------------------------------------------------------------------------------------------


def mix_embeddings(
    embedding: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    padding_id: int | None = None,
    out_rows: Tensor | None = None,
    deterministic: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Weighted sum of embedding rows, sum_c weights_c E[ids_c] (equation 10): the input of a mixed step.

    Args:
        embedding: E [V, d], floating point.
        ids: int64 [..., k], values in [0, V). Repeated ids add up.
        weights: floating point, the shape of `ids`. The weights need not sum to 1. A weight of 0 adds nothing, whatever
            its row holds. A position whose only nonzero weight is 1 gets a copy of that row.
        padding_id: candidates with this id are ignored: they add nothing and get no gradient. The id may lie outside
            [0, V), for example -1. None: every candidate counts.
        out_rows: int64 [M], the positions to compute, counted over the leading shape. The result is then [M, d]. None:
            all positions.
        deterministic: the gradient of E is summed in float32 in a fixed order, and rounded once to E's dtype. False
            allows the GPU kernel to add atomically. torch.use_deterministic_algorithms(True) overrides False.
        backend: "eager", "triton" or None. None is "triton" on a GPU, or under TRITON_INTERPRET=1, for k <= 32 and
            every dtype but float64; otherwise it is "eager".

    Returns:
        [..., d] in E's dtype, accumulated in float32 (float64 for float64). Differentiable once in `embedding`, with a
        dense gradient, and in `weights`.

    Raises:
        TypeError: `ids` or `out_rows` are not int64, `weights` are not floating point, another argument has the wrong
            type, or a tensor is a DTensor.
        ValueError: shapes or devices do not fit, the table is empty, there are no candidates, ids are out of range, or
            the backend cannot be used. Ids are checked on the CPU only; on a GPU a position with an id out of range is
            NaN.

    Examples:
        >>> import torch
        >>> from ngrpo_ops import mix_embeddings
        >>> embedding = torch.tensor([[1.0, 0.0], [0.0, 1.0], [4.0, 4.0]])
        >>> ids, weights = torch.tensor([[0, 1], [2, 0]]), torch.tensor([[0.75, 0.25], [1.0, 0.0]])
        >>> mix_embeddings(embedding, ids, weights)
        tensor([[0.7500, 0.2500],
                [4.0000, 4.0000]])
    """
    require_embedding(embedding)
    require_ids(ids, "ids")
    require_floating(weights, "weights")
    if ids.dim() < 1 or ids.shape[-1] == 0:
        raise ValueError(f"ids must be [..., k] with k >= 1, got shape {tuple(ids.shape)}")
    require_shape(weights, tuple(ids.shape), "weights", "that of ids")
    require_same_device("ids", ids, "embedding", embedding)
    require_same_device("weights", weights, "embedding", embedding)
    require_integer(padding_id, "padding_id", optional=True)
    require_flag(deterministic, "deterministic")
    k, d = ids.shape[-1], embedding.shape[1]
    shape = ids.shape[:-1]
    ids, weights = ids.reshape(-1, k), weights.reshape(-1, k)
    if out_rows is not None:
        require_ids(out_rows, "out_rows")
        if out_rows.dim() != 1:
            raise ValueError(f"out_rows must be [M], got shape {tuple(out_rows.shape)}")
        require_same_device("out_rows", out_rows, "embedding", embedding)
        require_ids_in_range(out_rows, ids.shape[0], "out_rows")
        shape, ids, weights = out_rows.shape, ids[out_rows], weights[out_rows]
    unsupported = f"the kernel takes k <= {_MAX_KERNEL_K}, got {k}" if k > _MAX_KERNEL_K else None
    backend = choose_backend(backend, embedding, unsupported)
    return _mix_embeddings(embedding, ids, weights, padding_id, deterministic, backend).view(*shape, d)


# Registration -----------------------------------------------------------------------------------------------------


@Operation
def _mix_embeddings(
    embedding: Tensor, ids: Tensor, weights: Tensor, padding_id: int | None, deterministic: bool, backend: str
) -> Tensor:
    """ids and weights are [n, k]. Only the backward reads `deterministic`."""
    if backend == "triton":
        return load_kernels("mix_embeddings").forward(embedding, ids, weights, padding_id)
    mix = mix_embeddings_cpu if embedding.device.type == "cpu" else mix_embeddings_reference
    return mix(embedding, ids, weights, padding_id)


@_mix_embeddings.register_fake
def _(embedding: Tensor, ids: Tensor, *_: Any) -> Tensor:
    return embedding.new_empty(ids.shape[0], embedding.shape[1])


@Operation
def _mix_embeddings_grad_embedding(
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
        kernels = load_kernels("mix_embeddings")
        return kernels.grad_embedding(grad, embedding, ids, weights, padding_id, deterministic)
    return mix_embeddings_grad_embedding_reference(grad, embedding, ids, weights, padding_id)


@_mix_embeddings_grad_embedding.register_fake
def _(grad: Tensor, embedding: Tensor, *_: Any) -> Tensor:
    return embedding.new_empty(embedding.shape)


@Operation
def _mix_embeddings_grad_weights(
    grad: Tensor, embedding: Tensor, ids: Tensor, weights: Tensor, padding_id: int | None, backend: str
) -> Tensor:
    if backend == "triton":
        return load_kernels("mix_embeddings").grad_weights(grad, embedding, ids, weights, padding_id)
    on_cpu = embedding.device.type == "cpu"
    grad_weights = mix_embeddings_grad_weights_cpu if on_cpu else mix_embeddings_grad_weights_reference
    return grad_weights(grad, embedding, ids, weights, padding_id)


@_mix_embeddings_grad_weights.register_fake
def _(grad: Tensor, embedding: Tensor, ids: Tensor, weights: Tensor, *_: Any) -> Tensor:
    return weights.new_empty(weights.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *saved, ctx.padding_id, ctx.deterministic, ctx.backend = inputs
    ctx.save_for_backward(*saved)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grad_embedding = grad_weights = None
    if ctx.needs_input_grad[0]:
        grad_embedding = _mix_embeddings_grad_embedding(grad, *saved, ctx.padding_id, ctx.deterministic, ctx.backend)
    if ctx.needs_input_grad[2]:
        grad_weights = _mix_embeddings_grad_weights(grad, *saved, ctx.padding_id, ctx.backend)
    return grad_embedding, None, grad_weights, None, None, None


_mix_embeddings.register_autograd(_backward, setup_context=_setup_context)
_mix_embeddings_grad_embedding.refuse_derivative("mix_embeddings")
_mix_embeddings_grad_weights.refuse_derivative("mix_embeddings")


# Oracle: what the kernels and the CPU form are tested against, and what runs on other devices ---------------------


def mix_embeddings_reference(embedding: Tensor, ids: Tensor, weights: Tensor, padding_id: int | None = None) -> Tensor:
    """[n, d] from ids and weights [n, k]. On an accelerator, an id out of range makes its position NaN."""
    _require_candidates_in_range(ids, embedding.shape[0], padding_id)
    dtype, used, known = compute_dtype(embedding), _used(ids, weights, padding_id), within(ids, embedding.shape[0])
    weights = weights.where(known, torch.nan)
    out = torch.zeros(ids.shape[0], embedding.shape[1], dtype=dtype, device=embedding.device)
    for token, weight, use in zip(ids.where(used & known, 0).T, weights.T, used.T, strict=True):
        out += torch.where(use[:, None], weight[:, None].to(dtype) * embedding[token].to(dtype), 0)
    return out.to(embedding.dtype)


def mix_embeddings_grad_embedding_reference(
    grad: Tensor, embedding: Tensor, ids: Tensor, weights: Tensor, padding_id: int | None = None
) -> Tensor:
    """The dense gradient [V, d] from grad [n, d]. Ids out of range are ignored."""
    dtype, size, rows = compute_dtype(embedding), embedding.shape[0], None
    used = _used(ids, weights, padding_id) & within(ids, size)
    tokens = ids.where(used, 0)
    if dtype != embedding.dtype:  # the float32 sums take memory only for the rows that occur
        rows, tokens = tokens.unique(return_inverse=True)
        size = rows.shape[0]
    total = torch.zeros(size, embedding.shape[1], dtype=dtype, device=embedding.device)
    grad = grad.to(dtype)
    for token, weight, use in zip(tokens.T, weights.T, used.T, strict=True):
        if bool(use.all()):
            total.index_add_(0, token, weight[:, None].to(dtype) * grad)
        else:
            total.index_add_(0, token[use], weight[use, None].to(dtype) * grad[use])
    if rows is None:
        return total
    dense = torch.zeros(embedding.shape, dtype=embedding.dtype, device=embedding.device)
    return dense.index_copy_(0, rows, total.to(embedding.dtype))


def mix_embeddings_grad_weights_reference(
    grad: Tensor, embedding: Tensor, ids: Tensor, weights: Tensor, padding_id: int | None = None
) -> Tensor:
    """The gradient [n, k] from grad [n, d], in the dtype of the weights. Ids out of range get 0."""
    dtype = compute_dtype(embedding)
    known = within(ids, embedding.shape[0])
    if padding_id is not None:
        known &= ids != padding_id
    columns = [(grad.to(dtype) * embedding[token].to(dtype)).sum(-1) for token in ids.where(known, 0).T]
    return torch.where(known, torch.stack(columns, dim=1), 0).contiguous().to(weights.dtype)


def _used(ids: Tensor, weights: Tensor, padding_id: int | None) -> Tensor:
    """bool [n, k]: the candidates that are part of the mix. A weight of 0 adds nothing, whatever its row holds."""
    return weights != 0 if padding_id is None else (weights != 0) & (ids != padding_id)


def _require_candidates_in_range(ids: Tensor, size: int, padding_id: int | None) -> None:
    if ids.device.type == "cpu":
        require_ids_in_range(ids if padding_id is None else ids[ids != padding_id], size, "ids")


# CPU form: faster than the oracle, and tested against it like the kernels -----------------------------------------


def mix_embeddings_cpu(embedding: Tensor, ids: Tensor, weights: Tensor, padding_id: int | None = None) -> Tensor:
    """The mix as torch's embedding_bag over the candidates that count.

    embedding_bag takes weights of the table's dtype only. A float32 weight is the sum of three bfloat16 weights, so a
    bfloat16 row is taken three times, out of the cache, and added up in float32. The range of float16 is too short for
    this: float16 rows are converted, one block of positions at a time. So are the rows of a table that is not
    contiguous.
    """
    used = None if padding_id is None and bool(weights.all()) else _used(ids, weights, padding_id)
    weights = weights.to(compute_dtype(embedding))
    if embedding.is_contiguous() and embedding.dtype != torch.float16 and used is None:
        try:
            return _bag(embedding, ids, weights, used)
        except RuntimeError:  # embedding_bag checks every id itself, but its error does not name our argument
            _require_candidates_in_range(ids, embedding.shape[0], padding_id)
            raise
    _require_candidates_in_range(ids, embedding.shape[0], padding_id)
    if embedding.is_contiguous() and embedding.dtype != torch.float16:
        return _bag(embedding, ids, weights, used)
    out = torch.empty(ids.shape[0], embedding.shape[1], dtype=embedding.dtype, device="cpu")
    for start in range(0, ids.shape[0], _CPU_BLOCK):
        block = slice(start, start + _CPU_BLOCK)
        rows = embedding.index_select(0, ids[block].clamp(0, embedding.shape[0] - 1).reshape(-1)).to(weights.dtype)
        local = torch.arange(rows.shape[0], device="cpu").view(ids[block].shape)
        out[block] = _bag(rows, local, weights[block], None if used is None else used[block])
    return out


def mix_embeddings_grad_weights_cpu(
    grad: Tensor, embedding: Tensor, ids: Tensor, weights: Tensor, padding_id: int | None = None
) -> Tensor:
    """The dot products [n, k] of gradient and rows, one block of positions at a time."""
    dtype, (n, k) = compute_dtype(embedding), ids.shape
    known = None if padding_id is None else ids != padding_id
    rows = ids if known is None else ids.where(known, 0)
    out = torch.empty(n, k, dtype=dtype, device="cpu")
    for start in range(0, n, _CPU_BLOCK):
        block = slice(start, start + _CPU_BLOCK)
        candidates = embedding.index_select(0, rows[block].reshape(-1)).to(dtype).view(-1, k, embedding.shape[1])
        torch.sum(candidates.mul_(grad[block, None].to(dtype)), dim=-1, out=out[block])
    return (out if known is None else out.mul_(known)).to(weights.dtype)


def _bag(table: Tensor, ids: Tensor, weights: Tensor, used: Tensor | None) -> Tensor:
    """embedding_bag of the candidates in `used`; None: of all candidates."""
    if used is None and table.dtype != torch.bfloat16:
        return embedding_bag(ids, table, mode="sum", per_sample_weights=weights)
    sizes = None
    if used is not None:
        sizes, ids, weights = used.sum(1), ids[used][:, None], weights[used][:, None]
    terms = _bfloat16_terms(weights) if table.dtype == torch.bfloat16 else weights[..., None]
    entries = ids[..., None].expand(terms.shape).flatten(1)
    if sizes is None:
        return embedding_bag(entries, table, mode="sum", per_sample_weights=terms.flatten(1))
    offsets = (sizes.cumsum(0) - sizes) * terms.shape[-1]
    return embedding_bag(entries.flatten(), table, offsets, mode="sum", per_sample_weights=terms.flatten())


def _bfloat16_terms(weights: Tensor) -> Tensor:
    """[..., 3] bfloat16 whose sum is the float32 weight.

    All three have the sign of the weight and none is 0, so that an infinite entry of the table stays infinite. A term
    for which nothing is left of the weight is 1e-30 of the weight (for weights above 1e-8).
    """
    high = _truncated(weights)
    rest = weights - high
    middle = _truncated(rest)
    least = weights * 1e-30
    return torch.stack((high, middle + least, (rest - middle) + least), dim=-1).to(torch.bfloat16)


def _truncated(x: Tensor) -> Tensor:
    """The leading 8 bits of each float32. They are truncated, not rounded, so that the remainder has the same sign."""
    return (x.view(torch.int32) & -0x10000).view(torch.float32)
