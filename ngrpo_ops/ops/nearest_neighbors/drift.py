"""How far rows have moved since a snapshot, and which stored neighbors are proven to be the nearest still."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._library import load_kernels
from .bounds import distance_upper_bound, rounding_error, underflow_error
from .scores import ScoredRows


class Drift:
    """The movement of every row between two versions of an embedding.

    Row i moves by delta_i, in the norm of the metric; for cosine the normalized rows move. A row that is not counted in
    a bound, and moves by at most m, afterwards scores with row i at most

        cosine   bound_i + delta_i + m + delta_i m
        dot      bound_i + delta_i norm_max + (|x_i| + delta_i) m
        l1, l2   -max(0, distance_i - delta_i - m), squared for l2, where distance_i is that of the bound

    plus the rounding of both scores. `tolerance` solves this for m.

    Args:
        old, new: the rows, or those of this rank.
        largest: the largest of the values of all ranks.
    """

    def __init__(self, old: ScoredRows, new: ScoredRows, largest: Callable[[Tensor], Tensor]) -> None:
        self.metric = new.metric
        d = new.embedding.shape[1]
        if new.backend == "triton":
            moved = load_kernels("nearest_neighbors_rows").row_movements(
                old.embedding, old.inverse_norms, new.embedding, new.inverse_norms, self.metric
            )
        else:
            order = 1 if self.metric == "l1" else 2
            parts = [torch.linalg.vector_norm(new[t] - old[t], order, dim=1) for t in new.tiles()]
            moved = torch.cat([new.norms[:0], *parts])
        self.moved = distance_upper_bound(moved.double(), d)
        self.norms = torch.maximum(old.norms, new.norms).double()
        self.longest = largest(self.norms)
        self.rounding = rounding_error(d)
        self.underflow = underflow_error(d)

    def tolerance(self, kth: Tensor, bounds: Tensor) -> Tensor:
        """How far all other rows may move.

        Args:
            kth: float32 [V], the present k-th score of each row.
            bounds: float32 [V]: in the old version, no row outside a set of each row's own scored above it (-inf: there
                is no such row).

        Returns:
            float64 [V]: the rows outside the set score strictly below the k-th if they moved by less than this.
        """
        kth, bounds, moved, norms = kth.double(), bounds.double(), self.moved, self.norms
        longest = self.longest
        if self.metric == "cosine":
            tolerance = (kth - bounds - moved - self.rounding - self.underflow) / (1.0 + moved)
        elif self.metric == "dot":
            rounding = self.rounding * norms * longest + self.underflow
            tolerance = (kth - bounds - moved * longest - rounding) / (norms + moved).clamp(min=1e-300)
        elif self.metric == "l2":
            rounding = self.rounding * (norms + longest).square() + self.underflow
            tolerance = (-bounds).clamp(min=0).sqrt() - moved - (rounding - kth).clamp(min=0).sqrt()
        else:
            tolerance = -bounds * (1.0 - self.rounding) - moved + kth - self.underflow
        tolerance -= 1e-12 * tolerance.abs()  # the float64 rounding of the lines above
        return torch.where(bounds == -torch.inf, torch.inf, tolerance)


def exclude_movers(moved: Tensor, tolerance: Tensor) -> tuple[Tensor, Tensor]:
    """Chooses the few rows that moved far and are better scored against every row than bounded.

    Args:
        moved, tolerance: float64 [V], of all rows.

    Returns:
        The largest movement of the other rows, float64 [1], and bool [V], the chosen ones. Their number, 0 or a power
        of two of at most V / 8, leaves the least work.
    """
    v = len(moved)
    order = moved.argsort(descending=True, stable=True)
    # 0, 1, 2, 4, ...: made where they are needed, since a copy from the host would wait for a GPU.
    counts = (1 << torch.arange((v // 8).bit_length() + 1, device=order.device)) // 2
    movement = moved[order[counts]]
    # Searching a row that is not certified takes as long as scoring a mover against every row.
    uncertified = torch.searchsorted(tolerance.sort().values, movement, right=True)
    best = (counts + uncertified).argmin(0, keepdim=True)
    is_mover = torch.empty(v, dtype=torch.bool, device=order.device)
    is_mover[order] = torch.arange(v, device=order.device) < counts[best]
    return movement[best], is_mover
