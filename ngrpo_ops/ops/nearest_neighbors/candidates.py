"""The pairs that a scan keeps of each query, and the memory of one tile of scores."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .bounds import OptimisticScores, PreparedColumns
from .scores import ScoredRows

GROUP_SIZE = 16  # scores of which the maximum is compared first
_MAX_GROUPS = 2**15  # groups that are looked into at a time
_MAX_PAIRS = 2**20  # pairs that are held before all of them are scored, and all but the best dropped; 64 bytes each


class ScanSettings(NamedTuple):
    """What is scanned, by the kernels or in plain torch.

    Attributes:
        rows: the rows whose neighbors are wanted.
        columns: the rows that are scanned. Row i of `rows` is column i + `offset`, and not its own neighbor.
        offset: see `columns`.
        eligible: int64, ascending, the columns that are scanned; None: all.
        k, kept: columns that are wanted and that are kept of each query, k <= kept.
        has_copies: bool [C], columns that stand for equal ones; None: none does.
    """

    rows: ScoredRows
    columns: ScoredRows
    offset: int
    eligible: Tensor | None
    k: int
    kept: int
    has_copies: Tensor | None = None

    @property
    def num_columns(self) -> int:
        return len(self.columns) if self.eligible is None else self.eligible.numel()


class Pairs(NamedTuple):
    """Pairs of a query and a column.

    Attributes:
        rows: int32 [n], positions among the queries.
        columns: int32 [n], ids of columns.
        upper: float32 [n], at least the score.
        lower: float32 [n], at most the score. Where both are equal they are the score.
    """

    rows: Tensor
    columns: Tensor
    upper: Tensor
    lower: Tensor

    def at(self, index: Tensor) -> Pairs:
        """The pairs at int64 positions, or where a mask is True."""
        index = index.nonzero().squeeze(1) if index.dtype == torch.bool else index
        return Pairs(*(field[index] for field in self))


class Found(NamedTuple):
    """What a scan found of n queries.

    Attributes:
        columns: int64 [n, c], the ids of the best columns, best first; -1 where there are fewer.
        scores: float32 [n, c]; -inf where the id is -1, and where a pair was not scored. The first k always are.
        bounds: float32 [n]: no other column scores above it. -inf: there is no other column.
    """

    columns: Tensor
    scores: Tensor
    bounds: Tensor


class Candidates:
    """The pairs of some queries that may be among the nearest, and the threshold that a new pair must reach.

    A threshold is a proven lower bound of a score that is kept. It comes from lower bounds of scores: from
    `upper_bound - error_bound`, or from the score itself where it is known. A pair is taken where its upper bound is at
    least the threshold. So no pair of the k nearest is ever missed, and equal scores are told apart by their ids in the
    end. Thresholds only rise, and a pair that was left out scores at most the threshold.

    A search keeps k pairs of each query: the threshold is the k-th largest lower bound. A build keeps more, for the
    certificates of later refreshes, and the bound that it needs is the threshold of the last. There are two cases.

    - The last kept upper bound is below the k-th lower bound. Then it serves as the threshold itself. It is a bound of
      all that is left out, fewer pairs are taken than with a lower bound, and only the pairs that may be among the k
      nearest are scored in the end.
    - Otherwise the threshold is the last kept lower bound, and all pairs are scored in the end. The bound is then
      exact, so that a later refresh certifies the query if it can be certified at all.

    Both thresholds are at most the k-th lower bound. Where more than `capacity` pairs reach the thresholds, as among
    thousands of nearly equal rows, all are scored and all but the best are dropped.

    Args:
        scores: the upper bounds.
        queries: row ids int64 [n].
        k: the nearest columns that are wanted of each query.
        kept: the columns that are kept of each query, at least k.
        floor: float32 [n], scores that k columns are known to reach; None: nothing is known.
        capacity: pairs that are held, at least twice those that are kept; None: a million.
    """

    def __init__(
        self,
        scores: OptimisticScores,
        queries: Tensor,
        k: int,
        kept: int,
        floor: Tensor | None = None,
        capacity: int | None = None,
    ) -> None:
        self.scores, self.queries, self.k, self.kept = scores, queries, k, kept
        n, device = queries.numel(), queries.device
        self.capacity = max(_MAX_PAIRS if capacity is None else min(_MAX_PAIRS, capacity), 2 * kept * n)
        lowest = torch.full((n,), -torch.inf, dtype=torch.float32, device=device)
        self.thresholds = lowest if floor is None else floor.clone()
        self._kth = self.thresholds  # the k-th lower bounds; no pair below is among the k nearest
        self._is_far = torch.zeros(n, dtype=torch.bool, device=device)  # the first of the two cases
        none = torch.zeros(0, dtype=torch.int32, device=device)
        self._pairs = Pairs(none, none, lowest[:0], lowest[:0])
        self._new: list[Pairs] = []
        self._pending = 0
        self._is_fresh = floor is None or bool((floor == -torch.inf).any())  # no tile was seen yet

    def __len__(self) -> int:
        return self.queries.numel()

    def add(self, ids: Tensor, scores: Tensor) -> None:
        """Takes in known pairs: ids int64 [n, m] and scores float32 [n, m], -inf where there is none."""
        rows = torch.arange(len(self), device=ids.device)[:, None].expand_as(ids)
        known = scores > -torch.inf
        self._append(Pairs(rows[known].int(), ids[known].int(), scores[known], scores[known]))

    def take(self, tile: Tensor, ids: Tensor, dim: int) -> None:
        """Takes the pairs that reach the thresholds out of a tile of optimistic scores.

        The maxima of groups of scores are cheap and tell where to look.

        Args:
            tile: the scores of the queries against the columns `ids`, padded to whole groups.
            ids: int64, the ids of the columns.
            dim: the dimension of the tile along which the columns lie.
        """
        groups = tile.shape[dim] // GROUP_SIZE
        # Member m of group g is at m * groups + g, so that a maximum runs over rows of memory and not along them.
        members = tile.unflatten(dim, (GROUP_SIZE, groups))
        # Read as integers, bfloat16 numbers from 0 on keep their order and are above all negative ones. Integers
        # compare faster.
        least = self.scores.threshold_below(self.thresholds)
        as_integers = tile.dtype == torch.bfloat16 and bool((least >= 0).all())
        maxima = (members.view(torch.int16) if as_integers else members).amax(dim)
        if self._is_fresh:
            self._is_fresh = False
            self._set_first_thresholds(members, maxima, ids, dim)
            least = self.scores.threshold_below(self.thresholds)
        hit = maxima > (least.view(torch.int16) if as_integers else least).unsqueeze(dim)
        for part in parts(hit.sum(dim), _MAX_GROUPS):
            self._take_groups(part, hit, members, least, ids, dim)
            if self._pending > self.kept * len(self):
                self.tighten()
                least = self.scores.threshold_below(self.thresholds)

    def _set_first_thresholds(self, members: Tensor, maxima: Tensor, ids: Tensor, dim: int) -> None:
        """Thresholds from the first tile. The largest scores of `kept` groups belong to as many pairs."""
        if maxima.shape[dim] < self.kept:
            return
        group = maxima.topk(self.kept, dim=dim, sorted=False).indices
        group = group if dim == 1 else group.T
        row = torch.arange(group.shape[0], device=group.device)[:, None]
        each = torch.arange(GROUP_SIZE, device=group.device)
        place = (row[:, :, None], each, group[:, :, None]) if dim == 1 else (each, group[:, :, None], row[:, :, None])
        value, m = members[place].max(2)
        column = ids[(group + maxima.shape[dim] * m).clamp(max=ids.numel() - 1)]  # padding is at -inf
        upper = self.scores.upper_bound(value)
        self.thresholds = torch.maximum(self.thresholds, self._lower_bound(upper, row, column).amin(1))

    def _lower_bound(self, upper: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        lower = upper - self.scores.error_bound(upper, self.queries[rows].expand_as(columns), columns)
        return torch.where(upper == -torch.inf, -torch.inf, lower)

    def _take_groups(self, part: slice, hit: Tensor, members: Tensor, least: Tensor, ids: Tensor, dim: int) -> None:
        """Takes the pairs of the queries `part` in the groups that were hit."""
        least = least[part]
        if dim == 1:
            row, group = hit[part].nonzero(as_tuple=True)
            values = members[part].transpose(1, 2)[row, group]
            pair, m = (values > least[row, None]).nonzero(as_tuple=True)
            values = values[pair, m]
        else:
            group, row = hit[:, part].nonzero(as_tuple=True)
            values = members[:, :, part][:, group, row]  # in the order of the tile in memory
            m, pair = (values > least[row]).nonzero(as_tuple=True)
            values = values[m, pair]
        if pair.numel():
            rows = row[pair] + part.start
            columns = ids[group[pair] + hit.shape[dim] * m]
            upper = self.scores.upper_bound(values)
            self._append(Pairs(rows.int(), columns.int(), upper, self._lower_bound(upper, rows, columns)))

    def _append(self, pairs: Pairs) -> None:
        self._new.append(pairs)
        self._pending += pairs.rows.numel()

    def tighten(self) -> None:
        """Merges the new pairs, raises the thresholds, and drops the pairs that do not reach them."""
        if not self._pending:
            return
        pairs = Pairs(*(torch.cat(field) for field in zip(self._pairs, *self._new, strict=True)))
        self._new, self._pending = [], 0
        pairs = pairs.at(pairs.upper >= self.thresholds[pairs.rows])
        pairs = pairs.at(_sort_keys(pairs.rows, pairs.upper).argsort())  # the largest upper bounds of each query first
        if pairs.rows.numel():
            first, counts = self._spans(pairs)
            place = torch.arange(self.kept, device=counts.device)
            is_there = place < counts[:, None]
            place = (first[:, None] + place).clamp(max=pairs.rows.numel() - 1)
            lower = torch.where(is_there, pairs.lower[place], -torch.inf)
            # The least lower bound of k pairs, which are the k with the largest upper bounds.
            self._kth = torch.maximum(self._kth, lower[:, : self.k].amin(1))
            last = lower.amin(1)
            if self.kept > self.k:
                upper = torch.where(is_there[:, -1], pairs.upper[place[:, -1]], -torch.inf)
                self._is_far = self._kth > upper
                last = torch.where(self._is_far, upper, last)
            self.thresholds = torch.maximum(self.thresholds, last)
            pairs = pairs.at(pairs.upper >= self.thresholds[pairs.rows])
        self._pairs = pairs
        if pairs.rows.numel() > self.capacity:
            self._drop_all_but_the_best()

    def _drop_all_but_the_best(self) -> None:
        pairs = self._ranked(torch.ones_like(self._is_far))
        first, counts = self._spans(pairs)
        place = torch.arange(pairs.rows.numel(), device=first.device) - first[pairs.rows]
        for count, thresholds in ((self.k, self._kth), (self.kept, self.thresholds)):
            reached = (counts >= count).nonzero().squeeze(1)
            thresholds[reached] = torch.maximum(thresholds[reached], pairs.upper[first[reached] + count - 1])
        self._pairs = pairs.at(place < self.kept)

    def _spans(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Where the pairs of each query begin, and how many there are, int64 [n] each."""
        counts = torch.bincount(pairs.rows, minlength=len(self))
        return counts.cumsum(0) - counts, counts

    def _ranked(self, all_of: Tensor) -> Pairs:
        """The pairs query after query, the highest scores first, equal scores by the lower column.

        Pairs that may be among the k nearest are scored. Pairs that are not scored come last, by their upper bounds.

        Args:
            all_of: bool [n], queries of which every pair is scored.
        """
        pairs, scores = self._pairs, self.scores
        unknown = (pairs.lower < pairs.upper) & (all_of[pairs.rows] | (pairs.upper >= self._kth[pairs.rows]))
        unknown = unknown.nonzero().squeeze(1)
        exact = scores.queries.pair_scores(
            self.queries[pairs.rows[unknown]], scores.columns, pairs.columns[unknown].long()
        )
        upper, lower = pairs.upper.index_copy(0, unknown, exact), pairs.lower.index_copy(0, unknown, exact)
        pairs = Pairs(pairs.rows, pairs.columns, upper, lower)
        return pairs.at(in_order(2 * pairs.rows + (pairs.lower < pairs.upper), pairs.columns, pairs.upper))

    def finish(self, is_shared: Tensor | None = None, has_copies: Tensor | None = None) -> Found:
        """Ends the scan.

        Args:
            is_shared: bool [n]: all columns of these queries are scored. None: of no query.
            has_copies: bool [C]: all columns of a query that has such a column are scored. None: no column is such.
        """
        self.tighten()
        all_of = ~self._is_far if self.kept > self.k else torch.ones_like(self._is_far)
        if is_shared is not None:
            all_of |= is_shared
        if has_copies is not None:
            all_of[self._pairs.rows[has_copies[self._pairs.columns]]] = True
        pairs = self._ranked(all_of)
        first, _ = self._spans(pairs)
        place = torch.arange(pairs.rows.numel(), device=first.device) - first[pairs.rows]
        n, is_kept = len(self), place < self.kept
        columns = torch.full((n, self.kept), -1, dtype=torch.int64, device=first.device)
        scores = torch.full((n, self.kept), -torch.inf, dtype=torch.float32, device=first.device)
        where = (pairs.rows[is_kept], place[is_kept])
        columns[where] = pairs.columns[is_kept].long()
        scores[where] = torch.where(pairs.lower == pairs.upper, pairs.upper, -torch.inf)[is_kept]
        bounds = self.thresholds.scatter_reduce(0, pairs.rows[~is_kept].long(), pairs.upper[~is_kept], "amax")
        return Found(columns, scores, bounds)


def _sort_keys(rows: Tensor, values: Tensor) -> Tensor:
    """int64 [n]: in their order rows rise, and within a row float32 values fall."""
    bits = (values + 0.0).view(torch.int32)  # + 0.0: -0.0 becomes 0.0
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (rows.long() << 32) - rising.long()


def in_order(rows: Tensor, columns: Tensor, scores: Tensor) -> Tensor:
    """int64 [n]: the order of pairs in which rows rise, float32 scores fall, and columns of equal scores rise."""
    order = columns.argsort()
    return order[_sort_keys(rows[order], scores[order]).argsort(stable=True)]


def parts(counts: Tensor, limit: int) -> list[slice]:
    """Consecutive queries, in parts with about `limit` counts. One query may have more."""
    sums = counts.cumsum(0)
    if not counts.numel() or int(sums[-1]) <= limit:
        return [slice(0, counts.numel())]
    sizes = ((sums - 1).clamp(min=0) // limit).unique_consecutive(return_counts=True)[1].tolist()
    slices, start = [], 0
    for size in sizes:
        slices.append(slice(start, start + size))
        start += size
    return slices


class ScoreTile:
    """Memory for one tile of scores, which is used again and again."""

    def __init__(self, scores: OptimisticScores, rows: int, columns: int) -> None:
        self.scores = scores
        shape = (padded_to_groups(rows), padded_to_groups(columns))
        self.memory = torch.empty(shape, dtype=scores.dtype, device=scores.columns.embedding.device)

    def multiply(self, queries: Tensor, columns: PreparedColumns) -> Tensor:
        """Optimistic scores of prepared rows, padded to whole groups in both dimensions with -inf."""
        q, n = queries.shape[0], columns.rows.shape[0]
        tile = self.memory[: padded_to_groups(q), : padded_to_groups(n)]
        self.scores.write_tile(queries, columns, tile[:q, :n])
        tile[q:], tile[:, n:] = -torch.inf, -torch.inf
        return tile


def padded_to_groups(n: int) -> int:
    """The smallest number of at least n that is a multiple of the group size."""
    return -(-n // GROUP_SIZE) * GROUP_SIZE
