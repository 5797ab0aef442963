"""Exact nearest-neighbor search over a vocabulary, in tiles, on any device.

A scan computes upper bounds of all scores with matrix multiplications (see `bounds`) and keeps the pairs that may be
among the nearest (see `candidates`). These are then scored pair by pair, so one scan settles every query.

The scan of a whole table multiplies only the upper triangle of its tiles. Each tile serves its rows and its columns.

Equal rows are scanned once, as a query and as a column (see `equal_rows`). A zero row scores 0 with every row by cosine
and dot, so its neighbors are known without a scan.

The kernels return only the best scores of each tile. What they leave out is bounded as a whole. A query whose k-th
score is not above that bound is scanned again in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .bounds import OptimisticScores
from .candidates import GROUP_SIZE, Candidates, Found, RunningBest, ScoreTile, padded_to_groups
from .equal_rows import Classes
from .scores import ScoredRows, rows_per_tile

_QUERY_TILE = 2048  # queries in one tile
_SQUARE_TILE = 3072  # rows of a square tile
_TILE_BYTES = 2**27  # of one square tile of scores, with the rows it is multiplied from
_WORKSPACE_BYTES = 5 * 2**25  # of the pairs that are kept, and of columns that are prepared once for all tiles
_PAIR_BYTES = 32  # of a pair that is kept: 16, and twice the pairs are held before they are merged
_TRIANGLE_PAIRS = 3 * 2**21  # pairs that are held in all while a whole table is scanned; 16 bytes each
_SHARED_FROM = 256  # queries: with fewer, looking for equal rows takes longer than it saves
_KERNEL_ROWS = 2**14  # rows of a block that the kernels multiply with another
_KERNEL_ELEMENTS = 2**25  # of such a block
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
    if total >= _SHARED_FROM:
        classes = Classes.of(rows.embedding, columns.embedding, query_ids, offset, allowed)
    if classes is None:
        eligible = None if allowed is None else allowed.nonzero().squeeze(1)
        scan = _Scan(rows, columns, offset, eligible, k, kept, total)
        found = scan.run(query_ids, None, floor, whole, report)
        class_bounds, equal_to = found.bounds, None
    else:
        # A query that is scanned for its equals too may find itself, so one column more is wanted.
        scan = _Scan(rows, columns, offset, classes.columns, k + 1, max(kept, k + 1), total, classes.has_copies)
        floor = None if floor is None else classes.lowest(floor)
        found = scan.run(classes.scanned, classes.is_shared, floor, whole, report)
        (found, class_bounds), equal_to = classes.expanded(found, k, kept), classes.equal_to
    report(1.0)
    ids, scores = found.columns[:, :k].clone(), found.scores[:, :k].clone()
    return SearchResult(ids, scores, found.columns, found.scores, found.bounds, class_bounds, equal_to)


def update_neighbors(
    rows: ScoredRows,
    queries: Tensor,
    ids: Tensor,
    scores: Tensor,
    *,
    new: Tensor,
    columns: ScoredRows | None = None,
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of each query among k known neighbors and the columns of a mask.

    Args:
        rows, columns, offset: as in `search`.
        queries: row ids int64 [Q].
        ids, scores: [Q, k], the known neighbors, ranked. They need not be columns; the score -inf says that there is
            none.
        new: bool [C], the other columns to consider.

    Returns:
        ids and scores [Q, k], ranked.
    """
    columns = rows if columns is None else columns
    k = ids.shape[1]
    scan = _Scan(rows, columns, offset, new.nonzero().squeeze(1), k, k, queries.numel())
    tile_scores = scan.scores if scan.scores.kernels is None else scan.float32_scores
    ids, scores = ids.clone(), scores.clone()
    for part in torch.arange(queries.numel(), device=ids.device).split(scan.query_tile):
        found = scan.block(queries[part], None, scores[part, -1], tile_scores, known=(ids[part], scores[part]))
        ids[part], scores[part] = found.columns, found.scores
    return ids, scores


class _Scan:
    """A scan of `columns` for the neighbors of `rows`; row i is column i + offset, and not its own neighbor.

    Args:
        rows, columns, offset: as in `search`.
        eligible: int64, ascending, the columns that are scanned; None: all.
        k, kept: columns that are wanted and that are kept of each query, k <= kept.
        count: how many queries there will be.
        has_copies: bool [C], columns that stand for equal ones; None: none does.
    """

    def __init__(
        self,
        rows: ScoredRows,
        columns: ScoredRows,
        offset: int,
        eligible: Tensor | None,
        k: int,
        kept: int,
        count: int,
        has_copies: Tensor | None = None,
    ) -> None:
        self.rows, self.columns, self.offset, self.k, self.kept = rows, columns, offset, k, kept
        self.eligible, self.has_copies, self.count = eligible, has_copies, count
        self.num_columns = len(columns) if eligible is None else eligible.numel()
        self.scores = OptimisticScores(rows, columns, count)
        self.float32_scores = OptimisticScores(rows, columns, 0)  # tighter, for the few queries of a second scan
        d = rows.embedding.shape[1]
        self.column_tile = columns.tile_size
        fitting = _WORKSPACE_BYTES // (2 * _PAIR_BYTES * kept)  # queries whose pairs fit
        self.query_tile = max(1, min(rows_per_tile(d, _QUERY_TILE), fitting))
        # For l1 the kernels read float32 rows and have tiles of half the size.
        divisor = 2 if rows.metric == "l1" else 1
        self.kernel_rows = max(1, min(_KERNEL_ROWS, _KERNEL_ELEMENTS // d) // divisor)
        # Scores that the kernels keep of each tile. Few of the hundreds of tiles have several of the k nearest rows.
        # Where one has more than this, the bound does not certify the query.
        self.best_per_tile = 2 if k <= 3 else 4
        self._prepared: dict[tuple[int, int], Tensor] = {}

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
        if whole and floor is None and self._fits_whole():
            places = torch.arange(total, device=device)
            if self.eligible is not None:
                places = torch.searchsorted(queries, self.eligible)
            for place, part in self._triangle(queries, places, is_shared, is_zero, report):
                where = places[place]
                store(where, part)
                remaining[where] = False
                done += where.numel()
                report(_SCAN_SHARE + (1 - _SCAN_SHARE) * done / total)
        scan = self.block if self.scores.kernels is None else self._block_fused
        rest, share = remaining.nonzero().squeeze(1), 1 - done / max(1, total)
        if rest.numel():
            size = self.query_tile if self.scores.kernels is None else self.kernel_rows
            for start in range(0, rest.numel(), size):
                where = rest[start : start + size]
                part_floor = None if floor is None else floor[where]
                store(where, scan(queries[where], is_shared[where], part_floor, self.scores))
                report(1 - share * (1 - min(1.0, (start + size) / rest.numel())))
        zero = is_zero.nonzero().squeeze(1)
        if zero.numel():
            store(zero, self._of_zero_rows(queries[zero], is_shared[zero]))
        if self.kept >= self.num_columns:
            found.bounds.fill_(-torch.inf)  # every column is among the candidates
        return found

    def block(
        self,
        queries: Tensor,
        is_shared: Tensor | None,
        floor: Tensor | None,
        scores: OptimisticScores,
        known: tuple[Tensor, Tensor] | None = None,
    ) -> Found:
        """The best columns of some queries.

        Args:
            known: ids and scores [q, n] of columns that are known and need not be scanned; None: none are.
        """
        kept = Candidates(scores, queries, self.k, self.kept, floor)
        own = queries + self.offset
        excluded = (own if is_shared is None else torch.where(is_shared, -1, own))[:, None]
        if known is not None:
            kept.add(*known)
            excluded = torch.cat([excluded, known[0]], dim=1)
        tile = ScoreTile(scores, queries.numel(), self.column_tile)
        prepared = scores.prepared_queries(queries)
        for index, ids, span in self._blocks(self.column_tile):
            values = tile.multiply(prepared, self._prepared_columns(scores, index, span))
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
        fused = scores.kernels is not None
        size = self.kernel_rows if fused else min(padded_to_groups(self.num_columns), self._square_tile())
        blocks = list(self._blocks(size))
        if fused:
            best = self._triangle_fused(blocks, queries[places], report)
            for _, _, span in self._blocks(self.query_tile):
                part = RunningBest(*(x[span] for x in best))
                yield span, self._scored(queries[places[span]], is_shared[places[span]], part, None, add_own=True)
            return
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
                    values = tile.multiply(prepared, self._prepared_columns(scores, other_index, other_span))
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

    # With the kernels ---------------------------------------------------------------------------------------------

    def _block_fused(self, queries: Tensor, is_shared: Tensor, floor: Tensor | None, scores: OptimisticScores) -> Found:
        """`block` by the kernels, which return only the best scores of each tile."""
        prepared = scores.prepared_queries(queries)
        least = None if floor is None else scores.threshold_below(floor)
        best = RunningBest.empty(queries.numel(), self._kept_of_tiles, least, queries.device)
        own = torch.where(is_shared, -1, queries + self.offset)
        for index, ids, _ in self._blocks(self.kernel_rows):
            columns = scores.prepared_columns(index)
            values, places = scores.tile_best(prepared, columns, _places(ids, own), self.best_per_tile)
            best.merge_tile_best(slice(0, queries.numel()), values, places, ids)
        return self._scored(queries, is_shared, best, floor)

    def _triangle_fused(
        self, blocks: list[tuple[slice | Tensor, Tensor, slice]], queries: Tensor, report: Callable[[float], None]
    ) -> RunningBest:
        scores = self.scores
        best = RunningBest.empty(self.num_columns, self._kept_of_tiles, None, queries.device)
        done, total = 0, len(blocks) * (len(blocks) + 1) // 2
        for on_diagonal in (True, False):
            for i, (index, ids, span) in enumerate(blocks):
                prepared = scores.prepared_queries(index)
                for other_index, other_ids, other_span in blocks[i : i + 1] if on_diagonal else blocks[i + 1 :]:
                    row_values, row_places, column_values, column_places = scores.tile_best_symmetric(
                        prepared, scores.prepared_columns(other_index), self.best_per_tile, diagonal=on_diagonal
                    )
                    best.merge_tile_best(span, row_values, row_places, other_ids)
                    best.merge_tile_best(other_span, column_values, column_places, ids)
                    done += 1
                    report(_SCAN_SHARE * done / total)
        return best

    @property
    def _kept_of_tiles(self) -> int:
        """Scores that are kept of what the kernels return: enough to certify most queries."""
        return max(1, min(max(self.kept, default_num_candidates(self.k)), self.num_columns))

    def _scored(
        self, queries: Tensor, is_shared: Tensor, best: RunningBest, floor: Tensor | None, *, add_own: bool = False
    ) -> Found:
        """The best columns of some queries, given what the kernels found. Those it does not settle are scanned.

        Args:
            add_own: whether the kernels have left out the pairs of the shared queries with themselves.
        """
        scores, k = self.scores, self.k
        ids, values, bounds = best.ids.long(), best.values, best.thresholds()
        if add_own and bool(is_shared.any()):
            own = torch.where(is_shared, self.rows.pair_scores(queries, self.rows, queries), -torch.inf)
            values = torch.cat([values, own[:, None]], dim=1)
            ids = torch.cat([ids, torch.where(is_shared, queries, -1)[:, None]], dim=1)
        rows = queries[:, None].expand_as(ids)
        # A candidate that cannot be among the k nearest need not be scored.
        lower = values - scores.error_bound(values, rows, ids.clamp(min=0))
        lower.masked_fill_(ids < 0, -torch.inf)
        least = lower.topk(k, dim=1).values[:, -1] if ids.shape[1] >= k else torch.full_like(bounds, -torch.inf)
        least = least if floor is None else torch.maximum(least, floor)
        contenders = (values >= least[:, None]) & (ids >= 0)
        if self.has_copies is not None:
            shared = is_shared | (self.has_copies[ids.clamp(min=0)] & (ids >= 0)).any(1)
            contenders |= shared[:, None] & (ids >= 0)
        exact = torch.full_like(values, -torch.inf)
        exact[contenders] = self.rows.pair_scores(rows[contenders], self.columns, ids[contenders])
        # Scored ones first. The upper bounds of the others, and the scores that are cut off, are below the bound.
        upper = torch.where(contenders, exact, values)
        ids, order = ids.sort(dim=1)
        exact, upper = exact.gather(1, order), upper.gather(1, order)
        exact, order = exact.sort(dim=1, descending=True, stable=True)
        ids, upper = ids.gather(1, order), upper.gather(1, order)
        if ids.shape[1] < self.kept:
            padding = (0, self.kept - ids.shape[1])
            ids = torch.nn.functional.pad(ids, padding, value=-1)
            exact, upper = (torch.nn.functional.pad(x, padding, value=-torch.inf) for x in (exact, upper))
        elif ids.shape[1] > self.kept:
            bounds = torch.maximum(bounds, upper[:, self.kept :].amax(1))
        found = Found(ids[:, : self.kept].clone(), exact[:, : self.kept].clone(), bounds.clone())
        kth = found.scores[:, k - 1] if floor is None else torch.maximum(found.scores[:, k - 1], floor)
        is_open = (kth <= bounds) & (bounds > -torch.inf)
        if best.ids.shape[1] >= self.num_columns and floor is None:
            is_open &= best.dropped_bound > -torch.inf  # nothing was left out
        for part in is_open.nonzero().squeeze(1).split(_QUERY_TILE // 8):
            if part.numel():
                again = self.block(queries[part], is_shared[part], kth[part], self.float32_scores)
                for out, replacement in zip(found, again, strict=True):
                    out[part] = replacement
        return found

    # Blocks -------------------------------------------------------------------------------------------------------

    def _blocks(self, size: int) -> Iterator[tuple[slice | Tensor, Tensor, slice]]:
        """The columns that are scanned, block by block: how to index them, their ids, and their positions."""
        for start in range(0, self.num_columns, size):
            span = slice(start, min(start + size, self.num_columns))
            if self.eligible is None:
                yield span, torch.arange(span.start, span.stop, device=self.columns.embedding.device), span
            else:
                yield self.eligible[span], self.eligible[span], span

    def _prepared_columns(self, scores: OptimisticScores, index: slice | Tensor, span: slice) -> Tensor:
        """Prepared columns. They are kept for the next tile where there is one and all of them fit."""
        width = self.rows.embedding.shape[1] * torch.finfo(scores.dtype).bits // 8
        fits = self.num_columns * (width + self.kept * _PAIR_BYTES) <= _WORKSPACE_BYTES
        if not fits or self.count <= self.query_tile or scores is not self.scores:
            return scores.prepared_columns(index)
        key = (span.start, span.stop)
        if key not in self._prepared:
            self._prepared[key] = scores.prepared_columns(index)
        return self._prepared[key]

    def _fits_whole(self) -> bool:
        """Whether the pairs that are kept of all columns fit. The kernels keep fewer bytes, as their results."""
        return self.scores.kernels is not None or self.num_columns * self.kept * _PAIR_BYTES <= _WORKSPACE_BYTES

    def _square_tile(self) -> int:
        """Rows of a square tile that fits in _TILE_BYTES with the two blocks of rows it is multiplied from."""
        d, size = self.rows.embedding.shape[1], torch.finfo(self.scores.dtype).bits // 8
        side = int((d * d + _TILE_BYTES / size) ** 0.5) - d // 2
        return max(GROUP_SIZE, min(_SQUARE_TILE, side // GROUP_SIZE * GROUP_SIZE))


def _places(tile_ids: Tensor, ids: Tensor) -> Tensor:
    """int32: the positions of `ids` in the ascending `tile_ids`, -1 where they are not in it."""
    position = torch.searchsorted(tile_ids, ids).clamp(max=tile_ids.numel() - 1)
    return torch.where(tile_ids[position] == ids, position, -1).int()


def _leave_out(scores: Tensor, tile_ids: Tensor, ids: Tensor) -> None:
    """Writes -inf, in place, where row i of scores over the ascending `tile_ids` has one of `ids[i]` [Q, n]."""
    position = torch.searchsorted(tile_ids, ids).clamp(max=tile_ids.numel() - 1)
    row, which = (tile_ids[position] == ids).nonzero(as_tuple=True)
    scores[row, position[row, which]] = -torch.inf
