"""The neighbour table of an embedding: built once, refreshed after weight updates for as little as can be proven."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from .config import Metric
from .functional import nearest_neighbors
from .ops._checks import require_choice, require_embedding, require_ids, require_mask
from .ops._library import choose_backend
from .ops._ties import ranked
from .reference import require_enough_allowed
from .scoring import ScoredRows
from .search import Progress, improve, rescore, search, usual_candidates

# Recomputing more rows than this share one by one is no cheaper than a rebuild, which also restores the certificates.
_REBUILD_SHARE = 0.5
_ROWS_AT_ONCE = 2**14  # re-scored together


@dataclass(frozen=True)
class RefreshReport:
    """What a refresh did.

    Attributes:
        certified: rows whose stored neighbours were proven to be the nearest still; only those were scored again.
        rescored: rows for which all stored candidates had to be scored again, and were proven to hold the nearest.
        recomputed: rows searched anew.
        movers: rows that moved so far that they were scored against every other instead of being bounded.
        reason: why, in words.
    """

    certified: int
    rescored: int
    recomputed: int
    movers: int
    reason: str


@dataclass
class _Build:
    """What a full search found, for later certificates. Nothing here changes until the next one.

    candidates int32 [V, c], -1 where there are fewer; the first k + 1 are the nearest. Outside the first k no row
    scored above nexts [V], outside the candidates none above bounds [V] (float32, -inf: there is no such row).
    """

    snapshot: ScoredRows
    candidates: Tensor
    nexts: Tensor
    bounds: Tensor


class NeighborTable:
    """The k nearest neighbours of every row of an embedding table, kept up to date as the table is trained.

    After `refresh` ids and scores are those of `nearest_neighbors` on the same embedding, always: both score with the
    same routine, and whatever cannot be proven is searched again. `refresh` goes by the contents of the embedding, so
    weights loaded or updated in place are noticed.

    A build stores for each row its best `candidates` rows and the score that no other row reached. Rows move by
    delta_i from there (in the metric's norm; for cosine the normalised rows), by `far` at most but for a few movers,
    which are scored against every row. A row outside the candidates then scores at most

        cosine   bound_i + delta_i + far + delta_i far
        dot      bound_i + delta_i norm_max + (|x_i| + delta_i) far
        l1, l2   -max(0, distance_i - delta_i - far), squared for l2

    plus the rounding of both scores. A row whose k-th neighbour is strictly above that is certified without a search:
    first with the k neighbours alone, scored again, against the score of the next; where that is too close, with all
    candidates against the bound. What is left is searched, with the k-th score as a threshold to start from.

    `nbytes` is the memory it keeps: the snapshot of the embedding and 12 k + 4 candidates + 16 bytes a row.

    Args:
        k: neighbours a row, at least 1.
        metric: "cosine", "dot", "l2" or "l1", as in `nearest_neighbors`.
        candidates: rows kept for the certificate, more than k; default 8 + 4 k.
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
        if candidates is None:
            candidates = usual_candidates(k)
        if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates <= k:
            raise ValueError(f"candidates must be an integer of more than k = {k}, got {candidates!r}")
        self.k = k
        self.metric = metric
        self.candidates = candidates
        self.allowed = allowed
        self._ids: Tensor | None = None
        self._scores: Tensor | None = None
        self._build: _Build | None = None

    @property
    def ids(self) -> Tensor:
        """int64 [V, k], nearest first. Raises RuntimeError before the first `refresh`."""
        return self._filled(self._ids)

    @property
    def scores(self) -> Tensor:
        """float32 [V, k], larger is nearer. Raises RuntimeError before the first `refresh`."""
        return self._filled(self._scores)

    @property
    def nbytes(self) -> int:
        """Bytes of memory the table keeps, the snapshot of the embedding included."""
        stored = [self._ids, self._scores]
        if (build := self._build) is not None:
            rows = build.snapshot
            stored += [rows.embedding, rows.norms, rows.inverse_norms, build.candidates, build.nexts, build.bounds]
        return sum(x.numel() * x.element_size() for x in stored if x is not None)

    def lookup(self, token_ids: Tensor) -> Tensor:
        """int64 [..., k]: the neighbours of the given tokens. Raises TypeError unless they are int64."""
        require_ids(token_ids, "token_ids")
        return self.ids[token_ids]

    @staticmethod
    def _filled(stored: Tensor | None) -> Tensor:
        if stored is None:
            raise RuntimeError("the table is empty: call refresh(embedding) first")
        return stored

    @torch.no_grad()
    def refresh(
        self, embedding: Tensor, *, group: ProcessGroup | None = None, progress: Progress | None = None
    ) -> RefreshReport:
        """Bring the table up to date with an embedding [V, d].

        Args:
            embedding: floating point, finite. Another shape, dtype or device than before rebuilds the table. One whose
                rows are sharded, as a DTensor or by `group` (see `nearest_neighbors`), is searched where it is, by
                every rank, and anew each time: its certificates would need the rows of other ranks.
            group: the process group of a sharded embedding.
            progress: called with (rows searched, rows to search).

        Raises:
            TypeError, ValueError: as `nearest_neighbors`, k >= V among them.
        """
        if group is not None or isinstance(embedding, DTensor):
            whole = nearest_neighbors(
                embedding, self.k, metric=self.metric, allowed=self.allowed, group=group, progress=progress
            )
            self._ids, self._scores, self._build = whole.ids, whole.scores, None
            return RefreshReport(0, 0, len(whole.ids), 0, "searched in shards")
        require_embedding(embedding)
        vocabulary = embedding.shape[0]
        if self.k >= vocabulary:
            raise ValueError(f"k must be below the {vocabulary} rows of the embedding, got {self.k}")
        if self.allowed is not None:
            require_mask(self.allowed, (vocabulary,), "allowed", "[V]")
            require_enough_allowed(self.allowed, self.k)
            self.allowed = self.allowed.to(embedding.device)
        embedding = embedding.detach()
        build = self._build
        if build is None:
            return self._rebuild(embedding, "first build", progress)
        was = build.snapshot.embedding
        if (embedding.shape, embedding.dtype, embedding.device) != (was.shape, was.dtype, was.device):
            return self._rebuild(embedding, "another shape, dtype or device", progress)
        rows = ScoredRows(embedding, self.metric, backend=choose_backend(None, embedding))
        every = torch.arange(vocabulary, device=embedding.device)
        stored = build.candidates[:, : self.k].long()
        ids, scores = ranked(stored, rows.pair_scores(every[:, None].expand_as(stored), rows, stored))
        drift = _Drift(build.snapshot, rows)
        # Rows not certified yet: first by their k neighbours, then by all candidates. A bound of the k-th score is all
        # that choosing the movers needs.
        far, movers = drift.without_movers(drift.tolerance(scores[:, -1], build.bounds))
        left = (drift.tolerance(scores[:, -1], build.nexts) <= far).nonzero().squeeze(1)
        certified = vocabulary - left.numel()
        for part in left.split(_ROWS_AT_ONCE) if left.numel() else ():
            found, values = rescore(rows, part, build.candidates[part].long())
            ids[part], scores[part] = found[:, : self.k], values[:, : self.k]
        left = left[drift.tolerance(scores[:, -1], build.bounds)[left] <= far]
        if left.numel() > _REBUILD_SHARE * vocabulary:
            return self._rebuild(embedding, f"{left.numel()} rows moved too far to be certified", progress)
        rescored = vocabulary - certified - left.numel()
        if movers.numel():
            kept = torch.ones_like(every, dtype=torch.bool).index_fill_(0, left, False).nonzero().squeeze(1)
            mask = torch.zeros_like(every, dtype=torch.bool).index_fill_(0, movers, True)
            if self.allowed is not None:
                mask &= self.allowed
            ids[kept], scores[kept] = improve(rows, kept, ids[kept], scores[kept], allowed=mask)
        if left.numel():
            # Their candidates and bounds stay those of the build: a bound is worth nothing against another snapshot.
            found_anew = search(
                rows,
                self.k,
                self.candidates,
                queries=left,
                allowed=self.allowed,
                floor=scores[left, -1],
                progress=progress,
            )
            ids[left], scores[left] = found_anew.ids, found_anew.scores
        self._ids, self._scores = ids, scores
        reason = f"compared with the last build, rows moved by up to {far:.2g}"
        if movers.numel():
            reason += f", and {movers.numel()} further"
        return RefreshReport(certified, rescored, left.numel(), movers.numel(), reason)

    def _rebuild(self, embedding: Tensor, reason: str, progress: Progress | None) -> RefreshReport:
        snapshot = ScoredRows(embedding.clone(), self.metric, backend=choose_backend(None, embedding))
        available = len(snapshot) if self.allowed is None else int(self.allowed.sum())
        # One neighbour more than asked for: its score is the bound of all that follow.
        wanted = min(self.k + 1, available - 1)
        found = search(snapshot, wanted, self.candidates, allowed=self.allowed, progress=progress)
        if wanted > self.k:
            nexts = found.scores[:, self.k].clone()
        elif self.allowed is None:
            nexts = torch.full_like(found.bounds, -torch.inf)
        else:  # a row that is not allowed itself has one neighbour more than the others
            nexts = torch.where(self.allowed, -torch.inf, found.scores[:, -1])
        # Set together, and only once the search is through: an interrupted one leaves the table as it was.
        self._build = _Build(snapshot, found.candidates.int(), nexts, found.bounds)
        self._ids, self._scores = found.ids[:, : self.k].contiguous(), found.scores[:, : self.k].contiguous()
        return RefreshReport(0, 0, embedding.shape[0], 0, reason)

    def state_dict(self) -> dict[str, Any]:
        """The table as tensors and plain values, for `torch.save`; loading it back saves the first build.

        Raises:
            RuntimeError: before the first `refresh`, and after one in shards, which stores nothing for later ones.
        """
        build = self._build
        if build is None:
            self._filled(self._ids)
            raise RuntimeError("a table searched in shards has no state to keep: its refreshes search anew")
        return {
            "k": self.k,
            "metric": self.metric,
            "snapshot": build.snapshot.embedding,
            "candidates": build.candidates,
            "nexts": build.nexts,
            "bounds": build.bounds,
            "ids": self.ids,
            "scores": self.scores,
            "allowed": self.allowed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what `state_dict` returned for a table of the same k, metric and allowed rows.

        Raises:
            ValueError: another k, metric or mask, entries missing, shapes that do not fit.
        """
        names = ("k", "metric", "snapshot", "candidates", "nexts", "bounds", "ids", "scores", "allowed")
        if missing := [name for name in names if name not in state]:
            raise ValueError(f"state must be what state_dict returned, got one without {', '.join(missing)}")
        for name in ("k", "metric"):
            if state[name] != getattr(self, name):
                raise ValueError(f"state must be of a table with {name} = {getattr(self, name)!r}, got {state[name]!r}")
        same = self.allowed is state["allowed"] is None
        if self.allowed is not None and state["allowed"] is not None:
            same = torch.equal(self.allowed.cpu(), state["allowed"].cpu())
        if not same:
            raise ValueError("state must be of a table with the same allowed rows")
        v = state["snapshot"].shape[0]
        for name, tail in {
            "candidates": None,
            "nexts": (),
            "bounds": (),
            "ids": (self.k,),
            "scores": (self.k,),
        }.items():
            shape = tuple(state[name].shape)
            if shape[:1] != (v,) or (shape[1:] != tail if tail is not None else len(shape) != 2):
                raise ValueError(f"state[{name!r}] must be of {v} rows like the snapshot, got shape {shape}")
        self.candidates = state["candidates"].shape[1]
        self._build = _Build(
            ScoredRows(state["snapshot"], self.metric, backend=choose_backend(None, state["snapshot"])),
            state["candidates"],
            state["nexts"],
            state["bounds"],
        )
        self._ids, self._scores = state["ids"], state["scores"]


class _Drift:
    """How far rows moved since a snapshot, and what that allows to conclude."""

    def __init__(self, old: ScoredRows, new: ScoredRows) -> None:
        self.metric = new.metric
        d = new.embedding.shape[1]
        order = 1 if self.metric == "l1" else 2
        moved = torch.cat([torch.linalg.vector_norm(new[t] - old[t], order, dim=1) for t in new.tiles()]).double()
        # The rounding of difference and norm, and squares that underflow.
        roundoff = 2.0**-24 * (d + 8)
        self.moved = moved * (1.0 + roundoff) + d * 2.0**-62
        self.norms = torch.maximum(old.norms, new.norms).double()
        self.relative = 3.3 * (d + 16) * 2.0**-24
        self.underflow = 2.0 * (d + 16) * torch.finfo(torch.float32).smallest_normal

    def tolerance(self, kth: Tensor, bounds: Tensor) -> Tensor:
        """float64 [V]: rows not counted in `bounds` score strictly below the k-th if they moved by less than this."""
        kth, bounds, moved, norms = kth.double(), bounds.double(), self.moved, self.norms
        longest = norms.max()
        if self.metric == "cosine":
            tolerance = (kth - bounds - moved - self.relative - self.underflow) / (1.0 + moved)
        elif self.metric == "dot":
            rounding = self.relative * norms * longest + self.underflow
            tolerance = (kth - bounds - moved * longest - rounding) / (norms + moved).clamp(min=1e-300)
        elif self.metric == "l2":
            rounding = self.relative * (norms + longest).square() + self.underflow
            tolerance = (-bounds).clamp(min=0).sqrt() - moved - (rounding - kth).clamp(min=0).sqrt()
        else:
            tolerance = -bounds * (1.0 - self.relative) - moved + kth - self.underflow
        tolerance -= 1e-12 * tolerance.abs()  # the rounding of these lines
        return torch.where(bounds == -torch.inf, torch.inf, tolerance)

    def without_movers(self, tolerance: Tensor) -> tuple[float, Tensor]:
        """The largest movement but for that of the movers, and those: the few that so leave fewest rows to search."""
        order = self.moved.argsort(descending=True)
        counts = torch.tensor([0, *(2**i for i in range((len(order) // 8).bit_length()))], device=order.device)
        far = self.moved[order[counts]]
        # Searching the open rows and scoring the movers against every row take the same time a row.
        open_rows = torch.searchsorted(tolerance.sort().values, far, right=True)
        best = int((counts + open_rows).argmin())
        return float(far[best]), order[: int(counts[best])]
