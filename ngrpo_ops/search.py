"""Exact nearest-neighbour search over a vocabulary, in tiles, on any device.

A coarse scan finds candidates with matrix multiplications; what is returned is re-scored pair by pair. Exactness does
not rest on luck: the scan computes *optimistic* scores, coarse score + a bound on every rounding error between it and
the re-scored value, so nothing outside the candidates can score above the smallest optimistic score kept. A query whose
k-th re-scored score is strictly above that is settled; the others are searched again with their k-th score as the
threshold, re-scoring everything that might reach it.

Scores are defined by `pair_scores`: float32 arithmetic on the stored rows (cosine: on rows normalised in float32), in
blocks of one fixed shape, so that a pair's bits do not depend on which other pairs are scored with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import Metric

# With these a search stays below 200 MiB beyond its inputs and outputs, and the matrix multiplications stay large.
_QUERY_TILE = 2048
_COLUMN_TILE = 8192
_TILE_ELEMENTS = 2**23  # of one tile of rows, float32; half of it for the queries
_PAIR_ELEMENTS = 2**21  # of one block of re-scored pairs
_PAIRS_AT_ONCE = 2**18  # sorted together where many rows are as near as the k-th
_UNIT_ROUNDOFF = 2.0**-24  # float32

Progress = Callable[[int, int], None]


@dataclass
class SearchResult:
    """What a search found, best first, and what a later refresh needs to certify it.

    ids, scores [Q, k]; candidates int64 [Q, c]; bounds float32 [Q]: no row outside the candidates scores above it.
    """

    ids: Tensor
    scores: Tensor
    candidates: Tensor
    bounds: Tensor


class ScoredRows:
    """The rows of an embedding in the form their metric scores them: float32, normalised for cosine."""

    def __init__(self, embedding: Tensor, metric: Metric) -> None:
        self.embedding = embedding
        self.metric = metric
        norms = torch.empty(embedding.shape[0], dtype=torch.float64, device=embedding.device)
        for rows in self.tiles():
            norms[rows] = torch.linalg.vector_norm(embedding[rows], dim=1, dtype=torch.float64)
        broken = (~norms.isfinite()).nonzero().flatten()
        if broken.numel():
            some = ", ".join(str(i) for i in broken[:8].tolist()) + (", ..." if broken.numel() > 8 else "")
            raise ValueError(f"embedding must be finite, got NaN or inf in {broken.numel()} rows: {some}")
        limit = 1e30 if metric == "cosine" else 1e18
        if float(norms.max()) > limit:
            raise ValueError(
                f"embedding must have rows of norm at most {limit:g}, beyond which {metric} scores overflow float32, "
                f"got {float(norms.max()):.3g}"
            )
        # A zero row (of a norm below 1e-30) has similarity 0 to everything.
        zero = norms < 1e-30
        self.inverse_norms = torch.where(zero, 0.0, 1.0 / norms).float() if metric == "cosine" else None
        self.norms = (~zero).float() if metric == "cosine" else norms.float()

    def tiles(self) -> Iterator[slice]:
        size = min(_COLUMN_TILE, max(1, _TILE_ELEMENTS // self.embedding.shape[1]))
        for start in range(0, self.embedding.shape[0], size):
            yield slice(start, min(start + size, self.embedding.shape[0]))

    def column_tiles(self, allowed: Tensor | None) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """The rows that may be returned, tile by tile: how to index them, and their ids, ascending."""
        for tile in self.tiles():
            ids = torch.arange(tile.start, tile.stop, device=self.embedding.device)
            if allowed is None:
                yield tile, ids
            elif (ids := ids[allowed[tile]]).numel():
                yield ids, ids

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        x = self.embedding[rows].float()
        return x if self.inverse_norms is None else x * self.inverse_norms[rows, None]

    def slack(self) -> float:
        """Relative bound on |coarse - exact| + |re-scored - exact|, in units of what `_augmented` multiplies it by."""
        rounding = 2.2 * (self.embedding.shape[1] + 16) * _UNIT_ROUNDOFF
        return rounding + 2.0 * _matmul_input_roundoff()

    def underflow(self) -> float:
        """Bound on what a coarse and a re-scored score lose together where products underflow, flushed or not."""
        return 2.0 * (self.embedding.shape[1] + 16) * torch.finfo(torch.float32).smallest_normal

    def pair_scores(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Scores of the pairs (rows[i], columns[i]), larger is nearer: float32 of the shape of `rows`."""
        shape, rows, columns = rows.shape, rows.reshape(-1), columns.reshape(-1)
        out = torch.empty(rows.numel(), dtype=torch.float32, device=rows.device)
        block = max(1, _PAIR_ELEMENTS // self.embedding.shape[1])
        for start in range(0, rows.numel(), block):
            used = min(block, rows.numel() - start)
            # Padded to the one block shape: a reduction may pick its order of summation by shape.
            r, c = rows.new_zeros(block), rows.new_zeros(block)
            r[:used], c[:used] = rows[start : start + used], columns[start : start + used]
            x, y = self[r], self[c]
            if self.metric == "l2":
                scores = x.sub_(y).square_().sum(-1).neg_()
            elif self.metric == "l1":
                scores = x.sub_(y).abs_().sum(-1).neg_()
            else:
                scores = x.mul_(y).sum(-1)
            out[start : start + used] = scores[:used]
        return out.add_(0.0).view(shape)  # + 0.0: no negative zeros


def _matmul_input_roundoff() -> float:
    """Unit roundoff of what a float32 matrix multiplication may round its inputs to (TF32, bfloat16)."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # the old and the new precision settings of torch disagree: assume the coarser
        precision = "medium"
    return {"highest": 0.0, "high": 2.0**-11}.get(precision, 2.0**-8)


def _augmented(rows: ScoredRows, index: slice | Tensor, slack: float, *, queries: bool) -> Tensor:
    """Rows with extra columns, so that one inner product of a query and a column is their optimistic score.

    cosine        x.y + s |x||y|                               columns: s |x|           against |y|
    dot           x.y + s |x||y| + t                           columns: s |x|, t        against |y|, 1
    l2            2 x.y - |x|^2 - |y|^2 + s (|x| + |y|)^2 + t  columns: 2 s |x|, t - (1 - s) |x|^2, 1
                                                               against: |y|, 1, -(1 - s) |y|^2

    The relative slack s underflows with the scores it is for; t bounds what underflow takes, flushed or not.
    """
    x, norm = rows.embedding[index], rows.norms[index]
    one, underflow = torch.ones_like(norm), rows.underflow()
    if rows.metric == "l2":
        square = (slack - 1.0) * norm.square()
        extra = [2.0 * slack * norm, square + underflow, one] if queries else [norm, one, square]
    else:
        extra = [slack * norm if queries else norm]
        if rows.metric == "dot":
            extra.append(underflow * one if queries else one)
    out = norm.new_empty(x.shape[0], x.shape[1] + len(extra))
    body = out[:, : x.shape[1]]  # written in place: a concatenation would copy the tile once more
    if rows.inverse_norms is None:
        body.copy_(x)
    else:
        torch.mul(x, rows.inverse_norms[index, None], out=body)
    if rows.metric == "l2" and queries:
        body.mul_(2.0)
    for column, values in enumerate(extra, start=x.shape[1]):
        out[:, column] = values
    return out


def _optimistic(rows: ScoredRows, queries: Tensor, index: slice | Tensor, slack: float) -> Tensor:
    """Optimistic scores of prepared `queries` (see `_prepared`) against the rows `index`."""
    if rows.metric == "l1":
        return torch.cdist(queries, rows[index], p=1.0).mul_(slack - 1.0)
    return queries @ _augmented(rows, index, slack, queries=False).T


def _prepared(rows: ScoredRows, queries: Tensor, slack: float) -> Tensor:
    return rows[queries] if rows.metric == "l1" else _augmented(rows, queries, slack, queries=True)


def _fill_at(matrix: Tensor, tile_ids: Tensor, ids: Tensor, value: float | bool) -> None:
    """In place, `value` where row i of a matrix over the ascending `tile_ids` has one of `ids[i]` [Q, n]."""
    position = torch.searchsorted(tile_ids, ids).clamp(max=tile_ids.numel() - 1)
    row, which = (tile_ids[position] == ids).nonzero(as_tuple=True)
    matrix[row, position[row, which]] = value


def _best_pairs(rows: Tensor, columns: Tensor, scores: Tensor, count: int, k: int) -> tuple[Tensor, Tensor]:
    """The k best pairs of each of `count` rows, equal scores by the lower column; every row must have k pairs."""
    order = torch.argsort(columns, stable=True)
    order = order[torch.argsort(scores[order], descending=True, stable=True)]
    order = order[torch.argsort(rows[order], stable=True)]
    starts = torch.searchsorted(rows[order], torch.arange(count, device=rows.device))
    best = order[starts[:, None] + torch.arange(k, device=rows.device)]
    return columns[best], scores[best]


def _exhaustive(
    rows: ScoredRows, queries: Tensor, allowed: Tensor | None, ids: Tensor, scores: Tensor, slack: float
) -> tuple[Tensor, Tensor]:
    """The exact top k of `queries`, given k re-scored neighbours of each as the threshold to beat."""
    k = ids.shape[1]
    prepared = _prepared(rows, queries, slack)
    ids, scores = ids.clone(), scores.clone()
    for index, tile_ids in rows.column_tiles(allowed):
        reaches = _optimistic(rows, prepared, index, slack) >= scores[:, -1:]
        # Not the query itself, nor what is already among the k.
        _fill_at(reaches, tile_ids, torch.cat([queries[:, None], ids], dim=1), False)
        many = reaches.sum(1).cumsum(0) // _PAIRS_AT_ONCE
        for part in torch.arange(len(queries), device=ids.device).split(
            many.unique_consecutive(return_counts=True)[1].tolist()
        ):
            row, column = reaches[part].nonzero(as_tuple=True)
            if not row.numel():
                continue
            column = tile_ids[column]
            ids[part], scores[part] = _best_pairs(
                torch.cat([torch.arange(len(part), device=ids.device).repeat_interleave(k), row]),
                torch.cat([ids[part].reshape(-1), column]),
                torch.cat([scores[part].reshape(-1), rows.pair_scores(queries[part[row]], column)]),
                len(part),
                k,
            )
    return ids, scores


def search(
    rows: ScoredRows,
    k: int,
    candidates: int,
    *,
    queries: Tensor | None = None,
    allowed: Tensor | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """The k rows most similar to each query, itself excluded.

    Args:
        rows: the embedding [V, d], prepared.
        k: neighbours a query; at least k allowed rows other than the query must exist.
        candidates: how many rows of the coarse scan are re-scored for every query, at least k.
        queries: row ids int64 [Q]; None: all rows.
        allowed: bool [V], rows that may be returned; None: all.
        progress: called with (queries done, queries in all).
    """
    device = rows.embedding.device
    if queries is None:
        queries = torch.arange(rows.embedding.shape[0], device=device)
    available = rows.embedding.shape[0] if allowed is None else int(allowed.sum())
    candidates = min(candidates, available)
    slack = rows.slack()
    total = queries.numel()
    result = SearchResult(
        ids=torch.empty(total, k, dtype=torch.int64, device=device),
        scores=torch.empty(total, k, dtype=torch.float32, device=device),
        candidates=torch.empty(total, candidates, dtype=torch.int64, device=device),
        bounds=torch.empty(total, dtype=torch.float32, device=device),
    )
    size = min(_QUERY_TILE, max(1, _TILE_ELEMENTS // (2 * rows.embedding.shape[1])))
    for start in range(0, total, size):
        block = slice(start, min(start + size, total))
        ids = queries[block]
        prepared = _prepared(rows, ids, slack)
        kept_scores = prepared.new_empty(ids.numel(), 0)
        kept_ids = ids.new_empty(ids.numel(), 0)
        for index, tile_ids in rows.column_tiles(allowed):
            optimistic = _optimistic(rows, prepared, index, slack)
            _fill_at(optimistic, tile_ids, ids[:, None], -torch.inf)
            scores, position = optimistic.topk(min(candidates, tile_ids.numel()), dim=1)
            kept_scores = torch.cat([kept_scores, scores], dim=1)
            kept_ids = torch.cat([kept_ids, tile_ids[position]], dim=1)
            if kept_scores.shape[1] > candidates:
                kept_scores, order = kept_scores.topk(candidates, dim=1)
                kept_ids = kept_ids.gather(1, order)
        bounds = kept_scores.amin(1) if available > candidates else kept_scores.new_full((ids.numel(),), -torch.inf)
        top_ids, top_scores = rescore(rows, ids, kept_ids, k)
        unsettled = (top_scores[:, -1] <= bounds).nonzero().squeeze(1)
        for part in unsettled.split(_QUERY_TILE // 8):
            top_ids[part], top_scores[part] = _exhaustive(
                rows, ids[part], allowed, top_ids[part], top_scores[part], slack
            )
        result.ids[block], result.scores[block] = top_ids, top_scores
        result.candidates[block], result.bounds[block] = kept_ids, bounds
        if progress is not None:
            progress(block.stop, total)
    return result


def rescore(rows: ScoredRows, queries: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of each query's candidates [Q, c] by exact score, equal scores by the lower id; never the query."""
    candidates = candidates.sort(dim=1).values
    scores = rows.pair_scores(queries[:, None].expand_as(candidates).contiguous(), candidates)
    scores = scores.masked_fill(candidates == queries[:, None], -torch.inf)
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return candidates.gather(1, order[:, :k]), scores[:, :k].contiguous()
