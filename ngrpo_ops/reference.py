"""Eager oracles: every operation in plain torch, correct in float64, on any device.

They are what the kernels are held to, and what runs where there is no kernel. Low-precision inputs are computed in
float32, float64 inputs in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .ops._checks import require_ids_in_range
from .ops._precision import ROW_BLOCK_ELEMENTS, compute_dtype

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


# Group advantages -------------------------------------------------------------------------------------------------


def require_offsets(offsets: Tensor, rows: int) -> None:
    """On an accelerator nothing is read beyond the rewards, and rows in no group get 0."""
    if offsets.device.type != "cpu":
        return
    if int(offsets[0]) != 0 or int(offsets[-1]) != rows or bool((offsets.diff() < 0).any()):
        raise ValueError(f"offsets must go from 0 to N = {rows} and never fall, got {offsets.tolist()}")


class _Groups:
    """Sums within groups of consecutive rows: equal ones as [groups, size, columns], others by each row's group."""

    def __init__(self, rewards: Tensor, order: Tensor | None, offsets: Tensor | None, group_size: int) -> None:
        self.order, self.shape = order, rewards.shape
        self.equal = offsets is None
        if offsets is None:
            self.count, self.size = rewards.shape[0] // group_size, group_size
        else:
            self.count = offsets.shape[0] - 1
            require_offsets(offsets, rewards.shape[0])
            rows = torch.arange(rewards.shape[0], device=offsets.device)
            self.index = torch.searchsorted(offsets, rows, right=True) - 1
            self.inside = within(self.index, self.count)
            self.index.clamp_(0, self.count - 1)

    def arrange(self, x: Tensor) -> Tensor:
        x = x if self.order is None else x[self.order]
        return x.reshape(self.count, self.size, -1) if self.equal else x

    def restore(self, x: Tensor) -> Tensor:
        x = x.reshape(self.shape).contiguous()
        return x if self.order is None else torch.empty_like(x).index_copy_(0, self.order, x)

    def sum(self, x: Tensor) -> Tensor:
        """A row a group."""
        if self.equal:
            return x.sum(1, keepdim=True)
        return x.new_zeros(self.count, x.shape[1]).index_add_(0, self.index, x)

    def max(self, x: Tensor) -> Tensor:
        if self.equal:
            return x.amax(1, keepdim=True)
        index = self.index[:, None].expand(x.shape)
        return x.new_full((self.count, x.shape[1]), -torch.inf).scatter_reduce_(0, index, x, "amax")

    def rows(self, of_groups: Tensor) -> Tensor:
        """Each row its group's value."""
        return of_groups if self.equal else of_groups[self.index]


class _GroupStatistics(NamedTuple):
    """What forward and backward share: of the rows weight, x - mean, numerator; of the groups the rest."""

    weight: Tensor
    centered: Tensor
    numerator: Tensor
    factor: Tensor
    total_weight: Tensor
    single: Tensor
    spread: Tensor
    divisor: Tensor


def _group_statistics(
    groups: _Groups, rewards: Tensor, weights: Tensor | None, baseline: str, scale: str, ddof: int, eps: float,
    singles: str, omit_nan: bool,
) -> _GroupStatistics:  # fmt: skip
    dtype = compute_dtype(rewards)
    x = groups.arrange(rewards).to(dtype)
    w = torch.ones_like(x) if weights is None else groups.arrange(weights[:, None]).to(dtype).expand(x.shape)
    if omit_nan:
        w = torch.where(x.isnan(), 0, w)
    if not groups.equal:
        w = torch.where(groups.inside[:, None], w, 0)
    counted = w != 0
    x = torch.where(counted, x, 0)
    total, members = groups.sum(w), groups.sum(counted.to(dtype))
    single = members == 1
    # Measured from the group's largest reward, so that equal rewards are centred to exactly 0.
    top = groups.max(torch.where(counted, x, -torch.inf))
    top = torch.where(top == -torch.inf, 0, top)
    shifted = torch.where(counted, x - groups.rows(top), 0)
    mean = groups.sum(w * shifted) / total.clamp(min=1)
    centered = torch.where(counted, shifted - groups.rows(mean), 0)
    if scale == "std":
        spread = (groups.sum(w * centered.square()) / (total - ddof).clamp(min=1)).sqrt()
    else:
        spread = top + mean if scale == "mean" else torch.ones_like(mean)
    divisor = spread if scale == "none" else spread + eps
    if baseline != "none" or scale == "std":
        divisor = torch.where(members > 1, divisor, 0)
    keep = singles == "keep" and (baseline != "none" or scale == "std")
    if keep:
        divisor = torch.where(single, 1 + (0 if scale == "none" else eps), divisor)
    factor = torch.ones_like(w)
    if baseline == "leave_one_out":
        whole = groups.rows(total)
        rest = whole - w
        factor = torch.where(groups.rows(members > 1) & (rest != 0), whole / torch.where(rest != 0, rest, 1), 1)
    numerator = x if baseline == "none" else centered * factor
    if keep:
        numerator = torch.where(groups.rows(single), x, numerator)
    return _GroupStatistics(w, centered, numerator, factor, total, single, spread, divisor)


def group_advantages(
    rewards: Tensor, weights: Tensor | None, order: Tensor | None, offsets: Tensor | None, group_size: int,
    baseline: str, scale: str, ddof: int, eps: float, singles: str, omit_nan: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """rewards [n, columns], weights [n]; groups are runs of `group_size` rows, or of `offsets`, taken through `order`.
    Advantages as `rewards`, and each group's spread [groups, columns].

    With c = x - mean, W the sum of the weights and w a row's own: the numerator is c ("mean"), c W / (W - w), which is
    x - (the others' mean) ("leave_one_out"), or x ("none"); the spread is sqrt(sum w c^2 / max(W - ddof, 1)) or the
    mean; the advantage is numerator / (spread + eps). A group without spread gives 0, and one of a single row 0
    ("zero"), its reward over 1 + eps ("keep") or NaN ("nan").
    """
    groups = _Groups(rewards, order, offsets, group_size)
    s = _group_statistics(groups, rewards, weights, baseline, scale, ddof, eps, singles, omit_nan)
    divisor = groups.rows(s.divisor)
    out = torch.where((s.weight != 0) & (divisor != 0), s.numerator / torch.where(divisor != 0, divisor, 1), 0)
    if singles == "nan":
        out = torch.where((s.weight != 0) & groups.rows(s.single), torch.nan, out)
    return groups.restore(out).to(rewards.dtype), s.spread.reshape(groups.count, -1)


def group_advantages_backward(
    grad: Tensor, grad_spread: Tensor, rewards: Tensor, weights: Tensor | None, order: Tensor | None,
    offsets: Tensor | None, group_size: int, baseline: str, scale: str, ddof: int, eps: float, singles: str,
    omit_nan: bool,
) -> Tensor:  # fmt: skip
    groups = _Groups(rewards, order, offsets, group_size)
    s = _group_statistics(groups, rewards, weights, baseline, scale, ddof, eps, singles, omit_nan)
    divisor = groups.rows(s.divisor)
    usable, safe = (s.weight != 0) & (divisor != 0), torch.where(divisor != 0, divisor, 1)
    direct = torch.where(usable, groups.arrange(grad).to(s.weight.dtype) * s.factor / safe, 0)
    sum_direct = groups.sum(direct)
    to_divisor = -groups.sum(torch.where(direct != 0, direct * (s.numerator / s.factor) / safe, 0))
    if singles == "keep" and (baseline != "none" or scale == "std"):  # neither a mean nor a spread of its own
        sum_direct = torch.where(s.single, 0, sum_direct)
        to_divisor = torch.where(s.single, 0, to_divisor)
    to_spread = to_divisor + grad_spread.reshape(to_divisor.shape)
    share = 1 / s.total_weight.clamp(min=1)
    out = direct
    if baseline != "none":
        out = out - s.weight * groups.rows(sum_direct * share)
    if scale == "std":
        # A spread of zero passes nothing on: its one-sided derivative is no gradient.
        slope = to_spread / ((s.total_weight - ddof).clamp(min=1) * torch.where(s.spread > 0, s.spread, 1))
        out = out + s.weight * s.centered * groups.rows(torch.where(s.spread > 0, slope, 0))
    elif scale == "mean":
        out = out + s.weight * groups.rows(to_spread * share)
    return groups.restore(torch.where(s.weight != 0, out, 0)).to(rewards.dtype)


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
