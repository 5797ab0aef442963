"""A search for a few queries by kernels, which read the table once.

One pass gives upper bounds of all scores and the statistics of all rows. The highest of a query's bounds go through
`keep_best`, like pairs that were appended: what reaches the threshold is scored. A query of which more pairs may reach
it than were taken is not settled here, nor is a table with extreme rows. The ordinary search then does all of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import load_kernels
from .._precision import has_matrix_units
from . import fused
from .bounds import rounding_error, underflow_error
from .scores import MAX_NORM

_MOST_QUERIES = 64
_MOST_NEIGHBORS = 128
_PLACES = 64  # pairs of a query that are taken beside four times its neighbors
_MOST_BYTES = 2**27  # of all upper bounds, with the rows of the pairs that are taken


def serves(embedding: Tensor, k: int, metric: str, queries: Tensor, backend: str) -> bool:
    """Whether a search is for `search_few`."""
    (n, d), q = embedding.shape, queries.numel()
    return (
        backend == "triton"
        and metric != "l1"
        and q <= _MOST_QUERIES
        and k <= _MOST_NEIGHBORS
        and n >= fused.KERNELS_FROM
        and 4 * q * (n + d * _places(k, n)) <= _MOST_BYTES
        and has_matrix_units(embedding.device)
    )


def search_few(
    embedding: Tensor, k: int, metric: str, queries: Tensor, allowed: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """The k rows most similar to each query: ids int64 and scores float32 [q, k], to the bit those of `search`.

    A GPU is waited for once.

    Args:
        embedding: [n, d], floating point.
        queries: int64 [q].
        allowed: bool [n], more than k of them True; None: all.

    Returns:
        None: a query is not settled, or the table has rows of which this search says nothing, those that are not
        finite or too large among them.
    """
    kernels, of_rows = load_kernels("nearest_neighbors"), load_kernels("nearest_neighbors_rows")
    (n, d), q, device = embedding.shape, queries.numel(), embedding.device
    rounding, underflow = rounding_error(d, truncating=True), underflow_error(d)
    places = _places(k, n)

    x = embedding[queries]
    x_norms, x_inverse, x_roundoffs, _ = of_rows.row_statistics(x, metric)
    prepared = of_rows.prepare_rows(
        x, None, x_norms, x_inverse, x_roundoffs, metric, queries=True, rounding=rounding, underflow=underflow
    )
    x_norms = (x_inverse > 0).float() if metric == "cosine" else x_norms
    upper, y_norms, y_roundoffs, states = load_kernels("nearest_neighbors_few").score_few(
        prepared, x_norms, x_roundoffs, embedding, metric, rounding=rounding, underflow=underflow
    )
    largest = y_norms.amax()
    y_norms = (y_norms > 0).float() if metric == "cosine" else y_norms
    upper.scatter_(1, queries[:, None], -torch.inf)
    if allowed is not None:
        upper.masked_fill_(~allowed, -torch.inf)

    best = upper.topk(places, dim=1)
    last = best.values[:, -1].clone()
    counts = torch.full((q,), places, dtype=torch.int32, device=device)
    pairs = kernels.Pairs(best.indices.int(), best.values, counts)
    thresholds = torch.full((q,), -torch.inf, dtype=torch.float32, device=device)
    kth, is_far = thresholds.clone(), torch.zeros_like(thresholds, dtype=torch.bool)
    kernels.keep_best(
        pairs, metric, thresholds, kth, is_far, x_norms, x_roundoffs, y_norms, y_roundoffs,
        k=k, kept=k, rounding=rounding, underflow=underflow,
    )  # fmt: skip
    is_unsettled = (last >= thresholds) if places < n else torch.zeros_like(last, dtype=torch.bool)

    # The norms of the one pass may differ in the last bit from those that scores are made with.
    is_there = torch.arange(places, device=device) < counts[:, None]
    ids = torch.where(is_there, pairs.columns.long(), n)
    y = embedding.index_select(0, ids.clamp(max=n - 1).flatten())
    scales = (x_inverse, of_rows.row_statistics(y, metric)[1]) if metric == "cosine" else (None, None)
    pair = torch.arange(q * places, device=device)
    exact = kernels.pair_scores(
        x, scales[0], pair // places, y, scales[1], torch.where(is_there.flatten(), pair, -1), metric
    ).view(q, places)
    # The best first, equal scores by the lower id.
    ids, order = ids.sort(dim=1)
    scores, order = exact.gather(1, order).sort(dim=1, descending=True, stable=True)
    ids = ids.gather(1, order)[:, :k].clone()

    unsaid = (states != 0).sum() + is_unsettled.sum()
    num_unsaid, norm = torch.stack([unsaid.double(), largest.double()]).tolist()
    return None if num_unsaid or norm > MAX_NORM[metric] else (ids, scores[:, :k].clone())


def _places(k: int, n: int) -> int:
    return min(n, _PLACES + 4 * k)
