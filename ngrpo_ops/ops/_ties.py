"""The tie rule: of equal scores, and of equal logits, the lower id comes first."""

from __future__ import annotations

import torch
from torch import Tensor


def ranked(ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """ids and scores [Q, n] of each row best first, equal scores by the lower id."""
    ids, order = ids.sort(dim=1)
    scores, rank = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return ids.gather(1, rank), scores


def best_pairs(rows: Tensor, columns: Tensor, scores: Tensor, count: int, k: int) -> tuple[Tensor, Tensor]:
    """The k best pairs of each of `count` rows, equal scores by the lower column. Every row must have k pairs.

    Args:
        rows, columns, scores: [n], the pairs.

    Returns:
        columns and scores [count, k], best first.
    """
    order = torch.argsort(columns, stable=True)
    order = order[torch.argsort(scores[order], descending=True, stable=True)]
    order = order[torch.argsort(rows[order], stable=True)]
    starts = torch.searchsorted(rows[order], torch.arange(count, device=rows.device))
    best = order[starts[:, None] + torch.arange(k, device=rows.device)]
    return columns[best], scores[best]


def likeliest(logits: Tensor, n: int) -> Tensor:
    """ids [B, n] of the largest logits, largest first, equal ones by the lower id.

    Where a row has fewer than n tokens above -inf, the first id stands for those that are missing.
    """
    first = logits.argmax(-1, keepdim=True)
    found = [first]
    rest = logits
    for _ in range(n - 1):
        rest = rest.scatter(-1, found[-1], -torch.inf)
        best, token = rest.max(-1, keepdim=True)
        found.append(torch.where(best == -torch.inf, first, token))
    return torch.cat(found, dim=-1)


def largest_mask(logits: Tensor, ordered: Tensor, count: Tensor) -> Tensor:
    """bool [B, V]: the `count` largest logits of each row, equal ones by the lower id.

    Args:
        logits: [B, V].
        ordered: the logits in descending order, at least the largest `count` of them.
        count: int64 [B, 1], at least 1.
    """
    last = ordered.gather(-1, count - 1)
    tied = logits == last
    quota = count - (ordered > last).sum(-1, keepdim=True)
    return (logits > last) | (tied & (tied.cumsum(-1, dtype=torch.int32) <= quota))
