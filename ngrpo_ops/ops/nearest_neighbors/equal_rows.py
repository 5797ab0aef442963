"""A search in which equal rows share their work."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .candidates import Found, in_order, parts
from .scores import ScoredRows

_EXPANDED_PAIRS = 2**18  # pairs with the copies of columns that are ranked together


class Classes(NamedTuple):
    """Equal rows as one query and one column of a scan.

    Among equal columns, and among columns of equal scores, the lower id comes first. So the k best columns of a query
    are columns of the k best classes, ordered by their first columns, and the classes' first columns are all that is
    scanned.

    Attributes:
        queries: int64 [Q], the rows whose neighbors are wanted.
        offset: row i is column i + offset.
        scanned: int64 [n], ascending, the rows that are scanned.
        is_shared: bool [n], whether several rows are equal to it. Such a query is not excluded from its own columns.
        place: int64 [Q], which of them stands for each query.
        columns: int64, ascending, the columns that are scanned.
        has_copies: bool [C], columns that stand for others too.
        members: int64, the columns that may be returned, class after class and ascending within a class.
        starts, counts: int64 [C], where the members of the class of a scanned column begin, and how many there are.
        equal_to: int64 [V], the first row equal to each row.
    """

    queries: Tensor
    offset: int
    scanned: Tensor
    is_shared: Tensor
    place: Tensor
    columns: Tensor
    has_copies: Tensor
    members: Tensor
    starts: Tensor
    counts: Tensor
    equal_to: Tensor

    @staticmethod
    def of(
        rows: ScoredRows, columns: ScoredRows, queries: Tensor, offset: int, allowed: Tensor | None
    ) -> Classes | None:
        """The classes of a search, whose arguments `search` explains; None: all rows differ, and all columns."""
        same = rows is columns
        of_rows = rows.first_equal
        of_columns = columns.first_equal
        if of_rows is None and of_columns is None:
            return None
        device, total = queries.device, len(columns)
        of_rows = torch.arange(len(rows), device=device) if of_rows is None else of_rows
        of_columns = torch.arange(total, device=device) if of_columns is None else of_columns
        members = torch.arange(total, device=device) if allowed is None else allowed.nonzero().squeeze(1)
        first = torch.full((total,), total, device=device).scatter_reduce(0, of_columns[members], members, "amin")
        stands_for = first[of_columns[members]]
        members = members[stands_for.argsort(stable=True)]
        count = torch.bincount(stands_for, minlength=total)
        # A class is scanned for the columns and as a query by the same row.
        query = of_rows[queries]
        if same:
            query = torch.where(first[query] < total, first[query], query)
        scanned, place = torch.unique(query, return_inverse=True)
        is_shared = rows.has_equal[scanned]
        return Classes(
            queries, offset, scanned, is_shared, place, (count > 0).nonzero().squeeze(1), count > 1,
            members, count.cumsum(0) - count, count, of_rows,
        )  # fmt: skip

    def lowest(self, values: Tensor) -> Tensor:
        """For each scanned row the lowest value [Q] of the queries that it stands for."""
        lowest = torch.full(self.scanned.shape, torch.inf, dtype=torch.float32, device=values.device)
        return lowest.scatter_reduce(0, self.place, values, "amin")

    def expanded(self, found: Found, k: int, kept: int) -> tuple[Found, Tensor]:
        """What was found of the scanned rows as columns of each query: `kept` of them, without the query itself.

        Also float32 [Q], bounds that leave out the columns equal to k of those that are returned. As long as these
        columns stay equal, none of them can be among the k nearest but the k that are returned.
        """
        columns, scores, bounds = (x[self.place] for x in found)
        has_copies = (self.has_copies[columns.clamp(min=0)] & (columns >= 0)).any(1) | self.is_shared[self.place]
        class_bounds = bounds.clone()
        out = Found(columns[:, :kept].clone(), scores[:, :kept].clone(), bounds)
        if columns.shape[1] > kept:
            for out_bounds in (out.bounds, class_bounds):
                torch.where(has_copies, out_bounds, torch.maximum(out_bounds, scores[:, kept]), out=out_bounds)
        queries = has_copies.nonzero().squeeze(1)
        counts = torch.where(columns >= 0, self.counts[columns.clamp(min=0)], 0)[queries]
        cut = torch.where(counts > kept + 1, scores[queries], -torch.inf).amax(1)  # columns that are not even ranked
        out.bounds[queries] = torch.maximum(out.bounds[queries], cut)
        counts.clamp_(max=kept + 1)
        for part in parts(counts.sum(1), _EXPANDED_PAIRS):
            some = queries[part]
            self._expand(out, class_bounds, k, some, columns[some], scores[some], counts[part])
        return out, class_bounds

    def _expand(
        self, out: Found, class_bounds: Tensor, k: int, queries: Tensor, columns: Tensor, scores: Tensor, counts: Tensor
    ) -> None:
        """Writes the best members of classes [q, c], with their scores, to some queries of `out`."""
        kept = out.columns.shape[1]
        each = counts.flatten()
        pair = torch.arange(each.numel(), device=each.device).repeat_interleave(each)
        number = torch.arange(pair.numel(), device=each.device) - (each.cumsum(0) - each)[pair]
        start = self.starts[columns.clamp(min=0)].flatten()[pair]
        member, score, row = self.members[start + number], scores.flatten()[pair], pair // columns.shape[1]
        own = self.queries[queries][row] + self.offset
        # Among the members of its class, the number of each without the query itself.
        own_number = torch.full_like(each, kept + 2)
        own_number[pair[member == own]] = number[member == own]
        number = number - (number > own_number[pair]).long()
        other = (member != own).nonzero().squeeze(1)
        row, member, score, number = row[other], member[other], score[other], number[other]
        order = in_order(row, member, score)
        row, member, score, number = row[order], member[order], score[order], number[order]
        total = torch.bincount(row, minlength=len(queries))
        position = torch.arange(row.numel(), device=row.device) - (total.cumsum(0) - total)[row]
        is_kept = position < kept
        ids = torch.full((len(queries), kept), -1, dtype=torch.int64, device=row.device)
        values = torch.full((len(queries), kept), -torch.inf, dtype=torch.float32, device=row.device)
        ids[row[is_kept], position[is_kept]] = member[is_kept]
        values[row[is_kept], position[is_kept]] = score[is_kept]
        out.columns[queries], out.scores[queries] = ids, values
        for bounds, is_covered in ((out.bounds, ~is_kept), (class_bounds, ~is_kept & (number < k))):
            cut = is_covered.nonzero().squeeze(1)
            bounds[queries] = bounds[queries].scatter_reduce(0, row[cut], score[cut], "amax")
