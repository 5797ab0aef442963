"""The scan by the kernels, in which the host never waits for the GPU.

As in `candidates`, a pair is kept if its upper bound reaches its query's threshold, and a threshold is a proven lower
bound of the last score that is kept. The kernels compare and append; a tile of scores never leaves the chip. Every
query has a fixed number of places for its pairs, and between launches a kernel raises the thresholds and drops what no
longer reaches them. A query that runs out of places is lost: nothing is said of it, and it is searched otherwise.

How many pairs a query appends is known in advance, but for chance. Let its threshold be that of `kept` pairs among the
n columns seen so far, which are spread evenly over all. Then it takes about `kept` g of the next g n columns. So
columns come in bands that grow with those already seen, the first as wide as there are places.

Rows have roundoffs of their own. What the kernels compute is derived in kernels/nearest_neighbors_rows.py, and what
becomes of it in `keep_best`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .._library import load_kernels
from .._precision import has_matrix_units
from .bounds import rounding_error, underflow_error
from .candidates import Found, ScanSettings
from .scores import ScoredRows

KERNELS_FROM = 2**11  # columns: fewer are scored as fast in plain torch
_MOST_KEPT = 2**9  # columns kept of a query: ranking more takes longer than plain torch does
_PLACES_BYTES = 2**27  # of the places of all pairs, 8 bytes each
_MOST_PLACES = 2**10  # of a query, where that is enough
_SPARE_PLACES = 40  # of a query beside three times those that it keeps
_BLOCK_ROWS = 2**14  # rows that are multiplied with another block
_BLOCK_ELEMENTS = 2**24  # of such a block
_FINISHED_PLACES = 2**20  # places that are looked through at a time in the end


class FusedFound(NamedTuple):
    """What the kernels found of n queries.

    Attributes:
        found: as a scan returns it, but for the queries that are lost.
        is_lost: bool [n].
        reached: float32 [n], scores that k columns are known to reach, also of a query that is lost.
    """

    found: Found
    is_lost: Tensor
    reached: Tensor


class FusedCandidates:
    """`Candidates` of n queries, in a fixed number of places each.

    Args:
        scan: the scan.
        queries: row ids int64 [n].
        capacity: places of a query.
        thresholds: float32 [n]. -inf takes every pair, +inf none.
        by_position: whether a pair holds its column's position among the queries, and not its id.
    """

    def __init__(
        self, scan: FusedScan, queries: Tensor, capacity: int, thresholds: Tensor, *, by_position: bool
    ) -> None:
        self.scan, self.queries, self.thresholds, self.by_position = scan, queries, thresholds, by_position
        rows, columns = scan.rows, scan.columns
        assert rows.roundoffs is not None and columns.roundoffs is not None
        self.kth = thresholds.clone()
        self.is_far = torch.zeros_like(thresholds, dtype=torch.bool)
        self.pairs = scan.kernels.no_pairs(len(queries), capacity, queries.device)
        self.x = (rows.norms[queries], rows.roundoffs[queries])
        self.y = self.x if by_position else (columns.norms, columns.roundoffs)

    def part(self, span: slice) -> tuple[Tensor, ...]:
        """The places of some queries."""
        return self.scan.kernels.Pairs(*(x[span] for x in self.pairs))

    def tighten(self, span: slice) -> None:
        """Raises the thresholds of some queries, and drops the pairs that do not reach them."""
        scan = self.scan
        scan.kernels.keep_best(
            self.part(span), scan.rows.metric, self.thresholds[span], self.kth[span], self.is_far[span],
            *(x[span] for x in self.x), *self.y, k=scan.k, kept=scan.kept,
            rounding=scan.rounding, underflow=scan.underflow,
        )  # fmt: skip

    def start_again(self, own: Tensor) -> None:
        """Drops all pairs but those of the queries `own`, bool [n], with themselves. The thresholds stay."""
        self.pairs.counts.copy_(own)
        position = torch.arange(len(own), device=own.device)
        self.pairs.columns[:, 0] = position
        ids = torch.where(own, self.queries, -1)
        self.pairs.scores[:, 0] = self.scan.rows.pair_scores(self.queries, self.scan.columns, ids)

    def finish(self, is_shared: Tensor) -> FusedFound:
        """Scores the pairs that may be among the nearest.

        Args:
            is_shared: bool [n]: all columns of these queries are scored.
        """
        scan, (columns, values, counts) = self.scan, self.pairs
        n, capacity = columns.shape
        found = Found(
            torch.empty(n, scan.kept, dtype=torch.int64, device=columns.device),
            torch.empty(n, scan.kept, dtype=torch.float32, device=columns.device),
            torch.empty(n, dtype=torch.float32, device=columns.device),
        )
        place = torch.arange(capacity, device=columns.device)
        size = max(1, _FINISHED_PLACES // capacity)
        for start in range(0, n, size):
            span = slice(start, min(start + size, n))
            is_there = place < counts[span, None]
            ids = columns[span].long().masked_fill_(~is_there, 0)
            ids = self.queries[ids] if self.by_position else ids
            upper = values[span] * (1.0 - scan.rounding) if scan.rows.metric == "l1" else values[span]
            # Where the last kept pair cannot be among the k nearest, only those that can are scored.
            all_of = is_shared[span] if scan.kept > scan.k else torch.ones_like(is_shared[span])
            all_of = all_of | ~self.is_far[span]
            if scan.has_copies is not None:
                all_of = all_of | (scan.has_copies[ids] & is_there).any(1)
            is_scored = is_there & (all_of[:, None] | (upper >= self.kth[span, None]))
            queries = self.queries[span, None].expand_as(ids)
            exact = scan.rows.pair_scores(queries, scan.columns, torch.where(is_scored, ids, -1))
            best = torch.where(is_scored, exact, upper.masked_fill(~is_there, -torch.inf))
            # The pairs of a query stand by their upper bounds. Equal scores go by the lower id.
            order = ids.argsort(dim=1)
            best, by_score = best.gather(1, order).sort(dim=1, descending=True, stable=True)
            order = order.gather(1, by_score)
            head = order[:, : scan.kept]
            found.columns[span] = torch.where(is_there.gather(1, head), ids.gather(1, head), -1)
            found.scores[span] = torch.where(is_scored.gather(1, head), best[:, : scan.kept], -torch.inf)
            bounds = self.thresholds[span]
            found.bounds[span] = torch.maximum(bounds, best[:, scan.kept :].amax(1)) if capacity > scan.kept else bounds
        return FusedFound(found, counts > capacity, self.kth)


class FusedScan:
    """A scan by the kernels."""

    def __init__(self, settings: ScanSettings) -> None:
        self.num_columns = settings.num_columns
        self.rows, self.columns, self.offset, self.eligible, self.k, self.kept, self.has_copies = settings
        self.kernels = load_kernels("nearest_neighbors")
        self.row_kernels = load_kernels("nearest_neighbors_rows")
        d = self.rows.embedding.shape[1]
        self.rounding, self.underflow = rounding_error(d, truncating=True), underflow_error(d)
        self.block_rows = max(1, min(_BLOCK_ROWS, _BLOCK_ELEMENTS // d))
        if self.rows.metric == "l1":  # float32 rows
            self.block_rows = max(1, self.block_rows // 2)

    @staticmethod
    def serves(columns: ScoredRows, kept: int) -> bool:
        """Whether a search is for the kernels."""
        return (
            columns.backend == "triton"
            and len(columns) >= KERNELS_FROM
            and kept <= _MOST_KEPT
            and has_matrix_units(columns.embedding.device)
        )

    def run(
        self,
        queries: Tensor,
        is_shared: Tensor,
        is_zero: Tensor,
        floor: Tensor | None,
        whole: bool,
        report: Callable[[float], None],
    ) -> FusedFound:
        """The best columns of the queries, whose arguments `search._Scan.run` explains.

        Args:
            is_zero: bool [n]: queries that score 0 with every row, which are left out.
        """
        n = queries.numel()
        least = 3 * self.kept + _SPARE_PLACES
        lowest = torch.full(queries.shape, -torch.inf, dtype=torch.float32, device=queries.device)
        thresholds = torch.where(is_zero, torch.inf, lowest if floor is None else floor)
        fitting = _PLACES_BYTES // (8 * max(1, n))
        capacity = max(self.kept, min(self.num_columns, max(least, min(_MOST_PLACES, fitting))))
        if whole and fitting >= least and n > self.block_rows and 2 * self.num_columns >= n:
            return self._triangle(queries, is_shared, thresholds, capacity, report)
        size = max(1, _PLACES_BYTES // (8 * capacity))
        order = _spread(self.num_columns, queries.device)
        order = order if self.eligible is None else self.eligible[order]
        parts = []
        for start in range(0, n, size):
            span = slice(start, start + size)
            candidates = FusedCandidates(self, queries[span], capacity, thresholds[span], by_position=False)
            self._scan(candidates, is_shared[span], order)
            parts.append(candidates.finish(is_shared[span]))
            report(min(1.0, (start + size) / n))
        if len(parts) == 1:
            return parts[0]
        found = Found(*(torch.cat(field) for field in zip(*(part.found for part in parts), strict=True)))
        return FusedFound(found, *(torch.cat(field) for field in list(zip(*parts, strict=True))[1:]))

    def _scan(self, candidates: FusedCandidates, is_shared: Tensor, order: Tensor) -> None:
        """Appends the pairs of the queries with the columns `order`, ids int64 that are spread evenly."""
        rows, n = self.rows, len(candidates.queries)
        place = torch.full((len(self.columns),), -1, dtype=torch.int32, device=order.device)
        place[order] = torch.arange(order.numel(), dtype=torch.int32, device=order.device)
        own = candidates.queries + self.offset
        is_column = (own >= 0) & (own < len(self.columns)) & ~is_shared
        own = torch.where(is_column, place[own.clamp(0, len(self.columns) - 1)], -1)
        capacity = candidates.pairs.columns.shape[1]
        for start in range(0, n, self.block_rows):
            span = slice(start, min(start + self.block_rows, n))
            x = self._prepared(rows, candidates.queries[span], queries=True)
            for first, stop in self._bands(order.numel(), capacity):
                ids = order[first:stop]
                excluded = own[span] - first
                self.kernels.append_pairs(
                    x, self._prepared(self.columns, ids, queries=False), rows.metric,
                    self._raw(candidates.thresholds[span]), torch.where(excluded < stop - first, excluded, -1),
                    candidates.part(span), y_ids=self._stored(candidates, ids),
                )  # fmt: skip
                candidates.tighten(span)

    def _stored(self, candidates: FusedCandidates, ids: Tensor) -> Tensor:
        """What stands for columns among the pairs."""
        return torch.searchsorted(candidates.queries, ids) if candidates.by_position else ids

    def _bands(self, columns: int, capacity: int) -> Iterator[tuple[int, int]]:
        """The columns that are scored between two rises of the thresholds."""
        seen = 0
        while seen < columns:
            size = capacity if not seen else int(seen * max(1.0, (capacity - self.kept) / (3 * self.kept)))
            stop = min(columns, seen + min(size, self.block_rows))
            yield seen, stop
            seen = stop

    def _triangle(
        self, queries: Tensor, is_shared: Tensor, thresholds: Tensor, capacity: int, report: Callable[[float], None]
    ) -> FusedFound:
        """The best columns of all queries, which are the columns too, or some of them are. A tile serves both sides.

        Blocks are taken around a circle, each with the next, then each with the next but one, so that all of them see
        as many columns between two rises of the thresholds.
        """
        n, device = queries.numel(), queries.device
        candidates = FusedCandidates(self, queries, capacity, thresholds, by_position=True)
        is_column = torch.ones_like(is_shared)
        if self.eligible is not None:
            is_column = torch.zeros(len(self.columns), dtype=torch.bool, device=device)
            is_column = is_column.index_fill_(0, self.eligible, True)[queries]
        # The first thresholds, from so many columns that the first blocks append a half of the places.
        number = -(-n // self.block_rows)
        sample = min(self.num_columns, -(-2 * self.kept * (n // number + 1) // capacity))
        order = _spread(self.num_columns, device)[:sample]
        self._scan(candidates, is_shared, order if self.eligible is None else self.eligible[order])
        candidates.start_again(is_shared & is_column)
        blocks = [torch.arange(i, n, number, device=device) for i in range(number)]
        ids = [queries[block] for block in blocks]
        allowed: list[Tensor | None] = [None if self.eligible is None else is_column[block] for block in blocks]
        done, total = 0, number * (number + 1) // 2
        for distance in range(number // 2 + 1):
            for i in range(number // 2 if 2 * distance == number else number):
                j = (i + distance) % number
                x, y = blocks[i], blocks[j]
                self.kernels.append_pairs_symmetric(
                    self._prepared(self.rows, ids[i], queries=True),
                    self._prepared(self.columns, ids[j], queries=False), self.rows.metric,
                    self._raw(candidates.thresholds[x]), self._raw(candidates.thresholds[y]), allowed[i], allowed[j],
                    candidates.pairs, x_ids=x, y_ids=y, diagonal=not distance,
                )  # fmt: skip
                done += 1
                report(done / total)
            candidates.tighten(slice(0, n))
        return candidates.finish(is_shared)

    def _raw(self, thresholds: Tensor) -> Tensor:
        """The thresholds of what the kernels compute. For l1 an upper bound is 1 - r times that, and 1 + 2 r times a
        threshold, which is negative, is below the threshold divided by 1 - r."""
        return thresholds * (1.0 + 2.0 * self.rounding) if self.rows.metric == "l1" else thresholds

    def _prepared(self, rows: ScoredRows, ids: Tensor, *, queries: bool) -> Tensor:
        if rows.metric == "l1":
            return rows[ids].contiguous()
        inverse_norms = rows.norms if rows.inverse_norms is None else rows.inverse_norms
        return self.row_kernels.prepare_rows(
            rows.embedding, ids, rows.norms, inverse_norms, rows.roundoffs, rows.metric,
            queries=queries, rounding=self.rounding, underflow=self.underflow,
        )  # fmt: skip


def _spread(n: int, device: torch.device) -> Tensor:
    """int64 [n]: all positions, in an order in which any few that follow each other are spread evenly over them."""
    step = max(1, round(n * 0.6180339887))
    while math.gcd(step, n) != 1:
        step += 1
    return torch.arange(n, device=device) * step % max(1, n)
