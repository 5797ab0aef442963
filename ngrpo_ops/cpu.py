"""CPU forms that are faster than the oracles of `reference` and held to them like the kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .reference import compute_dtype, counted, require_candidates_in_range

_BLOCK = 256  # positions whose float32 rows stay in cache


def mix_embeddings(embedding: Tensor, ids: Tensor, weights: Tensor, padding_id: int | None) -> Tensor:
    """torch's embedding_bag over the candidates that count.

    It wants the weights in the table's dtype. A float32 weight is three bfloat16 ones, so a bfloat16 row is taken three
    times, from the cache, and added up in float32. float16's range is too short for that: its rows are converted, a
    block of positions at a time, and so are those of a table that is not contiguous.
    """
    require_candidates_in_range(ids, embedding.shape[0], padding_id)
    used = counted(ids, weights, padding_id)
    weights = weights.to(compute_dtype(embedding))
    if embedding.is_contiguous() and embedding.dtype != torch.float16:
        return _bag(embedding, ids, weights, used)
    out = torch.empty(ids.shape[0], embedding.shape[1], dtype=embedding.dtype)
    for start in range(0, ids.shape[0], _BLOCK):
        block = slice(start, start + _BLOCK)
        here = used[block]
        rows = embedding.index_select(0, ids[block][here]).to(weights.dtype)
        local = torch.zeros_like(ids[block])
        local[here] = torch.arange(rows.shape[0])
        out[block] = _bag(rows, local, weights[block], here)
    return out


def _bag(table: Tensor, ids: Tensor, weights: Tensor, used: Tensor) -> Tensor:
    if bool(used.all()):
        sizes = None
    else:
        sizes, ids, weights = used.sum(1), ids[used][:, None], weights[used][:, None]
    terms = _bfloat16_terms(weights) if table.dtype == torch.bfloat16 else weights[..., None]
    entries = ids[..., None].expand(terms.shape).reshape(-1)
    if sizes is None:
        offsets = torch.arange(0, entries.shape[0], ids.shape[1] * terms.shape[-1])
    else:
        offsets = (sizes.cumsum(0) - sizes) * terms.shape[-1]
    return embedding_bag(entries, table, offsets, mode="sum", per_sample_weights=terms.reshape(-1))


def _bfloat16_terms(weights: Tensor) -> Tensor:
    """[..., 3] bfloat16 of the sign of each float32 weight, whose sum is the weight. None is 0: 0 times an infinite
    entry of the table would be NaN."""
    bits = weights.view(torch.int32)
    high = (bits & -0x10000).view(torch.float32)  # cut, not rounded: what is left has the same sign
    high = torch.where(weights.isfinite(), high, weights)
    rest = torch.where(weights.isfinite(), weights - high, 0.0)
    middle = (rest.view(torch.int32) & -0x10000).view(torch.float32)
    terms = torch.stack((high, middle, rest - middle), dim=-1).to(torch.bfloat16)
    least = torch.finfo(torch.bfloat16).smallest_normal
    return torch.where(terms == 0, torch.copysign(torch.full_like(terms, least), terms[..., :1]), terms)
