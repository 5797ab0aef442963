"""The neighbour table of an embedding: built once, refreshed after weight updates for as little as can be proven."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from .config import Metric
from .reference import require_enough_allowed
from .search import Progress, ScoredRows, SearchResult, rescore, search
from .validation import require_choice, require_embedding, require_ids, require_mask

# Recomputing more rows than this share one by one is no cheaper than a rebuild, which also restores the certificates.
_REBUILD_SHARE = 0.5


@dataclass(frozen=True)
class RefreshReport:
    """What a refresh did: rows whose stored candidates were proven to hold the answer, rows searched anew, and why."""

    certified: int
    recomputed: int
    reason: str


class NeighborTable:
    """The k nearest neighbours of every row of an embedding table, kept up to date as the table is trained.

    After `refresh` the ids are those of `nearest_neighbors` on the same embedding, always: both re-score with the same
    routine. For each row the table keeps the best `candidates` rows of a full search and a bound on the score of every
    row outside them. When training has moved the rows by delta_i (from the snapshot of that search), a row outside
    scores at most

        cosine   bound_i + delta_i + delta_max + delta_i delta_max      (delta: of the normalised rows)
        dot      bound_i + delta_i norm_max + |x_i| delta_max
        l1, l2   -max(0, distance_i - delta_i - delta_max), squared for l2

    plus the rounding of the re-scored value; a row whose k-th candidate is strictly above that is certified without a
    search. Memory beyond the embedding: its snapshot, and 8 (k + candidates) + 4 (k + 1) bytes a row.

    Args:
        k: neighbours a row, at least 1.
        metric: "cosine", "dot", "l2" or "l1", as in `nearest_neighbors`.
        candidates: rows re-scored at a refresh, more than k; default max(16, 2 k).
        allowed: bool [V], rows that may be returned; None: all.

    Raises:
        ValueError, TypeError: k < 1, candidates <= k, an unknown metric, an unusable mask.
    """

    def __init__(
        self, k: int, *, metric: Metric = "cosine", candidates: int | None = None, allowed: Tensor | None = None
    ) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k must be an integer of at least 1, got {k!r}")
        require_choice(metric, get_args(Metric), "metric")
        self.k = k
        self.metric = metric
        self.candidates = max(16, 2 * k) if candidates is None else candidates
        if self.candidates <= k:
            raise ValueError(f"candidates must be more than k = {k}, got {candidates}")
        self.allowed = allowed
        self._result: SearchResult | None = None
        self._snapshot: ScoredRows | None = None

    @property
    def ids(self) -> Tensor:
        """int64 [V, k], nearest first. Raises RuntimeError before the first `refresh`."""
        return self._built().ids

    @property
    def scores(self) -> Tensor:
        """float32 [V, k], larger is nearer. Raises RuntimeError before the first `refresh`."""
        return self._built().scores

    def lookup(self, token_ids: Tensor) -> Tensor:
        """int64 [..., k]: the neighbours of the given tokens. Raises TypeError unless they are int64."""
        require_ids(token_ids, "token_ids")
        return self._built().ids[token_ids]

    def _built(self) -> SearchResult:
        if self._result is None:
            raise RuntimeError("the table is empty: call refresh(embedding) first")
        return self._result

    @torch.no_grad()
    def refresh(self, embedding: Tensor, *, progress: Progress | None = None) -> RefreshReport:
        """Bring the table up to date with an embedding [V, d].

        Args:
            embedding: floating point, finite. Another shape, dtype or device than before rebuilds the table.
            progress: called with (rows searched, rows to search).

        Raises:
            TypeError, ValueError: as `nearest_neighbors`, k >= V among them.
        """
        require_embedding(embedding)
        vocabulary = embedding.shape[0]
        if self.k >= vocabulary:
            raise ValueError(f"k must be below the {vocabulary} rows of the embedding, got {self.k}")
        if self.allowed is not None:
            require_mask(self.allowed, (vocabulary,), "allowed", "[V]")
            require_enough_allowed(self.allowed, self.k)
            self.allowed = self.allowed.to(embedding.device)
        embedding = embedding.detach()
        old = self._snapshot
        if old is None or self._result is None:
            return self._rebuild(embedding, "first build", progress)
        now, was = embedding, old.embedding
        if (now.shape, now.dtype, now.device) != (was.shape, was.dtype, was.device):
            return self._rebuild(embedding, "another shape, dtype or device", progress)
        rows = ScoredRows(embedding, self.metric)
        every = torch.arange(vocabulary, device=embedding.device)
        ids, scores = rescore(rows, every, self._result.candidates, self.k)
        open_rows = (scores[:, -1] <= self._outside(old, rows)).nonzero().squeeze(1)
        if open_rows.numel() > _REBUILD_SHARE * vocabulary:
            return self._rebuild(embedding, f"{open_rows.numel()} rows moved too far to be certified", progress)
        if open_rows.numel():
            found = search(rows, self.k, self.candidates, queries=open_rows, allowed=self.allowed, progress=progress)
            # Their candidates and bounds stay those of the snapshot: a bound is worth nothing against another one.
            ids[open_rows], scores[open_rows] = found.ids, found.scores
        self._result.ids, self._result.scores = ids, scores
        return RefreshReport(vocabulary - open_rows.numel(), open_rows.numel(), "certified against the last build")

    def _rebuild(self, embedding: Tensor, reason: str, progress: Progress | None) -> RefreshReport:
        snapshot = ScoredRows(embedding.clone(), self.metric)
        # Set together, and only once the search is through: an interrupted one leaves the table as it was.
        self._result = search(snapshot, self.k, self.candidates, allowed=self.allowed, progress=progress)
        self._snapshot = snapshot
        return RefreshReport(0, embedding.shape[0], reason)

    def _outside(self, old: ScoredRows, new: ScoredRows) -> Tensor:
        """float32 [V]: no row outside a row's candidates has a re-scored value above this."""
        bounds = self._built().bounds.double()
        order = 1 if self.metric == "l1" else 2
        moved = torch.cat([(new[t].double() - old[t].double()).norm(p=order, dim=1) for t in new.tiles()])
        moved *= 1.0 + 1e-6  # the rounding of the difference itself
        far, norms = moved.max(), new.norms.double()
        longest = norms.max()
        if self.metric == "cosine":
            outside = bounds + moved + far + moved * far
            rounding = torch.ones_like(norms)
        elif self.metric == "dot":
            outside = bounds + moved * longest + (norms + moved) * far
            rounding = norms * longest
        else:
            distance = -bounds if self.metric == "l1" else (-bounds).clamp(min=0).sqrt()
            distance = (distance - moved - far).clamp(min=0)
            outside = -distance if self.metric == "l1" else -distance.square()
            rounding = distance if self.metric == "l1" else (norms + longest).square()
        return (
            (outside + new.slack() * rounding + new.underflow())
            .float()
            .nextafter(torch.full_like(bounds, torch.inf).float())
        )
