"""Exact nearest-neighbor search over a vocabulary, in tiles, on any device.

A scan finds candidates with matrix multiplications, and the candidates are then scored pair by pair. The scan computes
upper bounds of the scores (see `bounds`), so no row outside the candidates can score above a known bound. A query whose
k-th score is strictly above that bound is certified. The other queries are searched again, with the k-th score as the
threshold, and every pair that might reach the threshold is scored.

A search of a whole table multiplies only the upper triangle of its tiles. Each tile serves its rows and its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .._ties import best_pairs, ranked
from .bounds import OptimisticScores
from .candidates import GROUP_SIZE, RunningBest, ScoreTile, padded_to_groups
from .scores import ScoredRows, rows_per_tile

_QUERY_TILE = 2048  # queries in one tile
_SQUARE_TILE = 3072  # rows of a square tile
_TILE_BYTES = 2**27  # of one square tile of scores, with the rows it is multiplied from
_PAIRS_AT_ONCE = 2**18  # pairs sorted together where many rows are as near as the k-th
_KERNEL_ROWS = 2**14  # rows of a block that the kernels multiply with another
_KERNEL_ELEMENTS = 2**25  # of such a block

Progress = Callable[[int, int], None]


@dataclass
class SearchResult:
    """What a search found, best first, and what a later refresh needs to certify it.

    Attributes:
        ids: int64 [Q, k]; -1 where there are fewer than k rows.
        scores: float32 [Q, k]; -inf where the id is -1.
        candidates: int64 [Q, c], beginning with the ids; -1 where there are fewer.
        bounds: float32 [Q]: no row outside the candidates scores above it.
    """

    ids: Tensor
    scores: Tensor
    candidates: Tensor
    bounds: Tensor


def default_num_candidates(k: int) -> int:
    """Candidates kept for a query: enough to certify most queries of a trained embedding without a second search."""
    return 8 + 4 * k


def search(
    rows: ScoredRows,
    k: int,
    num_candidates: int,
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
        num_candidates: rows of the scan that are kept for every query, at least k.
        queries: row ids int64 [Q]; None: all rows.
        columns: the rows [C, d] to search; None: `rows`. The ids of the result count in these.
        offset: row i of `rows` is row i + offset of `columns`, where there is such a row.
        allowed: bool [C], columns that may be returned; None: all.
        floor: float32 [Q], scores that k rows, of `columns` or others, are known to reach. Pairs below the floor need
            not be returned, and the bounds only cover scores above it.
        progress: called with (queries done, queries in all).
    """
    if columns is None:
        columns = rows
    count = len(rows) if queries is None else queries.numel()
    return _Search(rows, columns, offset, allowed, k, num_candidates, count, progress).run(queries, floor)


def rescore(rows: ScoredRows, queries: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates [Q, c] of each query (-1: none) and their scores, best first, equal scores by the lower id."""
    scores = rows.pair_scores(queries[:, None].expand_as(candidates), rows, candidates.clamp(min=0))
    return ranked(candidates, scores.masked_fill(candidates < 0, -torch.inf))


def update_neighbors(
    rows: ScoredRows, queries: Tensor, ids: Tensor, scores: Tensor, *, new: Tensor
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of each query among k known neighbors and the rows of a mask.

    Args:
        rows: the rows [V, d].
        queries: row ids int64 [Q].
        ids, scores: [Q, k], the known neighbors, ranked.
        new: bool [V], the other rows to consider.

    Returns:
        ids and scores [Q, k], ranked.
    """
    search_new = _Search(rows, rows, 0, new, ids.shape[1], ids.shape[1], queries.numel(), None)
    ids, scores = ids.clone(), scores.clone()
    for part in torch.arange(queries.numel(), device=ids.device).split(search_new.query_tile):
        ids[part], scores[part] = search_new.exhaustive_search(queries[part], ids[part], scores[part], scores[part, -1])
    return ids, scores


class _Search:
    """One search of `columns` for the neighbors of `rows`; row i is column i + offset, and not its own neighbor."""

    def __init__(
        self,
        rows: ScoredRows,
        columns: ScoredRows,
        offset: int,
        allowed: Tensor | None,
        k: int,
        num_candidates: int,
        count: int,
        progress: Progress | None,
    ) -> None:
        self.rows, self.columns, self.offset, self.k = rows, columns, offset, k
        self.allowed = None if allowed is None else allowed.nonzero().squeeze(1)
        available = len(columns) if self.allowed is None else self.allowed.numel()
        self.num_candidates = max(1, min(num_candidates, available))
        self.complete = self.num_candidates >= available
        self.scores = OptimisticScores(rows, columns, count)
        self.float32_scores = OptimisticScores(rows, columns, 0)  # tighter, for the few queries that are searched again
        self.progress = progress
        d = rows.embedding.shape[1]
        self.column_tile = columns.tile_size
        self.query_tile = rows_per_tile(d, _QUERY_TILE)
        # For l1 the kernels read float32 rows and have tiles of half the size.
        divisor = 2 if rows.metric == "l1" else 1
        self.kernel_rows = max(1, min(_KERNEL_ROWS, _KERNEL_ELEMENTS // d) // divisor)
        # Scores that the kernels keep of each tile. Few of the hundreds of tiles have several of the k nearest rows.
        # Where one has more than this, the bound does not certify the query.
        self.best_per_tile = 2 if k <= 3 else 4

    def run(self, queries: Tensor | None, floor: Tensor | None) -> SearchResult:
        device = self.rows.embedding.device
        query_ids = torch.arange(len(self.rows), device=device) if queries is None else queries
        total = query_ids.numel()
        result = SearchResult(
            ids=torch.empty(total, self.k, dtype=torch.int64, device=device),
            scores=torch.empty(total, self.k, dtype=torch.float32, device=device),
            candidates=torch.empty(total, max(self.k, self.num_candidates), dtype=torch.int64, device=device),
            bounds=torch.empty(total, dtype=torch.float32, device=device),
        )

        def store(where: slice | Tensor, found: SearchResult) -> None:
            result.ids[where], result.scores[where] = found.ids, found.scores
            result.candidates[where], result.bounds[where] = found.candidates, found.bounds

        def report(done: float) -> None:
            if self.progress is not None:
                self.progress(int(done), total)

        remaining, done = torch.arange(total, device=device), 0
        if queries is None and floor is None and self.columns is self.rows:
            remaining = remaining[:0] if self.allowed is None else remaining[self._not_allowed()]
            done = total - remaining.numel()
            best = self.scan_triangle(lambda fraction: report(0.99 * fraction * done))
            for index, ids, span in _blocks(self.allowed, total, self.query_tile, device):
                store(index, self.rescore_and_certify(ids, best, span, None))
            report(done)
        size = self.query_tile if self.scores.kernels is None else self.kernel_rows
        for where in remaining.split(size) if remaining.numel() else ():
            query_floor = None if floor is None else floor[where]
            best = self.scan(query_ids[where], query_floor)
            store(where, self.rescore_and_certify(query_ids[where], best, slice(0, where.numel()), query_floor))
            done += where.numel()
            report(done)
        return result

    def scan(self, queries: Tensor, floor: Tensor | None) -> RunningBest:
        """The best optimistic scores of some queries.

        Args:
            floor: float32 [q], the lowest scores that matter; None: all do.
        """
        scores, rows = self.scores, slice(0, queries.numel())
        if scores.kernels is not None:
            return self.scan_fused(queries, floor)
        tile = ScoreTile(scores, queries.numel(), self.column_tile)
        floor = None if floor is None else scores.threshold_below(floor)
        best = RunningBest(queries.numel(), self.num_candidates, floor, like=tile.memory)
        prepared = scores.prepared_queries(queries)
        for index, ids in self.column_blocks(self.column_tile):
            values = tile.multiply(prepared, scores.prepared_columns(index))
            _fill_at(values, ids, (queries + self.offset)[:, None], -torch.inf)
            best.update(rows, values, ids, dim=1)
        return best

    def scan_fused(self, queries: Tensor, floor: Tensor | None) -> RunningBest:
        """`scan` by the kernels, which return only the best scores of each tile."""
        scores, rows = self.scores, slice(0, queries.numel())
        prepared = scores.prepared_queries(queries)
        floor = None if floor is None else scores.threshold_below(floor)
        best = RunningBest(queries.numel(), self.num_candidates, floor, like=scores.columns.norms)
        for index, ids in self.column_blocks(self.kernel_rows):
            columns = scores.prepared_columns(index)
            values, places = scores.tile_best(
                prepared, columns, _places(ids, queries + self.offset), self.best_per_tile
            )
            best.merge_tile_best(rows, values, places, ids)
        return best

    def scan_triangle(self, report: Callable[[float], None]) -> RunningBest:
        """The best optimistic scores of all allowed rows against each other. A tile serves its rows and its columns.

        The tiles on the diagonal come first: they give every row a threshold.
        """
        scores, device = self.scores, self.columns.embedding.device
        count = len(self.columns) if self.allowed is None else self.allowed.numel()
        fused = scores.kernels is not None
        size = self.kernel_rows if fused else min(padded_to_groups(count), self._square_tile())
        tile = None if fused else ScoreTile(scores, size, size)
        best = RunningBest(count, self.num_candidates, None, like=scores.columns.norms if tile is None else tile.memory)
        blocks = list(_blocks(self.allowed, len(self.columns), size, device))
        done, total = 0, len(blocks) * (len(blocks) + 1) // 2
        for diagonal in (True, False):
            for i, (index, ids, rows) in enumerate(blocks):
                queries = scores.prepared_queries(index)
                for other_index, other_ids, columns in blocks[i : i + 1] if diagonal else blocks[i + 1 :]:
                    prepared = scores.prepared_columns(other_index)
                    done += 1
                    report(done / total)
                    if tile is None:
                        row_values, row_places, column_values, column_places = scores.tile_best_symmetric(
                            queries, prepared, self.best_per_tile, diagonal=diagonal
                        )
                        best.merge_tile_best(rows, row_values, row_places, other_ids)
                        best.merge_tile_best(columns, column_values, column_places, ids)
                        continue
                    values = tile.multiply(queries, prepared)
                    if diagonal:
                        values.diagonal()[: ids.numel()] = -torch.inf
                    else:
                        best.update(columns, values[:, : other_ids.numel()], ids, dim=0)
                    best.update(rows, values[: ids.numel()], other_ids, dim=1)
        return best

    def rescore_and_certify(
        self, queries: Tensor, best: RunningBest, span: slice, floor: Tensor | None
    ) -> SearchResult:
        """The k nearest rows of some queries, given what the scan kept of them at `span`."""
        scores, k = self.scores, self.k
        kept = best.ids[span].long()
        upper_bounds = scores.upper_bound(best.values[span])
        bounds = scores.upper_bound(best.thresholds(span))
        if self.complete:  # every column is a candidate, but those below the floor
            bounds = best.dropped_bound[span].float()
        # A candidate that cannot be among the k nearest need not be scored.
        rows = queries[:, None].expand_as(kept)
        lower_bounds = upper_bounds - scores.error_bound(upper_bounds, rows, kept.clamp(min=0))
        lower_bounds.masked_fill_(kept < 0, -torch.inf)
        least = (
            lower_bounds.topk(k, dim=1).values[:, -1]
            if kept.shape[1] >= k
            else lower_bounds.new_full(kept.shape[:1], -torch.inf)
        )
        if floor is not None:
            least = torch.maximum(least, floor)
        contenders = (upper_bounds >= least[:, None]) & (kept >= 0)
        exact = torch.full_like(upper_bounds, -torch.inf)
        exact[contenders] = self.rows.pair_scores(rows[contenders], self.columns, kept[contenders])
        candidates, exact = ranked(kept, exact)
        if candidates.shape[1] < k:
            missing = k - candidates.shape[1]
            candidates = torch.nn.functional.pad(candidates, (0, missing), value=-1)
            exact = torch.nn.functional.pad(exact, (0, missing), value=-torch.inf)
        found = SearchResult(candidates[:, :k].clone(), exact[:, :k].clone(), candidates, bounds)
        kth = found.scores[:, -1] if floor is None else torch.maximum(found.scores[:, -1], floor)
        uncertified = ((kth <= bounds) & (bounds > -torch.inf)).nonzero().squeeze(1)
        for part in uncertified.split(_QUERY_TILE // 8) if uncertified.numel() else ():
            found.ids[part], found.scores[part] = self.exhaustive_search(
                queries[part], found.ids[part], found.scores[part], kth[part]
            )
            # The k neighbors are now the only candidates, and the k-th score the bound: the scan may have missed some.
            candidates[part] = -1
            candidates[part, :k] = found.ids[part]
            found.bounds[part] = found.scores[part, -1]
        return found

    def exhaustive_search(self, queries: Tensor, ids: Tensor, scores: Tensor, kth: Tensor) -> tuple[Tensor, Tensor]:
        """The k nearest rows of `queries` from all pairs that might reach a score.

        Args:
            ids, scores: [q, k], scored neighbors that are already known, ranked.
            kth: float32 [q], the score to reach.
        """
        k, optimistic = self.k, self.float32_scores
        prepared = optimistic.prepared_queries(queries)
        tile = ScoreTile(optimistic, queries.numel(), self.column_tile)
        ids, scores, kth = ids.clone(), scores.clone(), kth.clone()
        for index, tile_ids in self.column_blocks(self.column_tile):
            values = tile.multiply(prepared, optimistic.prepared_columns(index))
            reaches = values[: queries.numel(), : tile_ids.numel()] > optimistic.threshold_below(kth[:, None])
            # Neither the query itself nor the neighbors that are known.
            _fill_at(reaches, tile_ids, torch.cat([(queries + self.offset)[:, None], ids], dim=1), False)
            # Consecutive queries, in batches of about _PAIRS_AT_ONCE pairs.
            batch = reaches.sum(1).cumsum(0) // _PAIRS_AT_ONCE
            for part in torch.arange(len(queries), device=ids.device).split(
                batch.unique_consecutive(return_counts=True)[1].tolist()
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

    def column_blocks(self, size: int) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """The columns that may be returned, block by block: how to index them, and their ids, ascending."""
        for index, ids, _ in _blocks(self.allowed, len(self.columns), size, self.columns.embedding.device):
            yield index, ids

    def _square_tile(self) -> int:
        """Rows of a square tile that fits in _TILE_BYTES with the two blocks of rows it is multiplied from."""
        d, size = self.rows.embedding.shape[1], torch.finfo(self.scores.dtype).bits // 8
        side = int((d * d + _TILE_BYTES / size) ** 0.5) - d // 2
        return max(GROUP_SIZE, min(_SQUARE_TILE, side // GROUP_SIZE * GROUP_SIZE))

    def _not_allowed(self) -> Tensor:
        """bool [V]: the rows that may not be returned. They have neighbors too."""
        assert self.allowed is not None
        mask = torch.ones(len(self.rows), dtype=torch.bool, device=self.allowed.device)
        return mask.index_fill_(0, self.allowed, False)


def _blocks(
    ids: Tensor | None, total: int, size: int, device: torch.device
) -> Iterator[tuple[slice | Tensor, Tensor, slice]]:
    """Ascending ids (None: all of `total`) in blocks: how to index rows by them, the ids, and their positions."""
    count = total if ids is None else ids.numel()
    for start in range(0, count, size):
        span = slice(start, min(start + size, count))
        if ids is None:
            yield span, torch.arange(span.start, span.stop, device=device), span
        else:
            yield ids[span], ids[span], span


def _places(tile_ids: Tensor, ids: Tensor) -> Tensor:
    """int32: the positions of `ids` in the ascending `tile_ids`, -1 where they are not in it."""
    position = torch.searchsorted(tile_ids, ids).clamp(max=tile_ids.numel() - 1)
    return torch.where(tile_ids[position] == ids, position, -1).int()


def _fill_at(matrix: Tensor, tile_ids: Tensor, ids: Tensor, value: float | bool) -> None:
    """Writes `value`, in place, where row i of a matrix over the ascending `tile_ids` has one of `ids[i]` [Q, n]."""
    position = torch.searchsorted(tile_ids, ids).clamp(max=tile_ids.numel() - 1)
    row, which = (tile_ids[position] == ids).nonzero(as_tuple=True)
    matrix[row, position[row, which]] = value
