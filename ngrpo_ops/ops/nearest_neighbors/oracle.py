"""The oracle of the search: all pairs, in float64, from the formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from ...config import Metric


def brute_force_scores(embedding: Tensor, metric: Metric) -> Tensor:
    """Scores of all pairs of rows, [V, V] float64 with -inf on the diagonal. For small V only.

    Args:
        embedding: [V, d].
        metric: "cosine" (a zero row has score 0 with every row), "dot", "l2" (negative squared distance) or "l1"
            (negative distance).
    """
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
