"""The rows of an embedding, all here or spread over several ranks.

The rows of all ranks are broadcast in turn, a block at a time, and each rank scores its own rows against the block. No
rank holds the whole embedding, or scores for more than its own rows and one block. The score of a pair does not depend
on the rank that computes it, so every result is that of one process, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ...config import Metric
from .._ties import ranked
from .scores import ScoredRows
from .search import Progress, search

_BROADCAST_ROWS = 2**14  # rows in one broadcast, at most
_BROADCAST_ELEMENTS = 2**24
_RESCORED_PAIRS = 2**18  # pairs that are looked for in a block together


def local_rows(embedding: DTensor) -> tuple[Tensor, Any]:
    """This rank's rows of a DTensor [V, d], and the process group that holds the others (None: there are no others).

    Raises:
        ValueError: placements other than rows sharded over one dimension of the mesh and copies over the others.
    """
    sharded = [i for i, placement in enumerate(embedding.placements) if placement == Shard(0)]
    others = [p for i, p in enumerate(embedding.placements) if i not in sharded and not isinstance(p, Replicate)]
    if len(sharded) > 1 or others or embedding.dim() != 2:
        raise ValueError(
            "embedding must be a table [V, d], its rows sharded over one dimension of the mesh: (Shard(0),), with "
            f"Replicate() in all others; got {tuple(embedding.placements)}. Else pass embedding.full_tensor()"
        )
    return embedding.to_local(), embedding.device_mesh.get_group(sharded[0]) if sharded else None


class Rounds:
    """The rows of a table, of which this rank may hold a part, and the calls that need all of them.

    All ranks of the group make the same calls in the same order, whether they have rows or not. Query ids count in this
    rank's rows, all other ids in the whole table.

    Attributes:
        rows: this rank's rows.
        rank: this rank's number in the group.
        counts: rows of each rank.
        total: rows of all ranks, V.
        first_id: the id of this rank's first row.

    Args:
        shard: this rank's rows [V_rank, d]. V_rank may differ between ranks, and be 0.
        metric, backend: as in `ScoredRows`.
        group: the process group of the ranks, whose rows follow one another in the order of the ranks; None: all rows
            are here.
        settings: what must be the same on all ranks, for a message.
        check: called with V; raises where the other arguments do not fit it.

    Raises:
        TypeError, ValueError: on all ranks, with what was wrong on one of them.
    """

    def __init__(
        self,
        shard: Tensor,
        metric: Metric,
        backend: str,
        group: dist.ProcessGroup | None,
        settings: object,
        check: Callable[[int], None],
    ) -> None:
        self.group = group
        found = self._objects((shard.shape[0], (tuple(shard.shape[1:]), shard.dtype, settings, metric)))
        if any(other != found[0][1] for _, other in found):
            got = "; ".join(f"rank {rank}: {other}" for rank, (_, other) in enumerate(found))
            raise ValueError(
                f"all ranks must search rows of the same width and dtype for the same k and metric, got {got}"
            )
        self.counts = [count for count, _ in found]
        self.rank = 0 if group is None else dist.get_rank(group)
        self.first_id = sum(self.counts[: self.rank])
        self.total = sum(self.counts)
        rows = error = None
        try:
            check(self.total)
            rows = ScoredRows(shard, metric, backend=backend, first_id=self.first_id, find_equal=True)
        except (TypeError, ValueError) as raised:
            if group is None:
                raise
            error = raised
        # Otherwise the other ranks would wait for this one forever.
        for rank, other_error in enumerate(self._objects(error)):
            if other_error is not None:
                raise type(other_error)(f"rank {rank}: {other_error}")
        assert rows is not None
        self.rows = rows

    def __iter__(self) -> Iterator[tuple[int, ScoredRows]]:
        """The first id and the rows of each block of the table."""
        if self.group is None:
            yield 0, self.rows
            return
        shard, first_id = self.rows.embedding, 0
        size = max(1, min(_BROADCAST_ROWS, _BROADCAST_ELEMENTS // shard.shape[1]))
        for rank, count in enumerate(self.counts):
            for start in range(0, count, size):
                stop = min(start + size, count)
                own = rank == self.rank
                block = shard[start:stop].contiguous() if own else shard.new_empty(stop - start, shard.shape[1])
                dist.broadcast(block, dist.get_global_rank(self.group, rank), group=self.group)
                yield first_id, ScoredRows(block, self.rows.metric, backend=self.rows.backend)
                first_id += len(block)

    def search(
        self,
        k: int,
        *,
        queries: Tensor | None = None,
        allowed: Tensor | None = None,
        floor: Tensor | None = None,
        progress: Progress | None = None,
    ) -> tuple[Tensor, Tensor]:
        """ids int64 and scores float32 [Q, k] of this rank's rows, or of `queries`, as `search.search` returns them."""
        if self.group is None:
            found = search(self.rows, k, queries=queries, allowed=allowed, floor=floor, progress=progress)
            return found.ids, found.scores
        device = self.rows.embedding.device
        count = len(self.rows) if queries is None else queries.numel()
        ids = torch.full((count, k), -1, dtype=torch.int64, device=device)
        scores = torch.full((count, k), -torch.inf, dtype=torch.float32, device=device)
        for first_id, block in self:
            if count:
                reached = scores[:, -1] if floor is None else torch.maximum(floor, scores[:, -1])
                found = search(
                    self.rows,
                    k,
                    queries=queries,
                    columns=block,
                    offset=self.first_id - first_id,
                    allowed=None if allowed is None else allowed[first_id : first_id + len(block)],
                    floor=reached,
                )
                found_ids = torch.where(found.ids < 0, -1, found.ids + first_id)
                merged = ranked(torch.cat([ids, found_ids], dim=1), torch.cat([scores, found.scores], dim=1))
                ids, scores = (x[:, :k].contiguous() for x in merged)
            if progress is not None:
                progress(first_id + len(block), self.total)
        return ids, scores

    def rescore(self, queries: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Candidates [Q, c] of each query (-1: none) and their scores, best first, equal scores by the lower id."""
        scores = torch.full(candidates.shape, -torch.inf, dtype=torch.float32, device=candidates.device)
        size = max(1, _RESCORED_PAIRS // candidates.shape[1])
        for first_id, block in self:
            for start in range(0, len(queries), size):
                some = candidates[start : start + size]
                if self.group is None:  # all of them are in this block, which a GPU need not be asked
                    of = queries[start : start + size, None].expand_as(some)
                    pairs = self.rows.pair_scores(of, block, some.clamp(min=0))
                    scores[start : start + size] = pairs.masked_fill_(some < 0, -torch.inf)
                    continue
                row, place = ((some >= first_id) & (some < first_id + len(block))).nonzero(as_tuple=True)
                pairs = self.rows.pair_scores(queries[start + row], block, some[row, place] - first_id)
                scores[start + row, place] = pairs
        return ranked(candidates, scores)

    def update_neighbors(self, queries: Tensor, ids: Tensor, scores: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """The k nearest rows of each query among k known neighbors and the rows of a mask.

        Args:
            queries: int64 [Q], of this rank's rows.
            ids, scores: [Q, k], the known neighbors, best first.
            new: bool [V], the other rows to consider.
        """
        k = ids.shape[1]
        found_ids, found_scores = self.search(k, queries=queries, allowed=new, floor=scores[:, -1])
        is_known = (found_ids[:, :, None] == ids[:, None, :]).any(2)
        found_scores = found_scores.masked_fill(is_known, -torch.inf)
        merged = ranked(torch.cat([ids, found_ids], dim=1), torch.cat([scores, found_scores], dim=1))
        return merged[0][:, :k].contiguous(), merged[1][:, :k].contiguous()

    def gather(self, values: Tensor) -> Tensor:
        """[V, ...]: values [V_rank, ...] of all ranks, the same on every rank."""
        if self.group is None:
            return values
        padded = values.new_zeros(max(self.counts), *values.shape[1:])  # all ranks send as many rows
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])

    def largest(self, values: Tensor) -> Tensor:
        """The largest of the values >= 0 of all ranks."""
        largest = values.max() if values.numel() else values.new_zeros(())
        if self.group is not None:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest

    def sum(self, count: int) -> int:
        """The sum over the ranks."""
        return sum(self._objects(count))

    def _objects(self, value: Any) -> list[Any]:
        """The values of all ranks."""
        if self.group is None:
            return [value]
        gathered: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered
