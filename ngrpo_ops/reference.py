"""Eager oracles: every operation in plain torch, correct in float64, on any device.

They are what the kernels are held to, and what runs where there is no kernel. Low-precision inputs are computed in
float32, float64 inputs in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .config import Metric
from .ops._checks import require_ids_in_range
from .ops._precision import ROW_BLOCK_ELEMENTS, compute_dtype
from .scoring import ScoredRows
from .search import Progress, search, usual_candidates

# Nearest neighbours -----------------------------------------------------------------------------------------------


def nearest_neighbors(
    embedding: Tensor,
    k: int,
    metric: Metric,
    queries: Tensor | None,
    allowed: Tensor | None,
    backend: str,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """The tiled search of `search`, which the brute force of `every_score` holds to account in the tests."""
    if queries is not None:
        require_ids_in_range(queries, embedding.shape[0], "queries")
    if allowed is not None:
        require_enough_allowed(allowed, k)
    found = search(
        ScoredRows(embedding, metric, backend=backend),
        k,
        usual_candidates(k),
        queries=queries,
        allowed=allowed,
        progress=progress,
    )
    return found.ids, found.scores


def require_enough_allowed(allowed: Tensor, k: int) -> None:
    if int(allowed.sum()) <= k:
        raise ValueError(f"allowed must have at least k + 1 = {k + 1} True rows, got {int(allowed.sum())}")


def every_score(embedding: Tensor, metric: Metric) -> Tensor:
    """The oracle of the search: [V, V] scores in float64, the diagonal -inf. For small V only."""
    x = embedding.double()
    if metric == "cosine":
        norms = x.norm(dim=1, keepdim=True)
        x = torch.where(norms > 0, x / norms, 0.0)
    if metric in ("cosine", "dot"):
        scores = x @ x.T
    else:
        difference = x[:, None] - x[None]
        scores = -(difference.square().sum(-1) if metric == "l2" else difference.abs().sum(-1))
    return scores.fill_diagonal_(-torch.inf)


# Weighted mix -----------------------------------------------------------------------------------------------------


def counted(ids: Tensor, weights: Tensor, padding_id: int | None) -> Tensor:
    """Which candidates are part of the mix: a weight of 0 adds nothing, whatever is in its row."""
    return weights != 0 if padding_id is None else (weights != 0) & (ids != padding_id)


def within(ids: Tensor, size: int) -> Tensor:
    return (ids >= 0) & (ids < size)


def require_candidates_in_range(ids: Tensor, size: int, padding_id: int | None) -> None:
    if ids.device.type == "cpu":
        require_ids_in_range(ids if padding_id is None else ids[ids != padding_id], size, "ids")


def mix_embeddings(embedding: Tensor, ids: Tensor, weights: Tensor, padding_id: int | None = None) -> Tensor:
    """ids and weights [n, k]; on an accelerator an id out of range makes its position NaN."""
    require_candidates_in_range(ids, embedding.shape[0], padding_id)
    dtype, used, known = compute_dtype(embedding), counted(ids, weights, padding_id), within(ids, embedding.shape[0])
    weights = weights.where(known, torch.nan)
    out = torch.zeros(ids.shape[0], embedding.shape[1], dtype=dtype, device=embedding.device)
    for token, weight, use in zip(ids.where(used & known, 0).T, weights.T, used.T, strict=True):
        out += torch.where(use[:, None], weight[:, None].to(dtype) * embedding[token].to(dtype), 0)
    return out.to(embedding.dtype)


def mix_embeddings_grad_embedding(
    grad: Tensor, embedding: Tensor, ids: Tensor, weights: Tensor, padding_id: int | None = None
) -> Tensor:
    dtype, size, rows = compute_dtype(embedding), embedding.shape[0], None
    used = counted(ids, weights, padding_id) & within(ids, size)
    tokens = ids.where(used, 0)
    if dtype != embedding.dtype:  # summed in float32, for the rows that occur alone
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


def mix_embeddings_grad_weights(
    grad: Tensor, embedding: Tensor, ids: Tensor, weights: Tensor, padding_id: int | None = None
) -> Tensor:
    dtype = compute_dtype(embedding)
    known = within(ids, embedding.shape[0])
    if padding_id is not None:
        known &= ids != padding_id
    columns = [(grad.to(dtype) * embedding[token].to(dtype)).sum(-1) for token in ids.where(known, 0).T]
    return torch.where(known, torch.stack(columns, dim=1), 0).contiguous().to(weights.dtype)


# Selective log-softmax --------------------------------------------------------------------------------------------


def selective_log_softmax(logits: Tensor, ids: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    """logits [b, t, V], ids [b t, k]: log-probabilities [b t, k], entropy [b t] (or empty)."""
    require_ids_in_range(ids, logits.shape[-1], "ids")
    dtype, known = compute_dtype(logits), within(ids, logits.shape[-1])
    ids = ids.where(known, 0)
    logprobs = torch.empty(ids.shape, dtype=dtype, device=logits.device)
    entropies = torch.empty(ids.shape[0] if entropy else 0, dtype=dtype, device=logits.device)
    for rows, _, log_p in _blocks(logits, temperature, log=True):
        logprobs[rows] = log_p.gather(1, ids[rows])
        if entropy:
            entropies[rows] = -_p_log_p(log_p).sum(-1)
    return logprobs.masked_fill_(~known, torch.nan), entropies


def selective_log_softmax_backward(
    grad: Tensor, grad_entropy: Tensor, logits: Tensor, ids: Tensor, temperature: float, entropy: bool, in_place: bool
) -> Tensor:
    dtype = compute_dtype(logits)
    out = logits if in_place else torch.empty_like(logits, memory_format=torch.contiguous_format)
    grad = grad.to(dtype) / temperature
    known = within(ids, logits.shape[-1])
    ids, of_ids = ids.where(known, 0), grad.where(known, 0)
    for rows, (i, where), block in _blocks(logits, temperature, log=entropy):
        if entropy:
            p, p_log_p = block.exp(), _p_log_p(block)
            of_entropy = grad_entropy[rows, None].to(dtype) / temperature
            of_entropy = of_entropy * (p_log_p - p * p_log_p.sum(-1, keepdim=True))
        else:
            p = block
        slope = p.mul_(-grad[rows].sum(-1, keepdim=True))
        slope.scatter_add_(1, ids[rows], of_ids[rows])
        if entropy:
            slope -= of_entropy
        out[i, where].copy_(slope)
    return out


def _blocks(logits: Tensor, temperature: float, log: bool) -> Iterator[tuple[slice, tuple[int, slice], Tensor]]:
    """The (log-)softmax of logits [b, t, V] / temperature, a cache's worth of rows at a time in the same memory: their
    numbers in [b t], their place in [b, t], and their (log-)probabilities, to be used before the next come."""
    b, t, v = logits.shape
    threads = torch.get_num_threads()
    size = -(-max(1, ROW_BLOCK_ELEMENTS // v) // threads) * threads  # as many rows for every thread
    scaled = torch.empty(min(size, t), v, dtype=compute_dtype(logits), device=logits.device)
    softmax = torch.log_softmax if log else torch.softmax
    for i in range(b):
        for start in range(0, t, size):
            where = slice(start, min(start + size, t))
            count = where.stop - start
            if logits.dtype == scaled.dtype:
                torch.div(logits[i, where], temperature, out=scaled[:count])
            else:  # converted first, so that the division is not in bfloat16
                scaled[:count].copy_(logits[i, where]).div_(temperature)
            softmax(scaled[:count], -1, out=scaled[:count])  # a row's statistics are complete before it is written
            yield slice(i * t + start, i * t + where.stop), (i, where), scaled[:count]


def _p_log_p(log_p: Tensor) -> Tensor:
    return torch.where(log_p == -torch.inf, 0, log_p.exp() * log_p)
