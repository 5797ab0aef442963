"""Nearest neighbours of an embedding whose rows lie on several ranks.

The ranks' rows come by in turn, a tile at a time; each rank scores its own rows against the visitors and keeps their
best. No rank holds the embedding, or scores for more than its own rows and one tile. A pair's score does not depend on
where it is computed, so the result is that of one process, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from .config import Metric
from .ops._ties import ranked
from .scoring import ScoredRows
from .search import Progress, search, usual_candidates

_VISITORS = 2**14  # rows sent at once
_VISITING_ELEMENTS = 2**24


def local_rows(embedding: DTensor) -> tuple[Tensor, Any]:
    """This rank's rows of a DTensor [V, d] and the process group that has the others; None where it has them all.

    Raises:
        ValueError: anything but rows sharded over one dimension of the mesh, and copies over the others.
    """
    sharded = [i for i, placement in enumerate(embedding.placements) if placement == Shard(0)]
    others = [p for i, p in enumerate(embedding.placements) if i not in sharded and not isinstance(p, Replicate)]
    if len(sharded) > 1 or others or embedding.dim() != 2:
        raise ValueError(
            "embedding must be a table [V, d], its rows sharded over one dimension of the mesh: (Shard(0),), with "
            f"Replicate() in all others; got {tuple(embedding.placements)}. Else pass embedding.full_tensor()"
        )
    return embedding.to_local(), embedding.device_mesh.get_group(sharded[0]) if sharded else None


def nearest_neighbors(
    shard: Tensor,
    group: dist.ProcessGroup,
    k: int,
    metric: Metric,
    allowed: Tensor | None,
    backend: str,
    progress: Progress | None,
    check: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    """ids and scores [V, k] of the rows of all ranks of the group, in the order of the ranks; the same on every rank.

    Args:
        shard: this rank's rows [V_rank, d]; V_rank may differ, and be 0.
        check: called with V once it is known, raises where the other arguments do not fit it.
    """
    me = dist.get_rank(group)
    mine = (tuple(shard.shape[1:]), shard.dtype, k, metric)
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (shard.shape[0], mine), group=group)
    if any(other != mine for _, other in everyone):
        got = "; ".join(f"rank {rank}: {other}" for rank, (_, other) in enumerate(everyone))
        raise ValueError(f"all ranks must search rows of the same width and dtype for the same k and metric, got {got}")
    counts = [count for count, _ in everyone]
    firsts = [sum(counts[:rank]) for rank in range(len(counts))]
    vocabulary = sum(counts)
    local = _scored(shard, metric, backend, firsts[me], group, lambda: check(vocabulary))
    ids = torch.full((counts[me], k), -1, dtype=torch.int64, device=shard.device)
    scores = torch.full((counts[me], k), -torch.inf, device=shard.device)
    size = max(1, min(_VISITORS, _VISITING_ELEMENTS // shard.shape[1]))
    for rank, count in enumerate(counts):
        for start in range(0, count, size):
            stop = min(start + size, count)
            visitors = shard[start:stop].contiguous() if rank == me else shard.new_empty(stop - start, shard.shape[1])
            dist.broadcast(visitors, dist.get_global_rank(group, rank), group=group)
            first = firsts[rank] + start
            if local is not None:
                found = search(
                    local,
                    k,
                    usual_candidates(k),
                    columns=ScoredRows(visitors, metric, backend=backend),
                    offset=firsts[me] - first,
                    allowed=None if allowed is None else allowed[first : first + len(visitors)],
                    floor=scores[:, -1],
                )
                there = torch.where(found.ids < 0, -1, found.ids + first)
                both = ranked(torch.cat([ids, there], dim=1), torch.cat([scores, found.scores], dim=1))
                ids, scores = (x[:, :k].contiguous() for x in both)
            if progress is not None:
                progress(first + len(visitors), vocabulary)
    return _gathered(ids, counts, group), _gathered(scores, counts, group)


def _scored(
    shard: Tensor, metric: Metric, backend: str, first: int, group: dist.ProcessGroup, check: Callable[[], None]
) -> ScoredRows | None:
    """This rank's rows, prepared. What is wrong on one rank is raised on all: else the others would wait for it."""
    rows = error = None
    try:
        check()
        if shard.shape[0]:
            rows = ScoredRows(shard, metric, backend=backend, first=first)
    except (TypeError, ValueError) as raised:
        error = raised
    errors: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, error, group=group)
    for rank, found in enumerate(errors):
        if found is not None:
            raise type(found)(f"rank {rank}: {found}")
    return rows


def _gathered(rows: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks, in their order; sent padded to the most any of them has."""
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
