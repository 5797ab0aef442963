"""Eager oracles: every operation in plain torch, correct in float64, on any device.

They are what the kernels are held to, and what runs where there is no kernel. Low-precision inputs are computed in
float32, float64 inputs in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import Metric
from .random import bernoulli, philox, uniform
from .search import Progress, ScoredRows, search

_ROW_BLOCK_ELEMENTS = 2**24  # logits handled at a time where a float32 copy is needed


def compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _row_blocks(logits: Tensor) -> list[slice]:
    size = max(1, _ROW_BLOCK_ELEMENTS // logits.shape[1])
    return [slice(start, start + size) for start in range(0, logits.shape[0], size)]


def _require_ids_in_range(ids: Tensor, size: int, name: str) -> None:
    # On an accelerator the indexing itself asserts; a check here would make the host wait.
    if ids.device.type == "cpu" and ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= size):
        raise ValueError(f"{name} must be within [0, {size}), got values from {int(ids.min())} to {int(ids.max())}")


# Nearest neighbours -----------------------------------------------------------------------------------------------


def nearest_neighbors(
    embedding: Tensor,
    k: int,
    metric: Metric,
    queries: Tensor | None,
    allowed: Tensor | None,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """The tiled search of `search`, which the brute force of `every_score` holds to account in the tests."""
    if queries is not None:
        _require_ids_in_range(queries, embedding.shape[0], "queries")
    if allowed is not None:
        require_enough_allowed(allowed, k)
    found = search(
        ScoredRows(embedding, metric), k, max(16, 2 * k), queries=queries, allowed=allowed, progress=progress
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


def mix_embeddings(embedding: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    _require_ids_in_range(ids, embedding.shape[0], "ids")
    dtype = compute_dtype(embedding)
    out = torch.zeros(*ids.shape[:-1], embedding.shape[1], dtype=dtype, device=embedding.device)
    for c in range(ids.shape[-1]):
        out += weights[..., c, None].to(dtype) * embedding[ids[..., c]].to(dtype)
    return out.to(embedding.dtype)


def mix_embeddings_grad_embedding(grad: Tensor, embedding: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    dtype = compute_dtype(embedding)
    out = torch.zeros(embedding.shape, dtype=dtype, device=embedding.device)
    grad = grad.reshape(-1, embedding.shape[1]).to(dtype)
    for c in range(ids.shape[-1]):
        out.index_add_(0, ids[..., c].reshape(-1), weights[..., c].reshape(-1, 1).to(dtype) * grad)
    return out.to(embedding.dtype)


def mix_embeddings_grad_weights(grad: Tensor, embedding: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    dtype = compute_dtype(embedding)
    columns = [(grad.to(dtype) * embedding[ids[..., c]].to(dtype)).sum(-1) for c in range(ids.shape[-1])]
    return torch.stack(columns, dim=-1).to(weights.dtype)


# Decode step ------------------------------------------------------------------------------------------------------


def candidate_weights(logits: Tensor, ids: Tensor, temperature: float, variant: str = "paper") -> Tensor:
    scaled = logits.to(compute_dtype(logits)) / temperature
    if variant == "released":
        scaled = scaled.softmax(-1)
    return scaled.gather(-1, ids).softmax(-1)


def neighbor_candidates(logits: Tensor, neighbor_ids: Tensor) -> Tensor:
    """[B, k]: the anchor, the lowest id among equal maxima, and its neighbours (equations 6 to 8)."""
    anchor = logits.argmax(-1)
    return torch.cat([anchor[:, None], neighbor_ids[anchor]], dim=1)


def filter_logits(scaled: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """-inf for what top-k, then top-p, cut off; equal logits are kept by the lower id."""
    if top_k is None and top_p is None:
        return scaled
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[:, top_k:] = -torch.inf
    if top_p is not None:
        probabilities = ordered.softmax(-1)
        mass_before = probabilities.cumsum(-1) - probabilities
        keep = mass_before < top_p
        keep[:, 0] = True
        ordered = ordered.masked_fill(~keep, -torch.inf)
    return torch.empty_like(scaled).scatter_(1, order, ordered)


def sample(scaled: Tensor, u: Tensor) -> Tensor:
    """Inverse cumulative distribution: the token at which the mass, in id order, first exceeds u times the total."""
    mass = (scaled.double() - scaled.amax(-1, keepdim=True)).exp()
    cumulative = mass.cumsum(-1)
    token = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True).squeeze(1)
    # u * total may round up to the total: the last token of non-zero probability ends the range.
    last = scaled.shape[1] - 1 - (mass > 0).flip(-1).to(torch.uint8).argmax(-1)
    return torch.minimum(token, last)


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
    word, high, low, _ = philox(seed, row_ids, step)
    gate = bernoulli(word, mixing_rate)
    _require_ids_in_range(neighbor_ids, logits.shape[1], "neighbor_ids")
    ids = neighbor_candidates(logits, neighbor_ids)
    weights = candidate_weights(logits, ids, temperature, variant).float()
    scaled = logits.to(compute_dtype(logits)) / temperature
    sampled = sample(filter_logits(scaled, top_k, top_p), uniform(high, low))
    token_ids = torch.where(gate, ids[:, 0], sampled)
    mixed = mix_embeddings(embedding, ids, weights)
    embeddings = torch.where(gate[:, None], mixed, embedding[token_ids])
    logprobs = scaled.log_softmax(-1).gather(1, token_ids[:, None]).squeeze(1).float()
    return token_ids, gate, ids, weights, embeddings, logprobs


# Group advantages -------------------------------------------------------------------------------------------------


def _group_statistics(
    rewards: Tensor, group_ids: Tensor, baseline: str, scale: str, ddof: int, eps: float, mask: Tensor | None
) -> tuple[Tensor, ...]:
    """Everything forward and backward share, spread over the rows: valid, factor, centered, spread, divisor, count.

    advantage = factor * centered / divisor, where factor is 1, or n / (n - 1) for the leave-one-out baseline:
    r - (sum - r) / (n - 1) = n / (n - 1) (r - mean). A group without spread, or of one, has factor 0.
    """
    dtype = compute_dtype(rewards)
    valid = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    values = torch.where(valid, rewards, 0).to(dtype)
    _, group = group_ids.unique(return_inverse=True)
    groups = int(group.max()) + 1

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(groups).index_add_(0, group, torch.where(valid, x, 0))[group]

    count = total(torch.ones_like(values))
    # Measured from the group's largest reward, so that equal rewards are centred to exactly 0.
    top = values.new_full((groups,), -torch.inf)
    top = top.scatter_reduce_(0, group, torch.where(valid, values, -torch.inf), "amax")[group]
    shifted = torch.where(valid, values - top, 0)
    mean = total(shifted) / count.clamp(min=1)
    centered = torch.where(valid, shifted - mean, 0)
    if scale == "std":
        spread = (total(centered.square()) / (count - ddof).clamp(min=1)).sqrt()
    elif scale == "batch_std":
        overall = _batch_centered(values, valid)
        spread = (overall.square().sum() / (valid.sum() - ddof).clamp(min=1)).sqrt().expand_as(values)
    elif scale == "mean":
        spread = torch.where(valid, top + mean, 0)
    else:
        spread = torch.ones_like(values)
    divisor = spread if scale == "none" else spread + eps
    usable = valid & (count > 1) & (divisor != 0)
    factor = count / (count - 1).clamp(min=1) if baseline == "leave_one_out" else torch.ones_like(count)
    return valid, torch.where(usable, factor, 0), centered, spread, torch.where(usable, divisor, 1), count


def _batch_centered(values: Tensor, valid: Tensor) -> Tensor:
    shifted = values - torch.where(valid, values, -torch.inf).max()  # as within the groups: no cancellation
    return torch.where(valid, shifted - shifted[valid].mean(), 0)


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    baseline: str,
    scale: str,
    ddof: int,
    eps: float,
    mask: Tensor | None,
) -> Tensor:
    _, factor, centered, _, divisor, _ = _group_statistics(rewards, group_ids, baseline, scale, ddof, eps, mask)
    return (factor * centered / divisor).to(rewards.dtype)


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
    valid, factor, centered, spread, divisor, count = _group_statistics(
        rewards, group_ids, baseline, scale, ddof, eps, mask
    )
    _, group = group_ids.unique(return_inverse=True)

    def total(x: Tensor) -> Tensor:
        return x.new_zeros(int(group.max()) + 1).index_add_(0, group, x)[group]

    grad = torch.where(valid, grad, 0).to(centered.dtype)
    direct = grad * factor / divisor
    out = torch.where(valid, direct - total(direct) / count.clamp(min=1), 0)
    # What reaches the divisor; a spread of zero passes none (the one-sided derivative is not a gradient).
    to_divisor = -direct * centered / divisor
    if scale == "std":
        slope = torch.where(spread > 0, centered / ((count - ddof).clamp(min=1) * spread), 0)
        out = out + total(to_divisor) * slope
    elif scale == "batch_std":
        overall = _batch_centered(torch.where(valid, rewards, 0).to(centered.dtype), valid)
        slope = torch.where(spread > 0, overall / ((valid.sum() - ddof).clamp(min=1) * spread), 0)
        out = out + to_divisor.sum() * slope
    elif scale == "mean":
        out = out + torch.where(valid, total(to_divisor) / count.clamp(min=1), 0)
    return out.to(rewards.dtype)


# Selective log-softmax --------------------------------------------------------------------------------------------


def selective_log_softmax(logits: Tensor, ids: Tensor, temperature: float, entropy: bool) -> tuple[Tensor, Tensor]:
    _require_ids_in_range(ids, logits.shape[1], "ids")
    dtype = compute_dtype(logits)
    logprobs = torch.empty(ids.shape, dtype=dtype, device=logits.device)
    entropies = torch.empty(logits.shape[0] if entropy else 0, dtype=dtype, device=logits.device)
    for rows in _row_blocks(logits):
        log_p = (logits[rows].to(dtype) / temperature).log_softmax(-1)
        logprobs[rows] = log_p.gather(1, ids[rows])
        if entropy:
            entropies[rows] = -_p_log_p(log_p).sum(-1)
    return logprobs, entropies


def selective_log_softmax_backward(
    grad: Tensor, grad_entropy: Tensor, logits: Tensor, ids: Tensor, temperature: float, entropy: bool
) -> Tensor:
    dtype = compute_dtype(logits)
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for rows in _row_blocks(logits):
        log_p = (logits[rows].to(dtype) / temperature).log_softmax(-1)
        p = log_p.exp()
        block = p * -grad[rows].to(dtype).sum(-1, keepdim=True)
        block.scatter_add_(1, ids[rows], grad[rows].to(dtype))
        if entropy:
            p_log_p = _p_log_p(log_p)
            slope = p_log_p - p * p_log_p.sum(-1, keepdim=True)
            block -= grad_entropy[rows, None].to(dtype) * slope
        out[rows] = (block / temperature).to(logits.dtype)
    return out


def _p_log_p(log_p: Tensor) -> Tensor:
    return torch.where(log_p > -torch.inf, log_p.exp() * log_p, 0)
