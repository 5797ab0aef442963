"""Nearest neighbors of an embedding whose rows are spread over several ranks.

The rows of all ranks are broadcast in turn, a block at a time. Each rank scores its own rows against the block and
keeps their best. No rank holds the whole embedding, or scores for more than its own rows and one block. The score of a
pair does not depend on the rank that computes it, so the result is that of one process, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
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


def search_shards(
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
        shard: this rank's rows [V_rank, d]. V_rank may differ between ranks, and be 0.
        check: called with V once V is known; raises where the other arguments do not fit it.
    """
    this_rank = dist.get_rank(group)
    settings = (tuple(shard.shape[1:]), shard.dtype, k, metric)
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (shard.shape[0], settings), group=group)
    if any(other != settings for _, other in gathered):
        got = "; ".join(f"rank {rank}: {other}" for rank, (_, other) in enumerate(gathered))
        raise ValueError(f"all ranks must search rows of the same width and dtype for the same k and metric, got {got}")
    counts = [count for count, _ in gathered]
    first_ids = [sum(counts[:rank]) for rank in range(len(counts))]
    vocabulary = sum(counts)
    local = _prepare_local_rows(shard, metric, backend, first_ids[this_rank], group, lambda: check(vocabulary))
    ids = torch.full((counts[this_rank], k), -1, dtype=torch.int64, device=shard.device)
    scores = torch.full((counts[this_rank], k), -torch.inf, device=shard.device)
    size = max(1, min(_BROADCAST_ROWS, _BROADCAST_ELEMENTS // shard.shape[1]))
    for rank, count in enumerate(counts):
        for start in range(0, count, size):
            stop = min(start + size, count)
            block = (
                shard[start:stop].contiguous() if rank == this_rank else shard.new_empty(stop - start, shard.shape[1])
            )
            dist.broadcast(block, dist.get_global_rank(group, rank), group=group)
            first_id = first_ids[rank] + start
            if local is not None:
                found = search(
                    local,
                    k,
                    columns=ScoredRows(block, metric, backend=backend),
                    offset=first_ids[this_rank] - first_id,
                    allowed=None if allowed is None else allowed[first_id : first_id + len(block)],
                    floor=scores[:, -1],
                )
                found_ids = torch.where(found.ids < 0, -1, found.ids + first_id)
                merged = ranked(torch.cat([ids, found_ids], dim=1), torch.cat([scores, found.scores], dim=1))
                ids, scores = (x[:, :k].contiguous() for x in merged)
            if progress is not None:
                progress(first_id + len(block), vocabulary)
    return _all_gather_rows(ids, counts, group), _all_gather_rows(scores, counts, group)


def gather_rows(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[V, n]: the rows [V_rank, n] of all ranks of the group, in the order of the ranks; the same on every rank."""
    counts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(counts, rows.shape[0], group=group)
    return _all_gather_rows(rows, counts, group)


def _prepare_local_rows(
    shard: Tensor, metric: Metric, backend: str, first_id: int, group: dist.ProcessGroup, check: Callable[[], None]
) -> ScoredRows | None:
    """This rank's rows, None where there are none.

    An error on one rank is raised on all ranks. Otherwise the other ranks would wait for it forever.
    """
    rows = error = None
    try:
        check()
        if shard.shape[0]:
            rows = ScoredRows(shard, metric, backend=backend, first_id=first_id)
    except (TypeError, ValueError) as raised:
        error = raised
    errors: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, error, group=group)
    for rank, found in enumerate(errors):
        if found is not None:
            raise type(found)(f"rank {rank}: {found}")
    return rows


def _all_gather_rows(rows: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks in the order of the ranks. They travel padded to the largest count."""
    padded = rows.new_zeros(max(counts), rows.shape[1])
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
