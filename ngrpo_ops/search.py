"""Exact nearest-neighbour search over a vocabulary, in tiles, on any device.

A coarse scan finds candidates with matrix multiplications; what is returned is re-scored pair by pair. Exactness does
not rest on luck: the scan computes *optimistic* scores (see `scoring`), so nothing outside the candidates can score
above the bound it leaves. A query whose k-th re-scored score is strictly above its bound is settled; the others are
searched again with that score as the threshold, re-scoring everything that might reach it.

A search of the whole table multiplies only the upper triangle of its tiles: each serves its rows and its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .ops._ties import best_pairs, ranked
from .scoring import OptimisticScores, ScoredRows

_QUERY_TILE = 2048
_COLUMN_TILE = 8192
_TILE_ELEMENTS = 2**23  # of one tile of rows, and of queries
_SQUARE = 3072  # rows of a square tile
_TILE_BYTES = 2**27  # of one tile of scores
_PAIRS_AT_ONCE = 2**18  # sorted together where many rows are as near as the k-th
_GROUP = 16  # scores whose maximum is compared first
_HITS_AT_ONCE = 2**16  # groups looked into at once
_KERNEL_ROWS = 2**14  # of a block that the kernels multiply, with the next
_KERNEL_ELEMENTS = 2**25

Progress = Callable[[int, int], None]


@dataclass
class SearchResult:
    """What a search found, best first, and what a later refresh needs to certify it.

    ids int64, scores float32 [Q, k]; candidates int64 [Q, c], -1 where there are fewer, beginning with the ids; bounds
    float32 [Q]: no row outside the candidates scores above it. An id of -1 with a score of -inf: fewer than k rows.
    """

    ids: Tensor
    scores: Tensor
    candidates: Tensor
    bounds: Tensor


class _Best:
    """The c highest scores seen so far of each of n rows, and whose they are; nothing at or below a row's floor."""

    def __init__(self, n: int, c: int, floor: Tensor | None, *, like: Tensor) -> None:
        self.values = like.new_full((n, c), -torch.inf)
        self.ids = torch.full((n, c), -1, dtype=torch.int32, device=like.device)
        self.floor = like.new_full((n,), -torch.inf) if floor is None else floor
        self.lost = like.new_full((n,), -torch.inf)  # what the tiles of the kernels may have left out

    def thresholds(self, rows: slice = slice(None)) -> Tensor:
        """What a score must exceed to be kept: no score that was seen and is not kept is above it."""
        return torch.maximum(torch.maximum(self.values[rows, -1], self.floor[rows]), self.lost[rows])

    def merge(self, rows: slice, values: Tensor, places: Tensor, ids: Tensor) -> None:
        """The best of each tile [n, tiles, T] of consecutive rows against `ids`, best first."""
        self.lost[rows] = torch.maximum(self.lost[rows], values[:, :, -1].amax(1))
        found = torch.where(places < 0, -1, ids[places.clamp(min=0)]).int().flatten(1)
        names = torch.cat([self.ids[rows], found], dim=1)
        self.values[rows], order = torch.cat([self.values[rows], values.flatten(1)], dim=1).topk(
            self.values.shape[1], dim=1
        )
        self.ids[rows] = names.gather(1, order)

    def see(self, rows: slice, tile: Tensor, ids: Tensor, dim: int) -> None:
        """Scores of consecutive rows against `ids`, which lie along `dim` of the tile.

        Maxima of groups of scores, which are cheap, tell where to look: the c best scores of a row lie within the c
        groups of the highest maxima, and only in groups above the row's threshold.
        """
        part = max(1, _HITS_AT_ONCE // self.values.shape[1])
        for start in range(rows.start, rows.stop, part):
            some = slice(start, min(start + part, rows.stop))
            inside = slice(some.start - rows.start, some.stop - rows.start)
            self._see(some, tile[inside] if dim == 1 else tile[:, inside], ids, dim)

    def _see(self, rows: slice, tile: Tensor, ids: Tensor, dim: int) -> None:
        c = self.values.shape[1]
        threshold = self.thresholds(rows)
        n, groups = threshold.numel(), tile.shape[dim] // _GROUP
        # As integers bfloat16 numbers from 0 on have their order, and are above all negative ones; they compare faster.
        as_integers = tile.dtype == torch.bfloat16 and bool((threshold >= 0).all())
        keys, least = (tile.view(torch.int16), threshold.view(torch.int16)) if as_integers else (tile, threshold)
        # Member m of group g is at m * groups + g: a maximum over rows of memory, not along them.
        best = keys.unflatten(dim, (_GROUP, groups)).amax(dim)
        hit = best > least.unsqueeze(dim)
        hits = hit.sum(dim)
        if int(hits.max()) > 4 * c or int(hits.sum()) > n * c:
            top = best.topk(min(c, groups), dim=dim, sorted=False).indices
            hit &= torch.zeros_like(hit).scatter_(dim, top, True)
        members = tile.unflatten(dim, (_GROUP, groups))
        if dim == 1:
            row, group = hit.nonzero(as_tuple=True)
            scores = members.transpose(1, 2)[row, group]
            pair, m = (scores > threshold[row, None]).nonzero(as_tuple=True)
            scores = scores[pair, m]
        else:
            group, row = hit.nonzero(as_tuple=True)
            scores = members[:, group, row]  # in the order of the tile in memory
            m, pair = (scores > threshold[row]).nonzero(as_tuple=True)
            scores = scores[m, pair]
        row, place = row[pair], group[pair] + groups * m
        if not row.numel():
            return
        if dim == 0:
            row, order = row.sort(stable=True)
            place, scores = place[order], scores[order]
        # The pairs row by row in a matrix beside what was kept; only of rows that have any.
        counts = torch.bincount(row, minlength=n)
        active = counts.nonzero().squeeze(1)
        slot = torch.arange(row.numel(), device=row.device) - (counts.cumsum(0) - counts)[row]
        line = ((counts > 0).cumsum(0) - 1)[row]
        width = int(counts.max())
        values = scores.new_full((active.numel(), c + width), -torch.inf)
        names = self.ids.new_full((active.numel(), c + width), -1)
        where = active + rows.start
        values[:, :c], names[:, :c] = self.values[where], self.ids[where]
        values[line, c + slot], names[line, c + slot] = scores, ids[place].int()
        self.values[where], order = values.topk(c, dim=1)
        self.ids[where] = names.gather(1, order)


class _Tile:
    """Memory for one tile of scores, used again and again: padded to whole groups with -inf."""

    def __init__(self, scores: OptimisticScores, rows: int, columns: int) -> None:
        self.scores = scores
        shape = (_whole_groups(rows), _whole_groups(columns))
        self.memory = torch.empty(shape, dtype=scores.dtype, device=scores.columns.embedding.device)

    def multiply(self, queries: Tensor, columns: Tensor) -> Tensor:
        q, n = queries.shape[0], columns.shape[0]
        tile = self.memory[: _whole_groups(q), : _whole_groups(n)]
        self.scores.tile(queries, columns, tile[:q, :n])
        tile[q:], tile[:, n:] = -torch.inf, -torch.inf
        return tile


def _whole_groups(n: int) -> int:
    return -(-n // _GROUP) * _GROUP


def _parts(
    ids: Tensor | None, total: int, size: int, device: torch.device
) -> Iterator[tuple[slice | Tensor, Tensor, slice]]:
    """Ascending ids (None: all of `total`) in parts: how to index rows by them, the ids, and where they are."""
    count = total if ids is None else ids.numel()
    for start in range(0, count, size):
        span = slice(start, min(start + size, count))
        if ids is None:
            yield span, torch.arange(span.start, span.stop, device=device), span
        else:
            yield ids[span], ids[span], span


def _places(tile_ids: Tensor, ids: Tensor) -> Tensor:
    """int32: where `ids` are in the ascending `tile_ids`, -1 where they are not."""
    position = torch.searchsorted(tile_ids, ids).clamp(max=tile_ids.numel() - 1)
    return torch.where(tile_ids[position] == ids, position, -1).int()


def _fill_at(matrix: Tensor, tile_ids: Tensor, ids: Tensor, value: float | bool) -> None:
    """In place, `value` where row i of a matrix over the ascending `tile_ids` has one of `ids[i]` [Q, n]."""
    position = torch.searchsorted(tile_ids, ids).clamp(max=tile_ids.numel() - 1)
    row, which = (tile_ids[position] == ids).nonzero(as_tuple=True)
    matrix[row, position[row, which]] = value


class _Search:
    """One search: `rows` against `columns`, of which row i is number i + offset (and not its own neighbour)."""

    def __init__(
        self,
        rows: ScoredRows,
        columns: ScoredRows,
        offset: int,
        allowed: Tensor | None,
        k: int,
        candidates: int,
        count: int,
        progress: Progress | None,
    ) -> None:
        self.rows, self.columns, self.offset, self.k = rows, columns, offset, k
        self.allowed = None if allowed is None else allowed.nonzero().squeeze(1)
        available = len(columns) if self.allowed is None else self.allowed.numel()
        self.candidates = max(1, min(candidates, available))
        self.complete = self.candidates >= available
        self.scores = OptimisticScores(rows, columns, count)
        self.few_scores = OptimisticScores(rows, columns, 0)
        self.progress = progress
        d = rows.embedding.shape[1]
        self.column_tile = max(1, min(_COLUMN_TILE, _TILE_ELEMENTS // d))
        self.query_tile = max(1, min(_QUERY_TILE, _TILE_ELEMENTS // d))
        # The kernels' rows are float32 for l1, and their tiles half as large.
        part = 2 if rows.metric == "l1" else 1
        self.kernel_rows = max(1, min(_KERNEL_ROWS, _KERNEL_ELEMENTS // d) // part)
        # Kept of each tile of the kernels. The k nearest are rarely in few of the hundreds of tiles; the bound tells.
        self.of_tile = 2 if k <= 3 else 4

    def column_tiles(self, size: int) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """The columns that may be returned, tile by tile: how to index them, and their ids, ascending."""
        for index, ids, _ in _parts(self.allowed, len(self.columns), size, self.columns.embedding.device):
            yield index, ids

    def scan(self, queries: Tensor, floor: Tensor | None) -> _Best:
        """The best optimistic scores of some queries, float32 `floor` [q] the least that matter."""
        scores, rows = self.scores, slice(0, queries.numel())
        if scores.kernels is not None:
            return self.fused_scan(queries, floor)
        tile = _Tile(scores, queries.numel(), self.column_tile)
        floor = None if floor is None else scores.below(floor)
        best = _Best(queries.numel(), self.candidates, floor, like=tile.memory)
        prepared = scores.prepared_queries(queries)
        for index, ids in self.column_tiles(self.column_tile):
            values = tile.multiply(prepared, scores.prepared_columns(index))
            _fill_at(values, ids, (queries + self.offset)[:, None], -torch.inf)
            best.see(rows, values, ids, dim=1)
        return best

    def fused_scan(self, queries: Tensor, floor: Tensor | None) -> _Best:
        """`scan` by the kernels, which leave of a tile only its best."""
        scores = self.scores
        prepared = scores.prepared_queries(queries)
        floor = None if floor is None else scores.below(floor)
        best = _Best(queries.numel(), self.candidates, floor, like=scores.columns.norms)
        for index, ids in self.column_tiles(self.kernel_rows):
            columns = scores.prepared_columns(index)
            values, places = scores.tile_best(prepared, columns, _places(ids, queries + self.offset), self.of_tile)
            best.merge(slice(0, queries.numel()), values, places, ids)
        return best

    def scan_triangle(self, report: Callable[[float], None]) -> _Best:
        """The best optimistic scores of all allowed rows against each other, a tile for its rows and its columns.

        The tiles on the diagonal come first: they leave every row a threshold.
        """
        scores, device = self.scores, self.columns.embedding.device
        count = len(self.columns) if self.allowed is None else self.allowed.numel()
        fused = scores.kernels is not None
        size = self.kernel_rows if fused else min(_whole_groups(count), self._square())
        tile = None if fused else _Tile(scores, size, size)
        best = _Best(count, self.candidates, None, like=scores.columns.norms if tile is None else tile.memory)
        blocks = list(_parts(self.allowed, len(self.columns), size, device))
        seen, total = 0, len(blocks) * (len(blocks) + 1) // 2
        for diagonal in (True, False):
            for i, (index, ids, rows) in enumerate(blocks):
                queries = scores.prepared_queries(index)
                for other, other_ids, columns in blocks[i : i + 1] if diagonal else blocks[i + 1 :]:
                    prepared = scores.prepared_columns(other)
                    seen += 1
                    report(seen / total)
                    if tile is None:
                        x, x_at, y, y_at = scores.tile_best_symmetric(
                            queries, prepared, self.of_tile, diagonal=diagonal
                        )
                        best.merge(rows, x, x_at, other_ids)
                        best.merge(columns, y, y_at, ids)
                        continue
                    values = tile.multiply(queries, prepared)
                    if diagonal:
                        values.diagonal()[: ids.numel()] = -torch.inf
                    else:
                        best.see(columns, values[:, : other_ids.numel()], ids, dim=0)
                    best.see(rows, values[: ids.numel()], other_ids, dim=1)
        return best

    def _square(self) -> int:
        """Rows of a square tile that fits with the two blocks of rows it is multiplied from."""
        d, size = self.rows.embedding.shape[1], torch.finfo(self.scores.dtype).bits // 8
        side = int((d * d + _TILE_BYTES / size) ** 0.5) - d // 2
        return max(_GROUP, min(_SQUARE, side // _GROUP * _GROUP))

    def settle(self, queries: Tensor, best: _Best, span: slice, floor: Tensor | None) -> SearchResult:
        """The k nearest of some queries, given what the scan kept of them at `span`."""
        scores, k = self.scores, self.k
        kept = best.ids[span].long()
        ceilings = scores.ceiling(best.values[span])
        bounds = scores.ceiling(best.thresholds(span))
        if self.complete:  # nothing was left out, but what is below the floor
            bounds = best.lost[span].float()
        # What cannot reach the k-th place need not be re-scored.
        rows = queries[:, None].expand_as(kept)
        floors = ceilings - scores.spread(ceilings, rows, kept.clamp(min=0))
        floors.masked_fill_(kept < 0, -torch.inf)
        least = (
            floors.topk(k, dim=1).values[:, -1] if kept.shape[1] >= k else floors.new_full(kept.shape[:1], -torch.inf)
        )
        if floor is not None:
            least = torch.maximum(least, floor)
        worth = (ceilings >= least[:, None]) & (kept >= 0)
        exact = torch.full_like(ceilings, -torch.inf)
        exact[worth] = self.rows.pair_scores(rows[worth], self.columns, kept[worth])
        candidates, exact = ranked(kept, exact)
        if candidates.shape[1] < k:
            missing = k - candidates.shape[1]
            candidates = torch.nn.functional.pad(candidates, (0, missing), value=-1)
            exact = torch.nn.functional.pad(exact, (0, missing), value=-torch.inf)
        found = SearchResult(candidates[:, :k].clone(), exact[:, :k].clone(), candidates, bounds)
        kth = found.scores[:, -1] if floor is None else torch.maximum(found.scores[:, -1], floor)
        unsettled = ((kth <= bounds) & (bounds > -torch.inf)).nonzero().squeeze(1)
        for part in unsettled.split(_QUERY_TILE // 8) if unsettled.numel() else ():
            found.ids[part], found.scores[part] = self.exhaustive(
                queries[part], found.ids[part], found.scores[part], kth[part]
            )
            # Now nothing but the k scores above the k-th; what was kept may not even hold them.
            candidates[part] = -1
            candidates[part, :k] = found.ids[part]
            found.bounds[part] = found.scores[part, -1]
        return found

    def exhaustive(self, queries: Tensor, ids: Tensor, scores: Tensor, kth: Tensor) -> tuple[Tensor, Tensor]:
        """The exact top k of `queries`, given re-scored neighbours of each and the score they must reach."""
        k = self.k
        few = self.few_scores
        prepared = few.prepared_queries(queries)
        tile = _Tile(few, queries.numel(), self.column_tile)
        ids, scores, kth = ids.clone(), scores.clone(), kth.clone()
        for index, tile_ids in self.column_tiles(self.column_tile):
            values = tile.multiply(prepared, few.prepared_columns(index))
            reaches = values[: queries.numel(), : tile_ids.numel()] > few.below(kth[:, None])
            # Not the query itself, nor what is already among the k.
            _fill_at(reaches, tile_ids, torch.cat([(queries + self.offset)[:, None], ids], dim=1), False)
            many = reaches.sum(1).cumsum(0) // _PAIRS_AT_ONCE
            for part in torch.arange(len(queries), device=ids.device).split(
                many.unique_consecutive(return_counts=True)[1].tolist()
            ):
                row, column = reaches[part].nonzero(as_tuple=True)
                if not row.numel():
                    continue
                column = tile_ids[column]
                ids[part], scores[part] = best_pairs(
                    torch.cat([torch.arange(len(part), device=ids.device).repeat_interleave(k), row]),
                    torch.cat([ids[part].reshape(-1), column]),
                    torch.cat(
                        [scores[part].reshape(-1), self.rows.pair_scores(queries[part[row]], self.columns, column)]
                    ),
                    len(part),
                    k,
                )
                kth[part] = torch.maximum(kth[part], scores[part, -1])
        return ids, scores

    def run(self, queries: Tensor | None, floor: Tensor | None) -> SearchResult:
        every = torch.arange(len(self.rows), device=self.rows.embedding.device) if queries is None else queries
        total = every.numel()
        result = SearchResult(
            ids=torch.empty(total, self.k, dtype=torch.int64, device=every.device),
            scores=torch.empty(total, self.k, dtype=torch.float32, device=every.device),
            candidates=torch.empty(total, max(self.k, self.candidates), dtype=torch.int64, device=every.device),
            bounds=torch.empty(total, dtype=torch.float32, device=every.device),
        )

        def keep(where: slice | Tensor, found: SearchResult) -> None:
            result.ids[where], result.scores[where] = found.ids, found.scores
            result.candidates[where], result.bounds[where] = found.candidates, found.bounds

        def report(done: float) -> None:
            if self.progress is not None:
                self.progress(int(done), total)

        left, done = torch.arange(total, device=every.device), 0
        if queries is None and floor is None and self.columns is self.rows:
            left = left[:0] if self.allowed is None else left[self._others()]
            done = total - left.numel()
            best = self.scan_triangle(lambda share: report(0.99 * share * done))
            for index, ids, span in _parts(self.allowed, total, self.query_tile, every.device):
                keep(index, self.settle(ids, best, span, None))
            report(done)
        size = self.query_tile if self.scores.kernels is None else self.kernel_rows
        for where in left.split(size) if left.numel() else ():
            least = None if floor is None else floor[where]
            best = self.scan(every[where], least)
            keep(where, self.settle(every[where], best, slice(0, where.numel()), least))
            done += where.numel()
            report(done)
        return result

    def _others(self) -> Tensor:
        """bool: the rows that may not be returned, but have neighbours too."""
        assert self.allowed is not None
        return torch.ones(len(self.rows), dtype=torch.bool, device=self.allowed.device).index_fill_(
            0, self.allowed, False
        )


def search(
    rows: ScoredRows,
    k: int,
    candidates: int,
    *,
    queries: Tensor | None = None,
    columns: ScoredRows | None = None,
    offset: int = 0,
    allowed: Tensor | None = None,
    floor: Tensor | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """The k rows most similar to each query, itself excluded.

    Args:
        rows: the rows [V, d] whose neighbours are wanted, prepared.
        k: neighbours a query.
        candidates: how many rows of the coarse scan are kept for every query, at least k.
        queries: row ids int64 [Q]; None: all rows.
        columns: the rows [C, d] to search; None: `rows`. ids and candidates count in these.
        offset: row i of `rows` is row i + offset of `columns`, which need not exist.
        allowed: bool [C], columns that may be returned; None: all.
        floor: float32 [Q], scores that are known to be reached by k rows, of `columns` or others: pairs below it need
            not be returned, and bounds hold for what is above it only.
        progress: called with (queries done, queries in all).
    """
    if columns is None:
        columns = rows
    count = len(rows) if queries is None else queries.numel()
    return _Search(rows, columns, offset, allowed, k, candidates, count, progress).run(queries, floor)


def usual_candidates(k: int) -> int:
    """How many to keep for every query: most of a trained embedding's are then settled without a second search."""
    return 8 + 4 * k


def rescore(rows: ScoredRows, queries: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Each query's candidates [Q, c] (-1: none) with their scores, as `ranked`."""
    scores = rows.pair_scores(queries[:, None].expand_as(candidates), rows, candidates.clamp(min=0))
    return ranked(candidates, scores.masked_fill(candidates < 0, -torch.inf))


def improve(
    rows: ScoredRows, queries: Tensor, ids: Tensor, scores: Tensor, *, allowed: Tensor
) -> tuple[Tensor, Tensor]:
    """The k nearest of each query among k known ones, ids and scores [Q, k] as ranked, and the `allowed` rows."""
    again = _Search(rows, rows, 0, allowed, ids.shape[1], ids.shape[1], queries.numel(), None)
    ids, scores = ids.clone(), scores.clone()
    for part in torch.arange(queries.numel(), device=ids.device).split(again.query_tile):
        ids[part], scores[part] = again.exhaustive(queries[part], ids[part], scores[part], scores[part, -1])
    return ids, scores
