"""CPU forms that are faster than the oracles of `reference` and held to them like the kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .ops._precision import compute_dtype
from .reference import counted, require_candidates_in_range

_BLOCK = 256  # positions whose float32 rows stay in cache


def mix_embeddings(embedding: Tensor, ids: Tensor, weights: Tensor, padding_id: int | None) -> Tensor:
    """torch's embedding_bag over the candidates that count.

    It wants the weights in the table's dtype. A float32 weight is three bfloat16 ones, so a bfloat16 row is taken three
    times, from the cache, and added up in float32. float16's range is too short for that: its rows are converted, a
    block of positions at a time, and so are those of a table that is not contiguous.
    """
    used = None if padding_id is None and bool(weights.all()) else counted(ids, weights, padding_id)
    weights = weights.to(compute_dtype(embedding))
    if embedding.is_contiguous() and embedding.dtype != torch.float16 and used is None:
        try:
            return _bag(embedding, ids, weights, used)
        except RuntimeError:  # it has looked at every id; ours names the argument
            require_candidates_in_range(ids, embedding.shape[0], padding_id)
            raise
    require_candidates_in_range(ids, embedding.shape[0], padding_id)
    if embedding.is_contiguous() and embedding.dtype != torch.float16:
        return _bag(embedding, ids, weights, used)
    out = torch.empty(ids.shape[0], embedding.shape[1], dtype=embedding.dtype)
    for start in range(0, ids.shape[0], _BLOCK):
        block = slice(start, start + _BLOCK)
        rows = embedding.index_select(0, ids[block].clamp(0, embedding.shape[0] - 1).reshape(-1)).to(weights.dtype)
        local = torch.arange(rows.shape[0]).view(ids[block].shape)
        out[block] = _bag(rows, local, weights[block], None if used is None else used[block])
    return out


def mix_embeddings_grad_weights(
    grad: Tensor, embedding: Tensor, ids: Tensor, weights: Tensor, padding_id: int | None
) -> Tensor:
    """[n, k] dot products, a block of positions at a time."""
    dtype, (n, k) = compute_dtype(embedding), ids.shape
    known = None if padding_id is None else ids != padding_id
    rows = ids if known is None else ids.where(known, 0)
    out = torch.empty(n, k, dtype=dtype)
    for start in range(0, n, _BLOCK):
        block = slice(start, start + _BLOCK)
        candidates = embedding.index_select(0, rows[block].reshape(-1)).to(dtype).view(-1, k, embedding.shape[1])
        torch.sum(candidates.mul_(grad[block, None].to(dtype)), dim=-1, out=out[block])
    return (out if known is None else out.mul_(known)).to(weights.dtype)


def _bag(table: Tensor, ids: Tensor, weights: Tensor, used: Tensor | None) -> Tensor:
    """`used` None: every candidate counts."""
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
    """[..., 3] bfloat16 whose sum is the float32 weight. All have its sign and none is 0, so that an infinite entry of
    the table stays one: where there is nothing left of a weight, the term is 1e-30 of it (of weights above 1e-8)."""
    high = _cut(weights)
    rest = weights - high
    middle = _cut(rest)
    least = weights * 1e-30
    return torch.stack((high, middle + least, (rest - middle) + least), dim=-1).to(torch.bfloat16)


def _cut(x: Tensor) -> Tensor:
    """The first 8 bits of each float32, cut and not rounded: what is left over has the same sign."""
    return (x.view(torch.int32) & -0x10000).view(torch.float32)
