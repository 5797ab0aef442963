"""The public `nearest_neighbors`: its contract, its checks, and its registration with torch."""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from ...config import Metric
from .._checks import (
    require_choice,
    require_embedding,
    require_ids,
    require_ids_in_range,
    require_mask,
    require_neighbors,
    require_same_device,
    require_table,
)
from .._library import HostReadingOperation, choose_backend
from . import few
from .scores import ScoredRows
from .search import SHARED_FROM, Progress, search
from .sharded import Rounds, local_rows


class NearestNeighbors(NamedTuple):
    """The neighbors that `nearest_neighbors` found.

    Attributes:
        ids: int64 [Q, k], nearest first.
        scores: float32 [Q, k], larger is nearer.

    Examples:
        >>> import torch
        >>> from ngrpo_ops import nearest_neighbors
        >>> ids, scores = nearest_neighbors(torch.tensor([[0.0], [1.0], [3.0]]), 1, metric="l1")
        >>> ids.tolist(), scores.tolist()
        ([[1], [0], [1]], [[-1.0], [-1.0], [-2.0]])
    """

    ids: Tensor
    scores: Tensor


# The operation torch.ops.ngrpo.nearest_neighbors ------------------------------------------------------------------


class _Request(NamedTuple):
    """The arguments of the operation beside the embedding."""

    k: int
    metric: str
    queries: Tensor | None
    allowed: Tensor | None
    backend: str


def _search_table(embedding: Tensor, request: _Request, progress: Progress | None = None) -> tuple[Tensor, Tensor]:
    """ids and scores [Q, k] by the tiled search. In the tests `oracle.brute_force_scores` is its reference."""
    k, metric, queries, allowed, backend = request
    if queries is not None:
        require_ids_in_range(queries, embedding.shape[0], "queries")
    if allowed is not None:
        require_enough_allowed(allowed, k)
    if queries is not None and few.serves(embedding, k, metric, queries, backend):
        found = few.search_few(embedding, k, metric, queries, allowed)
        if found is not None:
            if progress is not None:
                progress(queries.numel(), queries.numel())
            return found
    find_equal = queries is None or queries.numel() >= SHARED_FROM
    rows = ScoredRows(embedding, metric, backend=backend, find_equal=find_equal)  # type: ignore[arg-type]
    result = search(rows, k, queries=queries, allowed=allowed, progress=progress)
    return result.ids, result.scores


@HostReadingOperation
def _nearest_neighbors(embedding: Tensor, request: _Request) -> tuple[Tensor, Tensor]:
    return _search_table(embedding, request)  # without progress: a schema has no type for a callback


@_nearest_neighbors.register_fake
def _(embedding: Tensor, k: int, metric: str, queries: Tensor | None, *_: object) -> tuple[Tensor, Tensor]:
    rows = embedding.shape[0] if queries is None else queries.shape[0]
    return embedding.new_empty(rows, k, dtype=torch.int64), embedding.new_empty(rows, k, dtype=torch.float32)


def require_enough_allowed(allowed: Tensor, k: int) -> None:
    if int(allowed.sum()) <= k:
        raise ValueError(f"allowed must have at least k + 1 = {k + 1} True rows, got {int(allowed.sum())}")


# The public function ----------------------------------------------------------------------------------------------


def nearest_neighbors(
    embedding: Tensor,
    k: int,
    *,
    metric: Metric = "cosine",
    queries: Tensor | None = None,
    allowed: Tensor | None = None,
    group: ProcessGroup | None = None,
    backend: str | None = None,
    progress: Progress | None = None,
) -> NearestNeighbors:
    """The k most similar *other* rows of an embedding table, for every row or for the rows in `queries`.

    N-GRPO mixes the candidates C: the anchor and its k - 1 nearest neighbors by cosine (equations 7 and 8). Here `k`
    counts the neighbors alone.

    The result is exact. The ids are those of scoring every pair in float32; among equal scores the lower id comes
    first. The search runs in tiles and never holds a [V, V] matrix: it takes at most 256 MiB beyond inputs and outputs.

    Args:
        embedding: [V, d], floating point, finite; scored in float32. A DTensor with sharded rows (FSDP) is searched
            where it is. Every rank of its mesh must make the call. Each rank scores its own rows against those of all
            ranks and gets the result for all V rows, the same as without shards.
        k: neighbors a row, 1 <= k < V.
        metric: "cosine" (a zero row has similarity 0 to every row), "dot", "l2" (negative squared distance) or "l1"
            (negative distance; it has no matrix-multiplication form and is many times slower).
        queries: int64 [Q], ids of the rows whose neighbors are wanted; None: all V, in order.
        allowed: bool [V], rows that may be returned, at least k + 1 of them; None: all.
        group: a process group whose ranks hold consecutive rows of the table (maybe none) as `embedding`, in the order
            of the ranks. The table is searched like a DTensor.
        backend: "eager" or "triton"; None: "triton" where the kernels run, else "eager".
        progress: called with (rows done, rows in all) during a long search.

    Returns:
        ids [Q, k] int64 and scores [Q, k] float32, nearest first. Not differentiable.

    Raises:
        TypeError: ids or a mask of another dtype.
        ValueError: k out of range, NaN or inf in the embedding, an empty table, queries out of range or empty, too few
            allowed rows, an unknown metric or backend, shapes that do not fit, a DTensor that is not sharded by rows,
            queries of a sharded table. An error on one rank is raised on all ranks.

    Examples:
        >>> import torch
        >>> from ngrpo_ops import nearest_neighbors
        >>> embedding = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]])
        >>> nearest_neighbors(embedding, 2).ids.tolist()
        [[1, 2], [0, 2], [1, 0], [2, 1]]
        >>> allowed = torch.tensor([True, False, True, True])
        >>> nearest_neighbors(embedding, 1, queries=torch.tensor([0]), allowed=allowed).ids.tolist()
        [[2]]
    """
    require_choice(metric, get_args(Metric), "metric")
    if isinstance(embedding, DTensor):
        embedding, group = local_rows(embedding)

    def check(vocabulary: int) -> None:
        require_neighbors(vocabulary, k)
        if allowed is not None:
            require_mask(allowed, (vocabulary,), "allowed", "[V]")
            require_same_device("allowed", allowed, "embedding", embedding)
            if group is not None:  # without a group the operation itself checks the count, which reads the mask
                require_enough_allowed(allowed, k)

    if group is not None:
        require_table(embedding)
        if queries is not None:
            raise ValueError("queries of a sharded embedding cannot be searched: leave queries out, for all rows")
        backend = choose_backend(backend, embedding)
        rounds = Rounds(embedding.detach(), metric, backend, group, k, check)
        found = rounds.search(k, allowed=allowed, progress=progress)
        return NearestNeighbors(*(rounds.gather(x) for x in found))
    require_embedding(embedding)
    check(embedding.shape[0])
    if queries is not None:
        require_ids(queries, "queries")
        require_same_device("queries", queries, "embedding", embedding)
        if queries.dim() != 1 or queries.numel() == 0:
            raise ValueError(f"queries must be a non-empty vector of row ids, got shape {tuple(queries.shape)}")
    request = _Request(k, metric, queries, allowed, choose_backend(backend, embedding))
    if progress is None:
        return NearestNeighbors(*_nearest_neighbors(embedding.detach(), *request))
    return NearestNeighbors(*_search_table(embedding.detach(), request, progress))
