"""The neighbor table of an embedding: built once, then refreshed after weight updates with as little work as can be
proven to be enough."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from ...config import Metric
from .._checks import (
    require_choice,
    require_embedding,
    require_ids,
    require_ids_in_range,
    require_mask,
    require_same_device,
    require_table,
)
from .._library import choose_backend
from .api import require_enough_allowed
from .drift import Drift, exclude_movers
from .row_hashes import equal_rows, row_hashes
from .scores import ScoredRows
from .search import Progress, SearchResult, default_num_candidates, search
from .sharded import Rounds, local_rows

# Above this fraction, searching the rows one by one is no cheaper than a rebuild, which also renews the certificates.
_REBUILD_FRACTION = 0.5


@dataclass(frozen=True)
class RefreshReport:
    """What a refresh did.

    Attributes:
        certified: rows whose stored neighbors were proven to be the nearest still. Only these neighbors were scored.
        rescored: rows for which all stored candidates were scored, and proven to hold the nearest.
        recomputed: rows that were searched.
        movers: rows that moved so far that they were scored against every other row instead of being bounded.
        reason: the reason for this, in words.

    Examples:
        >>> import torch
        >>> from ngrpo_ops import NeighborTable
        >>> table = NeighborTable(1)
        >>> table.refresh(torch.eye(3))
        RefreshReport(certified=0, rescored=0, recomputed=3, movers=0, reason='first build')
    """

    certified: int
    rescored: int
    recomputed: int
    movers: int
    reason: str


@dataclass
class _Build:
    """What a full search found, for later certificates. Nothing here changes until the next full search.

    Attributes:
        layout: of the table that was searched.
        snapshot: the rows that were searched; of a sharded table those of this rank, as in the fields of [V] below.
        candidates: int32 [V, c], -1 where there are fewer; the first k + 1 are the nearest.
        next_scores: float32 [V]: no row outside the first k scored above it (-inf: there is no such row).
        bounds: float32 [V]: no row outside the candidates scored above it (-inf: there is no such row).
        class_next_scores, class_bounds: float32 [V]: likewise, but for rows equal to k of the first k and to k of the
            candidates. As long as these stay equal, the k that were found are the first of them. None: no two rows
            were equal.
        eligible: bool [V], the rows that may be neighbors; None: all.
        equal_to: int32 [V], the first row equal to each row; None: no two rows were equal.
    """

    layout: tuple[object, ...]
    snapshot: ScoredRows
    candidates: Tensor
    next_scores: Tensor
    bounds: Tensor
    class_next_scores: Tensor | None
    class_bounds: Tensor | None
    eligible: Tensor | None
    equal_to: Tensor | None

    @functools.cached_property
    def copies(self) -> Tensor:
        """int64, the rows that are equal to an earlier row."""
        assert self.equal_to is not None
        return (self.equal_to != torch.arange(len(self.equal_to), device=self.equal_to.device)).nonzero().squeeze(1)

    def present_bounds(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """`next_scores` and `bounds`, of classes where the rows equal to a candidate are equal in `embedding` too."""
        if self.equal_to is None or self.class_bounds is None or self.class_next_scores is None:
            return self.next_scores, self.bounds
        first = self.equal_to.long()
        differences = torch.zeros(len(first), dtype=torch.int32, device=first.device)
        for part in self.copies.split(self.snapshot.tile_size):
            apart = (embedding[part].float() != embedding[first[part]].float()).any(1)
            differences.index_add_(0, first[part], apart.int())
        differs = ((differences > 0)[first[self.candidates.clamp(min=0)]] & (self.candidates >= 0)).any(1)
        return (
            torch.where(differs, self.next_scores, self.class_next_scores),
            torch.where(differs, self.bounds, self.class_bounds),
        )


def _positions(mask: Tensor, count: int) -> Tensor:
    """int64 [count]: where a mask is True, in order. The count is known, so that a GPU is not waited for."""
    return (~mask).to(torch.uint8).argsort(stable=True)[:count]


def _layout(rounds: Rounds) -> tuple[object, ...]:
    """What must not change between a build and a refresh that is certified by it."""
    embedding = rounds.rows.embedding
    return tuple(rounds.counts), rounds.rank, embedding.shape, embedding.dtype, embedding.device


class NeighborTable:
    """The k nearest neighbors of every row of an embedding table, kept up to date while the embedding is trained.

    After `refresh`, ids and scores are always those of `nearest_neighbors` on the same embedding. Both score with the
    same routine, and whatever cannot be proven is searched. `refresh` compares the contents of the embedding, so it
    notices weights that were loaded or updated in place.

    A build stores the best `candidates` of each row, and the score that no other row reached. A refresh measures how
    far every row has moved since the build and bounds from that what a row outside the candidates can score now. A row
    whose k-th neighbor is strictly above this bound is certified without a search: first by scoring its k neighbors
    alone, against the score of the next; where that is too close, by scoring all its candidates, against the bound. A
    few rows that moved far are scored against every row. The remaining rows are searched, with their k-th score as a
    threshold to start from.

    Rows that are equal share one search. A refresh certifies them too, and zero rows, as long as they stay so.

    `ids` and `scores` stay where they are in memory while the shape of the embedding stays, so that a captured CUDA
    graph goes on reading the present neighbors. Tensors that were handed out earlier therefore change in a refresh.

    `nbytes` is the memory that the table keeps: the snapshot of the embedding and 12 k + 4 candidates + 16 bytes a row,
    2 more with `exclude_equal_rows`, and 12 more where rows are equal.

    Args:
        k: neighbors a row, at least 1.
        metric: "cosine", "dot", "l2" or "l1", as in `nearest_neighbors`.
        candidates: rows kept for the certificate, more than k; default 8 + 4 k.
        allowed: bool [V], rows that may be returned; None: all.
        exclude_equal_rows: whether rows with the values of another row are never returned, none of such a group. A
            table of tokens has such rows where they were never trained. They are looked for in every full search, and
            a row that was left out once stays out while the shape of the embedding stays. They have neighbors
            themselves. `equal_rows` says which they are.

    Raises:
        ValueError, TypeError: k < 1, candidates <= k, an unknown metric, an unusable mask.

    Examples:
        >>> import torch
        >>> from ngrpo_ops import NeighborTable
        >>> table = NeighborTable(1, metric="l2")
        >>> report = table.refresh(torch.tensor([[0.0], [1.0], [3.0], [3.5]]))
        >>> table.ids.tolist()
        [[1], [0], [3], [2]]
    """

    _excludes_equal_rows = "exclude_equal_rows=True"  # the setting's name in messages

    def __init__(
        self,
        k: int,
        *,
        metric: Metric = "cosine",
        candidates: int | None = None,
        allowed: Tensor | None = None,
        exclude_equal_rows: bool = False,
    ) -> None:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"k must be an integer of at least 1, got {k!r}")
        require_choice(metric, get_args(Metric), "metric")
        if candidates is None:
            candidates = default_num_candidates(k)
        if isinstance(candidates, bool) or not isinstance(candidates, int) or candidates <= k:
            raise ValueError(f"candidates must be an integer of more than k = {k}, got {candidates!r}")
        self.k = k
        self.metric = metric
        self.candidates = candidates
        if isinstance(allowed, Tensor) and allowed.is_meta:
            raise ValueError("allowed must have values, got a tensor on device meta")
        self.allowed = allowed.clone() if isinstance(allowed, Tensor) else allowed  # the caller may change it
        self.exclude_equal_rows = exclude_equal_rows
        self._equal_rows: Tensor | None = None
        self._ids: Tensor | None = None
        self._scores: Tensor | None = None
        self._build: _Build | None = None
        self._checked: int | None = None  # the rows of the embedding for which `allowed` was checked

    @property
    def ids(self) -> Tensor:
        """int64 [V, k], nearest first. A refresh writes to the same memory. RuntimeError before the first `refresh`."""
        return self._filled(self._ids)

    @property
    def scores(self) -> Tensor:
        """float32 [V, k], larger is nearer. A refresh writes to the same memory. RuntimeError before the first."""
        return self._filled(self._scores)

    @property
    def equal_rows(self) -> Tensor | None:
        """bool [V], rows left out since another row has had their values; None: without `exclude_equal_rows`.

        Raises RuntimeError before the first `refresh`.
        """
        return self._filled(self._equal_rows) if self.exclude_equal_rows else None

    @property
    def nbytes(self) -> int:
        """Bytes of memory the table keeps, the snapshot of the embedding included."""
        stored = [self._ids, self._scores, self._equal_rows]
        if (build := self._build) is not None:
            rows = build.snapshot
            stored += [rows.embedding, rows.norms, rows.inverse_norms]
            stored += [build.eligible] if build.eligible is not self.allowed else []
            stored += [build.candidates, build.next_scores, build.bounds]
            stored += [build.class_next_scores, build.class_bounds, build.equal_to]
        return sum(x.numel() * x.element_size() for x in stored if x is not None)

    def lookup(self, token_ids: Tensor) -> Tensor:
        """The neighbors of the given tokens.

        Args:
            token_ids: int64 [...].

        Returns:
            int64 [..., k], nearest first.

        Raises:
            TypeError: token_ids that are not int64. ValueError: ids out of range (on the CPU), on another device than
                the table. RuntimeError: before the first `refresh`.

        Examples:
            >>> import torch
            >>> from ngrpo_ops import NeighborTable
            >>> table = NeighborTable(1, metric="l2")
            >>> report = table.refresh(torch.tensor([[0.0], [1.0], [3.0], [3.5]]))
            >>> table.lookup(torch.tensor([2, 0])).tolist()
            [[3], [1]]
        """
        require_ids(token_ids, "token_ids")
        ids = self.ids
        require_same_device("token_ids", token_ids, "the table", ids)
        require_ids_in_range(token_ids, ids.shape[0], "token_ids")
        return ids[token_ids]

    @staticmethod
    def _filled(stored: Tensor | None) -> Tensor:
        if stored is None:
            raise RuntimeError("the table is empty: call refresh(embedding) first")
        return stored

    @torch.no_grad()
    def refresh(
        self, embedding: Tensor, *, group: ProcessGroup | None = None, progress: Progress | None = None
    ) -> RefreshReport:
        """Brings the table up to date with an embedding [V, d].

        Args:
            embedding: floating point, finite. A shape, dtype or device that differs from the last one rebuilds the
                table. An embedding whose rows are sharded, as a DTensor or by `group` (see `nearest_neighbors`), stays
                where it is. Every rank makes the call, keeps what certifies its own rows, and gets all neighbors.
            group: the process group of a sharded embedding.
            progress: called with (rows searched, rows to search).

        Returns:
            A report of the rows that were certified, scored again and searched.

        Raises:
            TypeError, ValueError: as `nearest_neighbors`, k >= V among them, and too few rows not equal to another.

        Examples:
            >>> import torch
            >>> from ngrpo_ops import NeighborTable
            >>> embedding = torch.tensor([[0.0], [1.0], [3.0], [3.5]])
            >>> table = NeighborTable(1, metric="l2")
            >>> table.refresh(embedding).recomputed
            4
            >>> table.refresh(embedding + 1e-3).certified
            4
        """
        if isinstance(embedding, DTensor):
            embedding, group = local_rows(embedding)
        (require_embedding if group is None else require_table)(embedding)
        if embedding.is_meta:
            raise ValueError("embedding must have values, got a tensor on device meta")
        embedding = embedding.detach()
        backend = choose_backend(None, embedding)
        settings = (self.k, self.candidates)
        rounds = Rounds(embedding, self.metric, backend, group, settings, lambda v: self._check(v, embedding.device))
        build = self._build
        if build is None:
            reason = "first build"
        elif build.layout != _layout(rounds):
            reason = "another shape, dtype, device or sharding"
        else:
            reason = ""
        # All ranks do the same.
        if (rebuilding := rounds.sum(reason != "")) or build is None:
            return self._rebuild(rounds, reason or f"{rebuilding} ranks begin anew", progress)
        return self._update(rounds, build, progress)

    def _check(self, vocabulary: int, device: torch.device) -> None:
        """Checks the settings against the rows of a table."""
        if self.k >= vocabulary:
            raise ValueError(f"k must be below the {vocabulary} rows of the embedding, got {self.k}")
        if self.allowed is not None and (self._checked != vocabulary or self.allowed.device != device):
            require_mask(self.allowed, (vocabulary,), "allowed", "[V]")
            require_enough_allowed(self.allowed, self.k)
            self.allowed, self._checked = self.allowed.to(device), vocabulary

    def _update(self, rounds: Rounds, build: _Build, progress: Progress | None) -> RefreshReport:
        """Proves what can be proven from the build, and searches the other rows."""
        rows = rounds.rows
        all_rows = torch.arange(len(rows), device=rows.embedding.device)
        ids, scores = rounds.rescore(all_rows, build.candidates[:, : self.k].long())
        drift = Drift(build.snapshot, rows, rounds.largest)
        # To choose the movers, a lower bound of the k-th score is enough, as the k neighbors alone give it.
        next_scores, bounds = build.present_bounds(rows.embedding)
        tolerance = drift.tolerance(scores[:, -1], bounds)
        movement, is_mover = exclude_movers(rounds.gather(drift.moved), rounds.gather(tolerance))
        is_open = drift.tolerance(scores[:, -1], next_scores) <= movement
        is_open &= ~(build.snapshot.is_zero & rows.is_zero)  # the first rows are still its neighbors
        # Read together: a GPU is waited for once.
        facts = torch.stack([is_open.sum().double(), is_mover.sum().double(), movement[0]]).tolist()
        num_open, num_movers, max_movement = int(facts[0]), int(facts[1]), facts[2]
        open_in_all = rounds.sum(num_open)
        uncertified, count = all_rows[:0], 0
        if open_in_all:
            uncertified = _positions(is_open, num_open)
            rescored = rounds.rescore(uncertified, build.candidates[uncertified].long())
            ids[uncertified], scores[uncertified] = (x[:, : self.k] for x in rescored)
            is_open = (drift.tolerance(scores[:, -1], bounds) <= movement)[uncertified]
            num_open = int(is_open.sum())
            uncertified = uncertified[_positions(is_open, num_open)]
            count = rounds.sum(num_open)
        if count > _REBUILD_FRACTION * rounds.total:
            return self._rebuild(rounds, f"{count} rows moved too far to be certified", progress)
        if num_movers:
            proven = torch.ones_like(all_rows, dtype=torch.bool).index_fill_(0, uncertified, False)
            proven = _positions(proven, len(rows) - uncertified.numel())
            if build.eligible is not None:
                is_mover &= build.eligible
            ids[proven], scores[proven] = rounds.update_neighbors(proven, ids[proven], scores[proven], is_mover)
        if count:
            # The candidates and bounds found here are not stored: they would be of another version than the snapshot.
            ids[uncertified], scores[uncertified] = rounds.search(
                self.k, queries=uncertified, allowed=build.eligible, floor=scores[uncertified, -1], progress=progress
            )
        self._store(rounds.gather(ids), rounds.gather(scores))
        reason = f"compared with the last build, rows moved by up to {max_movement:.2g}"
        if num_movers:
            reason += f", and {num_movers} further"
        return RefreshReport(rounds.total - open_in_all, open_in_all - count, count, num_movers, reason)

    def _rebuild(self, rounds: Rounds, reason: str, progress: Progress | None) -> RefreshReport:
        equal = self._find_equal_rows(rounds)
        eligible = self._eligible(equal)
        snapshot = rounds.rows.snapshot()
        if rounds.group is None:
            # One neighbor more than asked for: its score bounds all rows after the k-th.
            found = search(snapshot, self.k + 1, self.candidates, allowed=eligible, progress=progress)
            candidates, scores, bounds = found.candidates, found.candidate_scores, found.bounds
        else:
            found = None
            candidates, scores = rounds.search(self.candidates, allowed=eligible, progress=progress)
            bounds = scores[:, -1].clone()
        next_scores = scores[:, self.k].clone()
        # Set together, after the search: an interrupted search leaves the table as it was.
        build = _Build(_layout(rounds), snapshot, candidates.int(), next_scores, bounds, None, None, eligible, None)
        if found is not None and found.equal_to is not None:
            build.class_next_scores = self._class_next_scores(found, found.equal_to, next_scores)
            build.class_bounds, build.equal_to = found.class_bounds, found.equal_to.int()
        ids, scores = rounds.gather(candidates[:, : self.k]), rounds.gather(scores[:, : self.k])
        self._build, self._equal_rows = build, equal
        self._store(ids.contiguous(), scores.contiguous())
        return RefreshReport(0, 0, rounds.total, 0, reason)

    def _class_next_scores(self, found: SearchResult, equal_to: Tensor, next_scores: Tensor) -> Tensor:
        """float32 [V]: no row outside the first k scored above it, but rows equal to all of them.

        The first k + 1 candidates were scored, and no candidate that was not is above them.
        """
        first = equal_to[found.candidates.clamp(min=0)]
        are_equal = (first[:, : self.k] == first[:, :1]).all(1)
        of_others = torch.where(first != first[:, :1], found.candidate_scores, -torch.inf).amax(1)
        return torch.where(are_equal, torch.maximum(of_others, found.class_bounds), next_scores)

    def _store(self, ids: Tensor, scores: Tensor) -> None:
        """Puts new neighbors in the place of the old ones."""
        for name, new in (("_ids", ids), ("_scores", scores)):
            old = getattr(self, name)
            if old is None or (old.shape, old.device) != (new.shape, new.device):
                setattr(self, name, new)
            else:
                with torch.inference_mode(old.is_inference()):
                    old.copy_(new)

    def _find_equal_rows(self, rounds: Rounds) -> Tensor | None:
        """bool [V], the rows equal to another row, now or in an earlier search; None: they are not to be left out."""
        if not self.exclude_equal_rows:
            return None
        embedding = rounds.rows.embedding
        hashed = rounds.group is not None
        equal = equal_rows(rounds.gather(row_hashes(embedding))) if hashed else rounds.rows.has_equal
        before = self._equal_rows
        # What trains some rows of a group alone must not bring the others back. An engine may also begin with
        # placeholder weights, so the first search is not the last.
        return equal if before is None or before.shape != equal.shape else equal | before.to(equal.device)

    def _eligible(self, equal: Tensor | None) -> Tensor | None:
        """bool [V], the rows that may be neighbors; None: all."""
        if equal is None:
            return self.allowed
        if self.allowed is None:
            eligible = ~equal
        else:
            require_mask(self.allowed, tuple(equal.shape), "allowed", "[V]")
            eligible = self.allowed.to(equal.device) & ~equal
        if (left := int(eligible.sum())) <= self.k < len(equal):
            raise ValueError(
                f"{self._excludes_equal_rows} must leave at least {self.k + 1} rows that may be neighbors, got {left}: "
                f"{int(equal.sum())} of {len(equal)} rows are equal to another row"
            )
        return eligible

    def state_dict(self) -> dict[str, Any]:
        """The table as tensors and plain values, for `torch.save`. A table that loads them needs no first build.

        Raises:
            RuntimeError: before the first `refresh`, and for a sharded embedding, of which each rank has a part.

        Examples:
            >>> import torch
            >>> from ngrpo_ops import NeighborTable
            >>> table = NeighborTable(1)
            >>> report = table.refresh(torch.eye(3))
            >>> sorted(table.state_dict())  # doctest: +NORMALIZE_WHITESPACE
            ['allowed', 'bounds', 'candidates', 'class_bounds', 'class_nexts', 'equal_rows', 'equal_to', 'ids', 'k',
             'metric', 'nexts', 'scores', 'snapshot']
        """
        build = self._build
        if build is None or len(build.snapshot) != len(self._filled(self._ids)):
            self._filled(self._ids)
            raise RuntimeError("a table of a sharded embedding has no state to keep: each rank has a part of it")
        return {
            "k": self.k,
            "metric": self.metric,
            "snapshot": build.snapshot.embedding,
            "candidates": build.candidates,
            "nexts": build.next_scores,  # the name in states that were saved before
            "bounds": build.bounds,
            "ids": self.ids.clone(),  # which the next refresh writes over
            "scores": self.scores.clone(),
            "allowed": self.allowed,
            "equal_rows": self._equal_rows,
            "equal_to": build.equal_to,
            "class_nexts": build.class_next_scores,
            "class_bounds": build.class_bounds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what `state_dict` returned for a table of the same k, metric and allowed rows.

        Raises:
            ValueError: another k, metric, mask or `exclude_equal_rows`, entries missing, shapes that do not fit.

        Examples:
            >>> import torch
            >>> from ngrpo_ops import NeighborTable
            >>> table, restored = NeighborTable(1), NeighborTable(1)
            >>> report = table.refresh(torch.eye(3))
            >>> restored.load_state_dict(table.state_dict())
            >>> restored.refresh(torch.eye(3)).recomputed == 3, torch.equal(restored.ids, table.ids)
            (False, True)
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
        equal = state.get("equal_rows")  # states of older versions have none
        if self.exclude_equal_rows != (equal is not None):
            raise ValueError(f"state must be of a table with exclude_equal_rows = {self.exclude_equal_rows}")
        v = state["snapshot"].shape[0]
        tails = {"candidates": None, "nexts": (), "bounds": (), "ids": (self.k,), "scores": (self.k,)}
        tails |= {name: () for name in ("equal_to", "class_nexts", "class_bounds") if state.get(name) is not None}
        for name, tail in tails.items():
            shape = tuple(state[name].shape)
            if shape[:1] != (v,) or (shape[1:] != tail if tail is not None else len(shape) != 2):
                raise ValueError(f"state[{name!r}] must be of {v} rows like the snapshot, got shape {shape}")
        # The certificates hold for these values, whatever the caller does with the state later.
        state = {name: value.clone() if isinstance(value, Tensor) else value for name, value in state.items()}
        equal = state.get("equal_rows")
        self.candidates = state["candidates"].shape[1]
        snapshot = ScoredRows(state["snapshot"], self.metric, backend=choose_backend(None, state["snapshot"]))
        self._equal_rows = equal
        classes = (state.get("class_nexts"), state.get("class_bounds"), self._eligible(equal), state.get("equal_to"))
        layout = ((v,), 0, snapshot.embedding.shape, snapshot.embedding.dtype, snapshot.embedding.device)
        self._build = _Build(layout, snapshot, state["candidates"], state["nexts"], state["bounds"], *classes)
        self._ids, self._scores = state["ids"], state["scores"]
