"""Exact nearest-neighbor search over a vocabulary, in tiles, on any device.

A scan computes upper bounds of all scores with matrix multiplications (see `bounds`) and keeps the pairs that may be
among the nearest (see `candidates`). These are then scored pair by pair, so one scan settles every query.

The scan of a whole table multiplies only the upper triangle of its tiles. Each tile serves its rows and its columns.

Equal rows are scanned once, as a query and as a column (see `equal_rows`). A zero row scores 0 with every row by cosine
and dot, so its neighbors are known without a scan.

Where the kernels run they scan (see `fused`), and the few queries for whose pairs they have no room are scanned here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .bounds import OptimisticScores, PreparedColumns
from .candidates import GROUP_SIZE, Candidates, Found, ScanSettings, ScoreTile, padded_to_groups
from .equal_rows import Classes
from .fused import FusedScan
from .scores import ScoredRows, rows_per_tile

_QUERY_TILE = 2048  # queries in one tile
_SQUARE_TILE = 3072  # rows of a square tile
_TILE_BYTES = 2**27  # of one square tile of scores, with the rows it is multiplied from
_WORKSPACE_BYTES = 5 * 2**25  # of the pairs that are kept, and of columns that are prepared once for all tiles
_PAIR_BYTES = 32  # of a pair that is kept: 16, and twice the pairs are held before they are merged
_TRIANGLE_PAIRS = 3 * 2**21  # pairs that are held in all while a whole table is scanned; 16 bytes each
SHARED_FROM = 256  # queries: with fewer, looking for equal rows takes longer than it saves
_SCAN_SHARE = 0.8  # of a whole table's progress; scoring the candidates is the rest

Progress = Callable[[int, int], None]


@dataclass
class SearchResult:
    """What a search found, best first, and what a later refresh needs to certify it.

    Attributes:
        ids: int64 [Q, k]; -1 where there are fewer than k rows.
        scores: float32 [Q, k]; -inf where the id is -1.
        candidates: int64 [Q, c], beginning with the ids; -1 where there are fewer.
        candidate_scores: float32 [Q, c]; -inf where there is no candidate. Of a query without equal rows among its
            candidates, those that cannot be among the k nearest are -inf too.
        bounds: float32 [Q]: no row outside the candidates scores above it (-inf: there is no such row).
        class_bounds: float32 [Q]: likewise, but for rows equal to k of the candidates.
        equal_to: int64 [V], the first row equal to each row; None: there are no equal rows, or they were not looked
            for.
    """

    ids: Tensor
    scores: Tensor
    candidates: Tensor
    candidate_scores: Tensor
    bounds: Tensor
    class_bounds: Tensor
    equal_to: Tensor | None


def default_num_candidates(k: int) -> int:
    """Candidates that a table keeps of a row: enough to certify most rows of a trained embedding for many steps."""
    return 8 + 4 * k


def search(
    rows: ScoredRows,
    k: int,
    num_candidates: int | None = None,
    *,
    queries: Tensor | None = None,
    columns: ScoredRows | None = None,
    offset: int = 0,
    allowed: Tensor | None = None,
    floor: Tensor | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """The k rows most similar to each query, the query itself excluded.

    Args:
        rows: the rows [V, d] whose neighbors are wanted.
        k: neighbors a query.
        num_candidates: candidates that are kept for every query, at least k; None: k.
        queries: row ids int64 [Q]; None: all rows.
        columns: the rows [C, d] to search; None: `rows`. The ids of the result count in these.
        offset: row i of `rows` is row i + offset of `columns`, where there is such a row.
        allowed: bool [C], columns that may be returned; None: all.
        floor: float32 [Q], scores that k rows, of `columns` or others, are known to reach. Pairs below the floor need
            not be returned, and the bounds only cover scores above it.
        progress: called with (queries done, queries in all).
    """
    columns = rows if columns is None else columns
    whole = queries is None and columns is rows
    query_ids = torch.arange(len(rows), device=rows.embedding.device) if queries is None else queries
    kept, total = max(k, num_candidates or 0), query_ids.numel()

    def report(fraction: float) -> None:
        if progress is not None:
            progress(int(fraction * total), total)

    classes = None
    if total >= SHARED_FROM:
        classes = Classes.of(rows, columns, query_ids, offset, allowed)
    if classes is None:
        eligible = None if allowed is None else allowed.nonzero().squeeze(1)
        scan = _Scan(ScanSettings(rows, columns, offset, eligible, k, kept), total)
        found = scan.run(query_ids, None, floor, whole, report)
        class_bounds, equal_to = found.bounds, None
    else:
        # A query that is scanned for its equals too may find itself, so one column more is wanted.
        settings = ScanSettings(rows, columns, offset, classes.columns, k + 1, max(kept, k + 1), classes.has_copies)
        scan = _Scan(settings, total)
        floor = None if floor is None else classes.lowest(floor)
        found = scan.run(classes.scanned, classes.is_shared, floor, whole, report)
        (found, class_bounds), equal_to = classes.expanded(found, k, kept), classes.equal_to
    report(1.0)
    ids, scores = found.columns[:, :k].clone(), found.scores[:, :k].clone()
    return SearchResult(ids, scores, found.columns, found.scores, found.bounds, class_bounds, equal_to)


class _Scan:
    """A scan for the neighbors of `count` queries."""

    def __init__(self, settings: ScanSettings, count: int) -> None:
        self.settings, self.count, self.num_columns = settings, count, settings.num_columns
        self.rows, self.columns, self.offset, self.eligible, self.k, self.kept, self.has_copies = settings
        self.column_tile = self.columns.tile_size
        fitting = _WORKSPACE_BYTES // (2 * _PAIR_BYTES * self.kept)  # queries whose pairs fit
        self.query_tile = max(1, min(rows_per_tile(self.rows.embedding.shape[1], _QUERY_TILE), fitting))
        self._prepared: dict[tuple[int, int], PreparedColumns] = {}

    @functools.cached_property
    def scores(self) -> OptimisticScores:
        return OptimisticScores(self.rows, self.columns, self.count)

    def run(
        self,
        queries: Tensor,
        is_shared: Tensor | None,
        floor: Tensor | None,
        whole: bool,
        report: Callable[[float], None],
    ) -> Found:
        """The best columns of the queries.

        Args:
            queries: row ids int64 [n], ascending if `whole`.
            is_shared: bool [n], queries that are scanned for equal rows too, and may find themselves; None: none is.
            floor: float32 [n]; None: no floor.
            whole: whether the columns that are scanned are all among the queries.
            report: called with the fraction that is done.
        """
        total, device = queries.numel(), queries.device
        is_shared = torch.zeros(total, dtype=torch.bool, device=device) if is_shared is None else is_shared
        found = Found(
            torch.full((total, self.kept), -1, dtype=torch.int64, device=device),
            torch.full((total, self.kept), -torch.inf, dtype=torch.float32, device=device),
            torch.full((total,), -torch.inf, dtype=torch.float32, device=device),
        )

        def store(where: Tensor, part: Found) -> None:
            for out, values in zip(found, part, strict=True):
                out[where] = values

        is_zero = self.rows.is_zero[queries]
        remaining, done = ~is_zero, 0
        if FusedScan.serves(self.columns, self.kept):
            fused = FusedScan(self.settings)
            found, remaining, floor = fused.run(queries, is_shared, is_zero, floor, whole, report)
            done = total - int(remaining.sum())  # here a GPU is waited for
        elif whole and floor is None and self._fits_whole():
            places = torch.arange(total, device=device)
            if self.eligible is not None:
                places = torch.searchsorted(queries, self.eligible)
            for place, part in self._triangle(queries, places, is_shared, is_zero, report):
                where = places[place]
                store(where, part)
                remaining[where] = False
                done += where.numel()
                report(_SCAN_SHARE + (1 - _SCAN_SHARE) * done / total)
        if done < total:
            rest, share = remaining.nonzero().squeeze(1), 1 - done / total
            for start in range(0, rest.numel(), self.query_tile):
                where = rest[start : start + self.query_tile]
                store(where, self.block(queries[where], is_shared[where], None if floor is None else floor[where]))
                report(1 - share * (1 - min(1.0, (start + self.query_tile) / rest.numel())))
        if self.rows.num_zero:
            zero = is_zero.nonzero().squeeze(1)
            store(zero, self._of_zero_rows(queries[zero], is_shared[zero]))
        if self.kept >= self.num_columns:
            found.bounds.fill_(-torch.inf)  # every column is among the candidates
        return found

    def block(self, queries: Tensor, is_shared: Tensor, floor: Tensor | None) -> Found:
        """The best columns of some queries."""
        scores = self.scores
        kept = Candidates(scores, queries, self.k, self.kept, floor)
        excluded = torch.where(is_shared, -1, queries + self.offset)
        tile = ScoreTile(scores, queries.numel(), self.column_tile)
        prepared = scores.prepared_queries(queries)
        for index, ids, span in self._blocks(self.column_tile):
            values = tile.multiply(prepared, self._prepared_columns(index, span))
            _leave_out(values, ids, excluded)
            kept.take(values[: queries.numel()], ids, dim=1)
        return kept.finish(is_shared, self.has_copies)

    def _triangle(
        self, queries: Tensor, places: Tensor, is_shared: Tensor, is_zero: Tensor, report: Callable[[float], None]
    ) -> Iterator[tuple[slice, Found]]:
        """The best columns of all columns, block by block. A tile of scores serves its rows and its columns.

        The tiles on the diagonal come first: they give every row a threshold.

        Args:
            queries, is_shared, is_zero: [n], of `run`.
            places: int64 [columns], where the columns that are scanned are among the queries.
        """
        scores = self.scores
        size = min(padded_to_groups(self.num_columns), self._square_tile())
        blocks = list(self._blocks(size))
        capacity = _TRIANGLE_PAIRS // len(blocks)
        # What a zero row's neighbors are is known: no pair reaches its threshold.
        floor = torch.full(is_zero.shape, -torch.inf, dtype=torch.float32, device=is_zero.device)
        floor.masked_fill_(is_zero, torch.inf)
        kept = [Candidates(scores, ids, self.k, self.kept, floor[places[span]], capacity) for _, ids, span in blocks]
        tile = ScoreTile(scores, size, size)
        done, total = 0, len(blocks) * (len(blocks) + 1) // 2
        for on_diagonal in (True, False):
            for i, (index, ids, span) in enumerate(blocks):
                prepared = scores.prepared_queries(index)
                for j in range(i, i + 1) if on_diagonal else range(i + 1, len(blocks)):
                    other_index, other_ids, other_span = blocks[j]
                    values = tile.multiply(prepared, self._prepared_columns(other_index, other_span))
                    if on_diagonal:
                        alone = (~is_shared[places[span]]).nonzero().squeeze(1)
                        values[alone, alone] = -torch.inf
                    else:
                        kept[j].take(values[:, : other_ids.numel()], ids, dim=0)
                    kept[i].take(values[: ids.numel()], other_ids, dim=1)
                    done += 1
                    report(_SCAN_SHARE * done / total)
        self._prepared.clear()
        for (_, _, span), candidates in zip(blocks, kept, strict=True):
            yield span, candidates.finish(is_shared[places[span]], self.has_copies)

    def _of_zero_rows(self, queries: Tensor, is_shared: Tensor) -> Found:
        """The first columns. A zero row scores 0 with every row."""
        columns = torch.arange(self.num_columns, device=queries.device) if self.eligible is None else self.eligible
        first = columns[: self.kept + 1].expand(queries.numel(), -1)
        own = torch.where(is_shared, -1, queries + self.offset)[:, None]
        order = (first == own).int().argsort(dim=1, stable=True)  # the query itself last
        first = first.gather(1, order)
        others = (first != own).sum(1)
        missing = self.kept - first.shape[1]
        first = torch.nn.functional.pad(first, (0, max(0, missing)), value=-1)[:, : self.kept]
        is_there = torch.arange(self.kept, device=queries.device) < others[:, None]
        scores = torch.zeros(first.shape, dtype=torch.float32, device=first.device)
        bounds = scores[:, 0].masked_fill(others < self.kept, -torch.inf)
        return Found(torch.where(is_there, first, -1), scores.masked_fill_(~is_there, -torch.inf), bounds)

    # Blocks -------------------------------------------------------------------------------------------------------

    def _blocks(self, size: int) -> Iterator[tuple[slice | Tensor, Tensor, slice]]:
        """The columns that are scanned, block by block: how to index them, their ids, and their positions."""
        for start in range(0, self.num_columns, size):
            span = slice(start, min(start + size, self.num_columns))
            if self.eligible is None:
                yield span, torch.arange(span.start, span.stop, device=self.columns.embedding.device), span
            else:
                yield self.eligible[span], self.eligible[span], span

    def _prepared_columns(self, index: slice | Tensor, span: slice) -> PreparedColumns:
        """Prepared columns. They are kept for the next tile where there is one and all of them fit."""
        scores = self.scores
        width = self.rows.embedding.shape[1] * torch.finfo(scores.dtype).bits // 8
        fits = self.num_columns * (width + self.kept * _PAIR_BYTES) <= _WORKSPACE_BYTES
        if not fits or self.count <= self.query_tile:
            return scores.prepared_columns(index)
        key = (span.start, span.stop)
        if key not in self._prepared:
            self._prepared[key] = scores.prepared_columns(index)
        return self._prepared[key]

    def _fits_whole(self) -> bool:
        """Whether the pairs that are kept of all columns fit."""
        return self.num_columns * self.kept * _PAIR_BYTES <= _WORKSPACE_BYTES

    def _square_tile(self) -> int:
        """Rows of a square tile that fits in _TILE_BYTES with the two blocks of rows it is multiplied from."""
        d, size = self.rows.embedding.shape[1], torch.finfo(self.scores.dtype).bits // 8
        side = int((d * d + _TILE_BYTES / size) ** 0.5) - d // 2
        return max(GROUP_SIZE, min(_SQUARE_TILE, side // GROUP_SIZE * GROUP_SIZE))


def _leave_out(scores: Tensor, tile_ids: Tensor, ids: Tensor) -> None:
    """Writes -inf, in place, where row i of scores over the ascending `tile_ids` has the column `ids[i]`."""
    position = torch.searchsorted(tile_ids, ids).clamp(max=tile_ids.numel() - 1)
    row = (tile_ids[position] == ids).nonzero().squeeze(1)
    scores[row, position[row]] = -torch.inf
