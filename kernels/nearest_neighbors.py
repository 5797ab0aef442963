"""The pairs of a tile of scores that reach a threshold, the best of those of a query, and the scores of given pairs.

The caller prepares the rows. They are bfloat16, with extra columns that turn their inner product into an upper bound of
the score. For l1, which is no inner product, they are the float32 rows themselves.

One program scores BLOCK_M rows of x against BLOCK_N rows of y. The tile never leaves the chip. Every row has a
threshold, a lower bound of the last score that it keeps, and a program appends the pairs that reach it. Few do, so a
tile's cost is that of finding whether any does. Then each thread takes the best of its 16 scores of a row, so that one
element in 16 goes through the appending code; another round follows while something is left.

Every query has the same number of places for its pairs. So nothing is sorted but the few pairs of one query, and the
host never reads how many there are. `keep_best` raises the thresholds by what was appended and drops what no longer
reaches them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, primitives
from .primitives import ceil_div, launch, launcher, next_power_of_2, widen

STEP = 64  # columns multiplied at once; the width of prepared rows is a multiple of it
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def _tile(
    x, y, m, n, q, c, d, x_m, y_n,
    L1: tl.constexpr, UPCAST: tl.constexpr, INT64: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Rows past the end are read as the last row, so that the loop needs no mask. They are never returned.
    x_row = x + widen(tl.minimum(m, q - 1), INT64) * x_m
    y_row = y + widen(tl.minimum(n, c - 1), INT64) * y_n
    scores = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if L1:
        for k in range(d):
            scores -= tl.abs(tl.load(x_row + k)[:, None] - tl.load(y_row + k)[None, :])
    else:
        column = tl.arange(0, BLOCK_K)
        x_at = x_row[:, None] + column[None, :]
        y_at = y_row[None, :] + column[:, None]
        for _ in range(0, d, BLOCK_K):
            a = tl.load(x_at)
            b = tl.load(y_at)
            if UPCAST:  # the interpreter's product of bfloat16 blocks is wrong
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            scores = tl.dot(a, b, scores)
            x_at += BLOCK_K
            y_at += BLOCK_K
    return scores


@triton.jit
def _tile_position(n_m, n_n, GROUP_M: tl.constexpr):
    """Row and column of this program's tile. Programs that run at the same time share rows of y in the cache."""
    program = tl.program_id(0)
    group = program // (GROUP_M * n_n)
    rows = tl.minimum(n_m - group * GROUP_M, GROUP_M)
    inside = program % (GROUP_M * n_n)
    return group * GROUP_M + inside % rows, inside // rows


@triton.jit
def _append(takes, query, candidate, score, columns, scores, counts, capacity, INT64: tl.constexpr):
    at = tl.atomic_add(counts + query, tl.full(query.shape, 1, tl.int32), mask=takes, sem="relaxed")
    place = widen(query, INT64) * capacity + at
    room = takes & (at < capacity)
    tl.store(columns + place, candidate, mask=room)
    tl.store(scores + place, score, mask=room)


@triton.jit
def _append_tile(
    tile, first_m, first_n, x_thresholds, y_thresholds, x_allowed, y_allowed, excluded, x_ids, y_ids, x_id, y_id,
    columns, scores, counts, capacity, q, c,
    SYMMETRIC: tl.constexpr, UPCAST: tl.constexpr, INT64: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Appends the pairs of a tile of scores that reach a threshold. A score of -inf is no pair."""
    # First every pair that reaches the lower threshold of its two: all of those to append, and a few more. A threshold
    # of -inf would make a NaN of the difference.
    least = tl.maximum(tl.load(x_thresholds + first_m + tl.arange(0, BLOCK_M)), _LOWEST)[:, None]
    if SYMMETRIC:
        of_y = tl.maximum(tl.load(y_thresholds + first_n + tl.arange(0, BLOCK_N)), _LOWEST)[None, :]
        least = tl.minimum(least, of_y)
    if tl.max(tile - least) >= 0.0:
        left = tl.where(tile >= least, tile, float("-inf"))
        # Columns in groups of 16 that one thread holds, in the layouts of wgmma and tcgen05: bits 0, 3, 4 and 5.
        left = tl.permute(tl.reshape(left, (BLOCK_M, BLOCK_N // 64, 8, 4, 2)), (0, 1, 3, 2, 4))
        left = tl.reshape(left, (BLOCK_M, BLOCK_N // 64, 4, 16))
        m = first_m + tl.arange(0, BLOCK_M)[:, None, None]
        group = tl.arange(0, BLOCK_N // 64)[None, :, None] * 64 + tl.arange(0, 4)[None, None, :] * 2
        m = tl.broadcast_to(m, (BLOCK_M, BLOCK_N // 64, 4))
        more = True
        while more:
            # Any of equal scores will do; the interpreter is slow where the choice is free.
            score, inside = tl.max(left, axis=3, return_indices=True, return_indices_tie_break_left=UPCAST)
            n = first_n + group + (inside // 2) * 8 + inside % 2
            found = (score > float("-inf")) & (m < q) & (n < c)
            x_takes = found & (score >= tl.load(x_thresholds + m, mask=found, other=float("inf")))
            if y_allowed is not None:
                x_takes = x_takes & (tl.load(y_allowed + n, mask=x_takes, other=0) != 0)
            if excluded is not None:
                x_takes = x_takes & (n != tl.load(excluded + m, mask=x_takes, other=-1))
            row = m + x_id if x_ids is None else tl.load(x_ids + m, mask=found, other=0).to(tl.int32)
            column = n + y_id if y_ids is None else tl.load(y_ids + n, mask=found, other=0).to(tl.int32)
            _append(x_takes, row, column, score, columns, scores, counts, capacity, INT64)
            if SYMMETRIC:
                y_takes = found & (score >= tl.load(y_thresholds + n, mask=found, other=float("inf")))
                if x_allowed is not None:
                    y_takes = y_takes & (tl.load(x_allowed + m, mask=y_takes, other=0) != 0)
                _append(y_takes, column, row, score, columns, scores, counts, capacity, INT64)
            left = tl.where(tl.arange(0, 16)[None, None, None, :] == inside[:, :, :, None], float("-inf"), left)
            more = tl.max(left) > float("-inf")


@triton.jit(do_not_specialize=["q", "c", "n_m", "n_n", "x_id", "y_id", "capacity"])
def append_pairs_kernel(
    x, y, x_thresholds, excluded, x_ids, y_ids, x_id, y_id, columns, scores, counts, capacity,
    q, c, d, n_m, n_n, x_m, y_n,
    L1: tl.constexpr, UPCAST: tl.constexpr, INT64: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _tile_position(n_m, n_n, 8)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = _tile(x, y, m, n, q, c, d, x_m, y_n, L1, UPCAST, INT64, BLOCK_M, BLOCK_N, BLOCK_K)
    _append_tile(
        tile, tile_m * BLOCK_M, tile_n * BLOCK_N, x_thresholds, None, None, None, excluded, x_ids, y_ids, x_id, y_id,
        columns, scores, counts, capacity, q, c, False, UPCAST, INT64, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["q", "c", "n_m", "n_n", "x_id", "y_id", "capacity"])
def append_pairs_symmetric_kernel(
    x, y, x_thresholds, y_thresholds, x_allowed, y_allowed, x_ids, y_ids, x_id, y_id,
    columns, scores, counts, capacity, q, c, d, n_m, n_n, x_m, y_n,
    DIAGONAL: tl.constexpr, L1: tl.constexpr, UPCAST: tl.constexpr, INT64: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _tile_position(n_m, n_n, 8)
    if DIAGONAL and tile_n * BLOCK_N + BLOCK_N - 1 <= tile_m * BLOCK_M:  # below the diagonal
        return
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = _tile(x, y, m, n, q, c, d, x_m, y_n, L1, UPCAST, INT64, BLOCK_M, BLOCK_N, BLOCK_K)
    if DIAGONAL:
        tile = tl.where(n[None, :] > m[:, None], tile, float("-inf"))
    _append_tile(
        tile, tile_m * BLOCK_M, tile_n * BLOCK_N, x_thresholds, y_thresholds, x_allowed, y_allowed, None,
        x_ids, y_ids, x_id, y_id, columns, scores, counts, capacity, q, c, True, UPCAST, INT64, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _rank_key(score, column):
    """int64, larger for a higher score, and among equal scores for a lower column."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (rising.to(tl.int64) << 32) - column.to(tl.int64)


@triton.jit
def _load_norm_and_roundoff(norms, roundoffs, row, mask):
    return tl.load(norms + row, mask=mask, other=0.0), tl.load(roundoffs + row, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["n", "capacity", "k", "kept"])
def keep_best_kernel(
    columns, scores, counts, thresholds, kth, is_far, x_norms, x_roundoffs, y_norms, y_roundoffs,
    n, capacity, k, kept, rounding, underflow,
    METRIC: tl.constexpr, EXTRA: tl.constexpr, INT64: tl.constexpr, CAPACITY: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < n
    count = tl.load(counts + row, mask=live, other=0)
    slot = tl.arange(0, CAPACITY)[None, :]
    at = widen(row, INT64)[:, None] * capacity + slot
    is_there = slot < tl.minimum(count, capacity)[:, None]
    score = tl.load(scores + at, mask=is_there, other=0.0)
    column = tl.load(columns + at, mask=is_there, other=0)
    # How many pairs of the query go before each, whatever the order in which they were appended.
    key = _rank_key(score, column)
    rank = tl.zeros((BLOCK_N, CAPACITY), dtype=tl.int32)
    for start in range(0, tl.minimum(tl.max(count), capacity), BLOCK_J):
        other = start + tl.arange(0, BLOCK_J)[None, :]
        other_at = widen(row, INT64)[:, None] * capacity + other
        other_is_there = other < tl.minimum(count, capacity)[:, None]
        other_key = _rank_key(
            tl.load(scores + other_at, mask=other_is_there, other=0.0),
            tl.load(columns + other_at, mask=other_is_there, other=0),
        )
        goes_before = other_is_there[:, None, :] & (other_key[:, None, :] > key[:, :, None])
        rank += tl.sum(goes_before.to(tl.int32), axis=2)
    rank = tl.where(is_there, rank, CAPACITY)
    tl.debug_barrier()  # every pair was read: from here on they are written over

    y_norm, y_roundoff = _load_norm_and_roundoff(y_norms, y_roundoffs, column, is_there)
    x_norm, x_roundoff = _load_norm_and_roundoff(x_norms, x_roundoffs, row, live)
    x_norm, x_roundoff = x_norm[:, None], x_roundoff[:, None]
    if METRIC == "l1":
        upper = score * (1.0 - rounding)
        error = 2.2 * rounding * tl.abs(upper)
    else:
        upper = score
        error = (rounding + 1.01 * (x_roundoff + y_roundoff)) * (x_norm * y_norm)
        if METRIC == "l2":
            error = 2.0 * error + rounding * (x_norm * x_norm + y_norm * y_norm)
        error = 2.1 * (error + underflow) + 2.0**-124 * (x_norm + y_norm)
    upper = tl.where(is_there, upper, float("-inf"))
    lower = tl.where(is_there, upper - error, float("-inf"))
    held = tl.minimum(count, capacity)
    least_of_k = tl.min(tl.where(rank < k, lower, float("inf")), axis=1)
    least_of_k = tl.where(held < k, float("-inf"), least_of_k)
    new_kth = tl.maximum(tl.load(kth + row, mask=live, other=0.0), least_of_k)
    last = tl.min(tl.where(rank < kept, lower, float("inf")), axis=1)
    last = tl.where(held < kept, float("-inf"), last)
    if EXTRA:
        last_upper = tl.max(tl.where(rank == kept - 1, upper, float("-inf")), axis=1)
        far = new_kth > last_upper
        last = tl.where(far, last_upper, last)
        tl.store(is_far + row, far, mask=live)
    threshold = tl.maximum(tl.load(thresholds + row, mask=live, other=0.0), last)
    # A query of which a pair is missing takes no more.
    is_lost = count > capacity
    is_kept = is_there & (upper >= threshold[:, None]) & ~is_lost[:, None]  # two copies of a pair would count twice
    at = widen(row, INT64)[:, None] * capacity + rank
    tl.store(scores + at, score, mask=is_kept)
    tl.store(columns + at, column, mask=is_kept)
    tl.store(counts + row, tl.where(is_lost, count, tl.sum(is_kept.to(tl.int32), axis=1)), mask=live)
    tl.store(kth + row, new_kth, mask=live)
    tl.store(thresholds + row, tl.where(is_lost, float("inf"), threshold), mask=live)


@triton.jit(do_not_specialize=["pairs"])
def pair_scores_kernel(
    x, y, x_scales, y_scales, rows, columns, out, pairs, d, x_m, x_d, y_n, y_d,
    METRIC: tl.constexpr, INT64: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    p = widen(tl.program_id(0), INT64) * BLOCK_P + tl.arange(0, BLOCK_P)
    column = tl.load(columns + p, mask=p < pairs, other=-1)
    is_pair = column >= 0
    if tl.max(column) < 0:
        tl.store(out + p, tl.full((BLOCK_P,), float("-inf"), tl.float32), mask=p < pairs)
        return
    row = tl.load(rows + p, mask=is_pair, other=0)
    if METRIC == "cosine":
        x_scale = tl.load(x_scales + row, mask=is_pair, other=0.0)[:, None]
        y_scale = tl.load(y_scales + column, mask=is_pair, other=0.0)[:, None]
    total = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        used = is_pair[:, None] & (k < d)[None, :]
        a = tl.load(x + widen(row, INT64)[:, None] * x_m + widen(k, INT64)[None, :] * x_d, mask=used, other=0.0)
        b = tl.load(y + widen(column, INT64)[:, None] * y_n + widen(k, INT64)[None, :] * y_d, mask=used, other=0.0)
        a = a.to(tl.float32)
        b = b.to(tl.float32)
        if METRIC == "cosine":
            total += (a * x_scale) * (b * y_scale)
        elif METRIC == "dot":
            total += a * b
        elif METRIC == "l2":
            total -= (a - b) * (a - b)
        else:
            total -= tl.abs(a - b)
    tl.store(out + p, tl.where(is_pair, tl.sum(total, axis=1), float("-inf")), mask=p < pairs)


def _blocks(kernel: Any, width: int) -> dict[str, int]:
    return configs.pinned(kernel.__name__, width, interpreted=primitives.interpreted(kernel)).kwargs


def _operands(x: Tensor, y: Tensor, metric: str, kernel: Any) -> dict[str, Any]:
    width = 0 if metric == "l1" else x.shape[0]
    blocks = _blocks(kernel, width)
    return {
        "width": width,
        "x": x, "y": y, "q": x.shape[0], "c": y.shape[0], "d": x.shape[1], "x_m": x.stride(0), "y_n": y.stride(0),
        "n_m": ceil_div(x.shape[0], blocks["BLOCK_M"]), "n_n": ceil_div(y.shape[0], blocks["BLOCK_N"]),
        "L1": metric == "l1", "UPCAST": primitives.interpreted(kernel),
    }  # fmt: skip


class Pairs(NamedTuple):
    """Pairs appended by any number of launches. Those of a query are in an order that depends on timing.

    Attributes:
        columns: int32 [queries, capacity], the ids of the candidates.
        scores: float32 [queries, capacity].
        counts: int32 [queries], the pairs that were to be appended. Where there are more than the capacity, some are
            not there.
    """

    columns: Tensor
    scores: Tensor
    counts: Tensor


def no_pairs(queries: int, capacity: int, device: torch.device) -> Pairs:
    """Empty places for the pairs of some queries."""
    columns = torch.empty(queries, capacity, dtype=torch.int32, device=device)
    scores = torch.empty(queries, capacity, dtype=torch.float32, device=device)
    return Pairs(columns, scores, torch.zeros(queries, dtype=torch.int32, device=device))


def _appending(x_ids: Tensor | int, y_ids: Tensor | int, pairs: Pairs) -> dict[str, Any]:
    given_x, given_y = (ids.contiguous() if isinstance(ids, Tensor) else None for ids in (x_ids, y_ids))
    return {
        "x_ids": given_x, "x_id": x_ids if isinstance(x_ids, int) else 0,
        "y_ids": given_y, "y_id": y_ids if isinstance(y_ids, int) else 0,
        **pairs._asdict(), "capacity": pairs.columns.shape[1],
    }  # fmt: skip


def _padded(thresholds: Tensor, block: int) -> Tensor:
    """For whole tiles, so that they are read without a mask: with +inf, which nothing reaches."""
    missing = -thresholds.shape[0] % block
    return torch.nn.functional.pad(thresholds, (0, missing), value=torch.inf) if missing else thresholds


@launcher("thresholds", "excluded")
def append_pairs(
    x: Tensor,
    y: Tensor,
    metric: str,
    thresholds: Tensor,
    excluded: Tensor,
    pairs: Pairs,
    *,
    x_ids: Tensor | int = 0,
    y_ids: Tensor | int = 0,
) -> None:
    """Appends every pair of a row of x and a row of y whose score is at least the threshold of the row of x.

    Args:
        x, y: rows [q, w] and [c, w], their last dimension dense. For l1 they are float32, and the score is the negative
            distance as float32 sums it, which is no upper bound: the thresholds must leave room for its rounding.
            Otherwise they are bfloat16 with w a multiple of `STEP`, and the score is the inner product.
        metric: as in `pair_scores`; all but "l1" are the same here.
        thresholds: float32 [q]; -inf takes all, +inf none.
        excluded: int32 [q]: the row of y that is left out for each row of x, or -1.
        pairs: the places of the queries. Pairs that find none are counted.
        x_ids: which query of `pairs` each row of x is: int32 or int64 [q], or that of the first, which the next follow.
        y_ids: the ids of the candidates, likewise [c].
    """
    operands = _operands(x, y, metric, append_pairs_kernel)
    blocks = _blocks(append_pairs_kernel, operands["width"])
    if operands["n_m"] * operands["n_n"]:
        launch(
            append_pairs_kernel, lambda meta: (operands["n_m"] * operands["n_n"],),
            int64_for=(x, y, pairs.scores), **operands, x_thresholds=_padded(thresholds, blocks["BLOCK_M"]),
            excluded=excluded, **_appending(x_ids, y_ids, pairs),
        )  # fmt: skip


@launcher("x_thresholds", "y_thresholds", "x_allowed", "y_allowed")
def append_pairs_symmetric(
    x: Tensor,
    y: Tensor,
    metric: str,
    x_thresholds: Tensor,
    y_thresholds: Tensor,
    x_allowed: Tensor | None,
    y_allowed: Tensor | None,
    pairs: Pairs,
    *,
    x_ids: Tensor | int = 0,
    y_ids: Tensor | int = 0,
    diagonal: bool,
) -> None:
    """Appends every pair of a row of x and a row of y whose score is at least the threshold of the row of x, and, the
    row of y as the query, every pair whose score is at least the threshold of the row of y.

    Args:
        x, y, metric, pairs: as in `append_pairs`.
        x_ids, y_ids: as in `append_pairs`; of every row both which query it is, and its id as a candidate.
        x_thresholds, y_thresholds: float32 [q] and [c].
        x_allowed, y_allowed: bool [q] and [c], which rows may be candidates; None: all. All are queries.
        diagonal: whether x and y are the same rows. No row then pairs with itself.
    """
    operands = _operands(x, y, metric, append_pairs_symmetric_kernel)
    blocks = _blocks(append_pairs_symmetric_kernel, operands["width"])
    if operands["n_m"] * operands["n_n"]:
        launch(
            append_pairs_symmetric_kernel, lambda meta: (operands["n_m"] * operands["n_n"],), int64_for=(x, y),
            **operands, x_thresholds=_padded(x_thresholds, blocks["BLOCK_M"]),
            y_thresholds=_padded(y_thresholds, blocks["BLOCK_N"]), x_allowed=x_allowed, y_allowed=y_allowed,
            **_appending(x_ids, y_ids, pairs), DIAGONAL=diagonal,
        )  # fmt: skip


@launcher("thresholds", "kth", "is_far", "x_norms", "x_roundoffs", "y_norms", "y_roundoffs")
def keep_best(
    pairs: Pairs,
    metric: str,
    thresholds: Tensor,
    kth: Tensor,
    is_far: Tensor,
    x_norms: Tensor,
    x_roundoffs: Tensor,
    y_norms: Tensor,
    y_roundoffs: Tensor,
    *,
    k: int,
    kept: int,
    rounding: float,
    underflow: float,
) -> None:
    """Raises the thresholds, in place, by the pairs that were appended, and drops the pairs that do not reach them.

    A pair's upper bound is what was appended, for l1 times 1 - `rounding`. Its lower bound is less by the error that
    nearest_neighbors_rows.py states, for l1 by 2.2 `rounding`. The pairs that are left stand first, the highest upper
    bound first, equal ones by the lower column. With fewer than k or `kept` pairs the bounds below are -inf.

    - `kth` rises to the least lower bound of the k highest pairs: no pair below it is among the k nearest.
    - If it is above the upper bound of pair number `kept`, that bound becomes the threshold, and `is_far` is set.
    - Otherwise the threshold rises to the least lower bound of the `kept` highest pairs, which is at most `kth`.

    A query whose pairs do not all have a place gets the threshold +inf. Its count stays above the capacity, and its
    pairs where they are.

    Args:
        pairs: of n queries, ids of columns below c, each at most once, in at most 2048 places.
        metric: as in `pair_scores`.
        thresholds, kth: float32 [n].
        is_far: bool [n]; not written if k is `kept`.
        x_norms, x_roundoffs, y_norms, y_roundoffs: float32 [n] and [c], with which the rows were prepared. For cosine
            the norms are 1, and 0 for zero rows.
        k, kept: pairs of a query that are wanted, and that are kept; 1 <= k <= kept <= places.
        rounding, underflow: with which the rows were prepared.
    """
    n, capacity = pairs.columns.shape
    width = next_power_of_2(capacity)
    if n:
        launch(
            keep_best_kernel, lambda meta: (ceil_div(n, meta["BLOCK_N"]),), width=width, int64_for=(pairs.scores,),
            **pairs._asdict(), thresholds=thresholds, kth=kth, is_far=is_far, x_norms=x_norms, x_roundoffs=x_roundoffs,
            y_norms=y_norms, y_roundoffs=y_roundoffs, n=n, capacity=capacity, k=k, kept=kept, rounding=rounding,
            underflow=underflow, METRIC=metric, EXTRA=kept > k, CAPACITY=width,
        )  # fmt: skip


@launcher("rows", "columns", "x_scales", "y_scales")
def pair_scores(
    x: Tensor, x_scales: Tensor | None, rows: Tensor, y: Tensor, y_scales: Tensor | None, columns: Tensor, metric: str
) -> Tensor:
    """Scores float32 [n] of the pairs of rows x[rows[i]] and y[columns[i]]; -inf where columns[i] is negative.

    The bits of a score depend on its two rows alone.

    Args:
        x, y: [., d], floating point, any strides.
        x_scales, y_scales: float32 [.], the inverse norms of the rows, for cosine; None for other metrics.
        rows, columns: int64 [n].
        metric: "cosine", "dot", "l2" or "l1".
    """
    out = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    if out.numel():
        launch(
            pair_scores_kernel, lambda meta: (ceil_div(out.numel(), meta["BLOCK_P"]),),
            width=x.shape[1], int64_for=(x, y),
            x=x, y=y, x_scales=x_scales, y_scales=y_scales, rows=rows, columns=columns, out=out, pairs=out.numel(),
            d=x.shape[1], x_m=x.stride(0), x_d=x.stride(1), y_n=y.stride(0), y_d=y.stride(1), METRIC=metric,
        )  # fmt: skip
    return out
