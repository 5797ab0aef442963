"""The best candidates of every row that a scan has seen so far, and the memory of one tile of scores."""

from __future__ import annotations

import torch
from torch import Tensor

from .bounds import OptimisticScores

GROUP_SIZE = 16  # scores of which the maximum is compared first
_MAX_HITS = 2**16  # groups that are looked into at a time


class RunningBest:
    """The c highest scores seen so far of each of n rows, and the ids of their columns.

    Scores at or below a row's floor are not kept. No score that was seen and is not kept is above `thresholds`.

    Args:
        n, c: rows, and scores kept of each.
        floor: [n], in the dtype of the scores; None: no floor.
        like: a tensor of the dtype and device of the scores.
    """

    def __init__(self, n: int, c: int, floor: Tensor | None, *, like: Tensor) -> None:
        self.values = like.new_full((n, c), -torch.inf)
        self.ids = torch.full((n, c), -1, dtype=torch.int32, device=like.device)
        self.floor = like.new_full((n,), -torch.inf) if floor is None else floor
        self.dropped_bound = like.new_full((n,), -torch.inf)  # no score that a kernel left out of its tile is above it

    def thresholds(self, rows: slice = slice(None)) -> Tensor:
        """The values that a score must exceed to be kept."""
        return torch.maximum(torch.maximum(self.values[rows, -1], self.floor[rows]), self.dropped_bound[rows])

    def merge_tile_best(self, rows: slice, values: Tensor, places: Tensor, ids: Tensor) -> None:
        """Takes in the best T scores of each tile.

        Args:
            rows: consecutive rows.
            values: [n, tiles, T], the scores of these rows, best first.
            places: [n, tiles, T], where their columns are in `ids`, or -1.
            ids: the ids of the columns.
        """
        self.dropped_bound[rows] = torch.maximum(self.dropped_bound[rows], values[:, :, -1].amax(1))
        found_ids = torch.where(places < 0, -1, ids[places.clamp(min=0)]).int().flatten(1)
        all_ids = torch.cat([self.ids[rows], found_ids], dim=1)
        all_values = torch.cat([self.values[rows], values.flatten(1)], dim=1)
        self.values[rows], order = all_values.topk(self.values.shape[1], dim=1)
        self.ids[rows] = all_ids.gather(1, order)

    def update(self, rows: slice, tile: Tensor, ids: Tensor, dim: int) -> None:
        """Takes in a tile of scores.

        The maxima of groups of scores are cheap and tell where to look. The c best scores of a row lie in the c groups
        with the highest maxima, and only in groups whose maximum exceeds the row's threshold.

        Args:
            rows: consecutive rows.
            tile: their scores against the columns `ids`, padded to whole groups.
            ids: the ids of the columns.
            dim: the dimension of the tile along which the columns lie.
        """
        size = max(1, _MAX_HITS // self.values.shape[1])
        for start in range(rows.start, rows.stop, size):
            block = slice(start, min(start + size, rows.stop))
            in_tile = slice(block.start - rows.start, block.stop - rows.start)
            self._update_block(block, tile[in_tile] if dim == 1 else tile[:, in_tile], ids, dim)

    def _update_block(self, rows: slice, tile: Tensor, ids: Tensor, dim: int) -> None:
        c = self.values.shape[1]
        threshold = self.thresholds(rows)
        n, groups = threshold.numel(), tile.shape[dim] // GROUP_SIZE
        # Read as integers, bfloat16 numbers from 0 on keep their order and are above all negative ones. Integers
        # compare faster.
        as_integers = tile.dtype == torch.bfloat16 and bool((threshold >= 0).all())
        keys, least = (tile.view(torch.int16), threshold.view(torch.int16)) if as_integers else (tile, threshold)
        # Member m of group g is at m * groups + g, so that a maximum runs over rows of memory and not along them.
        maxima = keys.unflatten(dim, (GROUP_SIZE, groups)).amax(dim)
        hit = maxima > least.unsqueeze(dim)
        hits = hit.sum(dim)
        if int(hits.max()) > 4 * c or int(hits.sum()) > n * c:
            top = maxima.topk(min(c, groups), dim=dim, sorted=False).indices
            hit &= torch.zeros_like(hit).scatter_(dim, top, True)
        members = tile.unflatten(dim, (GROUP_SIZE, groups))
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
        # A matrix of the rows that have new scores: on the left what was kept before, on the right the new scores.
        counts = torch.bincount(row, minlength=n)
        updated = counts.nonzero().squeeze(1)
        slot = torch.arange(row.numel(), device=row.device) - (counts.cumsum(0) - counts)[row]
        line = ((counts > 0).cumsum(0) - 1)[row]
        width = int(counts.max())
        all_values = scores.new_full((updated.numel(), c + width), -torch.inf)
        all_ids = self.ids.new_full((updated.numel(), c + width), -1)
        updated = updated + rows.start
        all_values[:, :c], all_ids[:, :c] = self.values[updated], self.ids[updated]
        all_values[line, c + slot], all_ids[line, c + slot] = scores, ids[place].int()
        self.values[updated], order = all_values.topk(c, dim=1)
        self.ids[updated] = all_ids.gather(1, order)


class ScoreTile:
    """Memory for one tile of scores, which is used again and again."""

    def __init__(self, scores: OptimisticScores, rows: int, columns: int) -> None:
        self.scores = scores
        shape = (padded_to_groups(rows), padded_to_groups(columns))
        self.memory = torch.empty(shape, dtype=scores.dtype, device=scores.columns.embedding.device)

    def multiply(self, queries: Tensor, columns: Tensor) -> Tensor:
        """Optimistic scores of prepared rows, padded to whole groups in both dimensions with -inf."""
        q, n = queries.shape[0], columns.shape[0]
        tile = self.memory[: padded_to_groups(q), : padded_to_groups(n)]
        self.scores.write_tile(queries, columns, tile[:q, :n])
        tile[q:], tile[:, n:] = -torch.inf, -torch.inf
        return tile


def padded_to_groups(n: int) -> int:
    """The smallest number of at least n that is a multiple of the group size."""
    return -(-n // GROUP_SIZE) * GROUP_SIZE
