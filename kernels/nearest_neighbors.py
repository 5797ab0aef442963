"""The best pairs of each tile of scores, the pairs that reach a threshold, and the scores of given pairs.

The caller prepares the rows. They are bfloat16, with extra columns that turn their inner product into an upper bound of
the score. For l1, which is no inner product, they are the float32 rows themselves.

One program scores BLOCK_M rows of x against BLOCK_N rows of y. The tile never leaves the chip. T rounds of a masked
maximum then write the T best of each of its rows, and in the symmetric kernel of each of its columns too. No program
keeps a running list: it depends on its tile alone, and merging the results of the tiles is a small fraction of the
work. So a few queries are spread over as many programs as the vocabulary has tiles.

Where every row has a threshold, a lower bound of the last score that it keeps, a program appends the pairs that reach
it to one buffer instead. Few do, so a tile's cost is that of finding whether any does. Then each thread takes the best
of its 16 scores of a row, so that one element in 16 goes through the appending code; another round follows while
something is left.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, primitives
from .primitives import launch, launcher, widen

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
def _store_best(scores, index, first, values, places, mask, AXIS: tl.constexpr, T: tl.constexpr):
    """Stores the T highest scores along an axis, best first, and their indices: among equal scores the lower index
    first, -1 where there is no score above -inf."""
    for t in tl.static_range(T):
        best, at = tl.max(scores, axis=AXIS, return_indices=True)
        at += first
        tl.store(values + t, best, mask=mask)
        tl.store(places + t, tl.where(best > float("-inf"), at, -1), mask=mask)
        scores = tl.where(index == tl.expand_dims(at, AXIS), float("-inf"), scores)


@triton.jit(do_not_specialize=["q", "c", "n_m", "n_n"])
def tile_best_kernel(
    x, y, excluded, values, places, q, c, d, n_m, n_n, x_m, y_n,
    T: tl.constexpr, L1: tl.constexpr, UPCAST: tl.constexpr, INT64: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _tile_position(n_m, n_n, 8)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    scores = _tile(x, y, m, n, q, c, d, x_m, y_n, L1, UPCAST, INT64, BLOCK_M, BLOCK_N, BLOCK_K)
    excluded_n = tl.load(excluded + m, mask=m < q, other=-1)
    scores = tl.where((n < c)[None, :] & (n[None, :] != excluded_n[:, None]), scores, float("-inf"))
    out = (widen(m, INT64) * n_n + tile_n) * T
    _store_best(scores, n[None, :], tile_n * BLOCK_N, values + out, places + out, m < q, 1, T)


@triton.jit(do_not_specialize=["q", "c", "n_m", "n_n"])
def tile_best_symmetric_kernel(
    x, y, x_values, x_places, y_values, y_places, q, c, d, n_m, n_n, column_offset, x_m, y_n,
    T: tl.constexpr, L1: tl.constexpr, UPCAST: tl.constexpr, INT64: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _tile_position(n_m, n_n, 8)
    if tile_n * BLOCK_N + BLOCK_N - 1 + column_offset <= tile_m * BLOCK_M:  # below the diagonal
        return
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    scores = _tile(x, y, m, n, q, c, d, x_m, y_n, L1, UPCAST, INT64, BLOCK_M, BLOCK_N, BLOCK_K)
    valid = (m < q)[:, None] & (n < c)[None, :] & ((n + column_offset)[None, :] > m[:, None])
    scores = tl.where(valid, scores, float("-inf"))
    out = (widen(m, INT64) * n_n + tile_n) * T
    _store_best(scores, n[None, :], tile_n * BLOCK_N, x_values + out, x_places + out, m < q, 1, T)
    out = (widen(n, INT64) * n_m + tile_m) * T
    _store_best(scores, m[:, None], tile_m * BLOCK_M, y_values + out, y_places + out, n < c, 0, T)


@triton.jit
def _append(takes, at, query, candidate, score, rows, columns, scores, lost, capacity):
    room = takes & (at < capacity)
    tl.store(rows + at, query, mask=room)
    tl.store(columns + at, candidate, mask=room)
    tl.store(scores + at, score, mask=room)
    tl.atomic_or(lost + query, 1, mask=takes & (at >= capacity), sem="relaxed")


@triton.jit
def _append_tile(
    tile, first_m, first_n, x_thresholds, y_thresholds, x_allowed, y_allowed, excluded, x_ids, y_ids, x_id, y_id,
    rows, columns, scores, total, lost, capacity, q, c,
    SYMMETRIC: tl.constexpr, UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
            wanted = x_takes.to(tl.int64)
            if SYMMETRIC:
                y_takes = found & (score >= tl.load(y_thresholds + n, mask=found, other=float("inf")))
                if x_allowed is not None:
                    y_takes = y_takes & (tl.load(x_allowed + m, mask=y_takes, other=0) != 0)
                wanted += y_takes.to(tl.int64)
            at = tl.atomic_add(total + tl.zeros_like(m), wanted, mask=wanted > 0, sem="relaxed")
            row = m + x_id if x_ids is None else tl.load(x_ids + m, mask=wanted > 0, other=0).to(tl.int32)
            column = n + y_id if y_ids is None else tl.load(y_ids + n, mask=wanted > 0, other=0).to(tl.int32)
            _append(x_takes, at, row, column, score, rows, columns, scores, lost, capacity)
            if SYMMETRIC:
                at += x_takes.to(tl.int64)
                _append(y_takes, at, column, row, score, rows, columns, scores, lost, capacity)
            left = tl.where(tl.arange(0, 16)[None, None, None, :] == inside[:, :, :, None], float("-inf"), left)
            more = tl.max(left) > float("-inf")


@triton.jit(do_not_specialize=["q", "c", "n_m", "n_n", "x_id", "y_id", "capacity"])
def append_pairs_kernel(
    x, y, x_thresholds, excluded, x_ids, y_ids, x_id, y_id, rows, columns, scores, total, lost, capacity,
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
        rows, columns, scores, total, lost, capacity, q, c, False, UPCAST, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["q", "c", "n_m", "n_n", "x_id", "y_id", "capacity"])
def append_pairs_symmetric_kernel(
    x, y, x_thresholds, y_thresholds, x_allowed, y_allowed, x_ids, y_ids, x_id, y_id,
    rows, columns, scores, total, lost, capacity, q, c, d, n_m, n_n, x_m, y_n,
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
        x_ids, y_ids, x_id, y_id, rows, columns, scores, total, lost, capacity, q, c, True, UPCAST, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["pairs"])
def pair_scores_kernel(
    x, y, x_scales, y_scales, rows, columns, out, pairs, d, x_m, x_d, y_n, y_d,
    METRIC: tl.constexpr, INT64: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    p = widen(tl.program_id(0), INT64) * BLOCK_P + tl.arange(0, BLOCK_P)
    row = tl.load(rows + p, mask=p < pairs, other=0)
    column = tl.load(columns + p, mask=p < pairs, other=0)
    if METRIC == "cosine":
        x_scale = tl.load(x_scales + row)[:, None]
        y_scale = tl.load(y_scales + column)[:, None]
    total = tl.zeros((BLOCK_P, BLOCK_D), dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        used = (p < pairs)[:, None] & (k < d)[None, :]
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
    tl.store(out + p, tl.sum(total, axis=1), mask=p < pairs)


def _blocks(kernel: Any, width: int) -> dict[str, int]:
    return configs.pinned(kernel.__name__, width, interpreted=primitives.interpreted(kernel)).kwargs


def _operands(x: Tensor, y: Tensor, metric: str, kernel: Any) -> dict[str, Any]:
    width = 0 if metric == "l1" else x.shape[0]
    blocks = _blocks(kernel, width)
    return {
        "width": width,
        "x": x, "y": y, "q": x.shape[0], "c": y.shape[0], "d": x.shape[1], "x_m": x.stride(0), "y_n": y.stride(0),
        "n_m": triton.cdiv(x.shape[0], blocks["BLOCK_M"]), "n_n": triton.cdiv(y.shape[0], blocks["BLOCK_N"]),
        "L1": metric == "l1", "UPCAST": primitives.interpreted(kernel),
    }  # fmt: skip


@launcher("x", "y", "excluded")
def tile_best(x: Tensor, y: Tensor, metric: str, excluded: Tensor, best: int) -> tuple[Tensor, Tensor]:
    """The `best` rows of each tile of y, for every row of x.

    Args:
        x, y: rows [q, w] and [c, w], their last dimension dense. For l1 they are float32, and the score is the negative
            distance. Otherwise they are bfloat16 with w a multiple of `STEP`, and the score is the inner product.
        metric: as in `pair_scores`; all but "l1" are the same here.
        excluded: int32 [q]: the row of y that is left out for each row of x, or -1. A row is not its own neighbor.
        best: rows a tile.

    Returns:
        Scores float32 and rows of y int32 [q, tiles, best]: best first, among equal scores the lower row first; -inf
        and -1 where a tile has fewer.
    """
    operands = _operands(x, y, metric, tile_best_kernel)
    values = torch.empty(x.shape[0], operands["n_n"], best, dtype=torch.float32, device=x.device)
    places = torch.empty(values.shape, dtype=torch.int32, device=x.device)
    launch(
        tile_best_kernel, lambda meta: (operands["n_m"] * operands["n_n"],),
        int64_for=(x, y, values), **operands, excluded=excluded, values=values, places=places, T=best,
    )  # fmt: skip
    return values, places


@launcher("x", "y")
def tile_best_symmetric(
    x: Tensor, y: Tensor, metric: str, best: int, *, diagonal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best rows of each tile of y for every row of x, and the best rows of each tile of x for every row of y.

    Args:
        x, y, metric, best: as in `tile_best`.
        diagonal: whether x and y are the same rows. Then only the pairs above the diagonal are scored.

    Returns:
        Scores and rows of y [q, tiles of y, best], as `tile_best` returns them; scores and rows of x
        [c, tiles of x, best].
    """
    operands = _operands(x, y, metric, tile_best_symmetric_kernel)
    shapes = ((x.shape[0], operands["n_n"], best), (y.shape[0], operands["n_m"], best))
    # Filled, because programs below the diagonal return at once.
    x_values, y_values = (torch.full(s, -torch.inf, dtype=torch.float32, device=x.device) for s in shapes)
    x_places, y_places = (torch.full(s, -1, dtype=torch.int32, device=x.device) for s in shapes)
    launch(
        tile_best_symmetric_kernel, lambda meta: (operands["n_m"] * operands["n_n"],),
        int64_for=(x, y, x_values, y_values), **operands, column_offset=0 if diagonal else x.shape[0], T=best,
        x_values=x_values, x_places=x_places, y_values=y_values, y_places=y_places,
    )  # fmt: skip
    return x_values, x_places, y_values, y_places


class Pairs(NamedTuple):
    """Pairs appended by any number of launches, in an order that depends on timing.

    Attributes:
        rows, columns: int32 [capacity], the ids of query and candidate.
        scores: float32 [capacity].
        total: int64 [1], the pairs that were to be appended. Where it is above the capacity, some are not there.
        lost: int32, by the id of a query: not 0 if one of its pairs is not there.
    """

    rows: Tensor
    columns: Tensor
    scores: Tensor
    total: Tensor
    lost: Tensor


def no_pairs(capacity: int, ids: int, device: torch.device) -> Pairs:
    """An empty buffer for pairs of rows with ids below `ids`."""
    rows, columns = (torch.empty(capacity, dtype=torch.int32, device=device) for _ in range(2))
    scores = torch.empty(capacity, dtype=torch.float32, device=device)
    total = torch.zeros(1, dtype=torch.int64, device=device)
    return Pairs(rows, columns, scores, total, torch.zeros(ids, dtype=torch.int32, device=device))


def _appending(x_ids: Tensor | int, y_ids: Tensor | int, pairs: Pairs) -> dict[str, Any]:
    given_x, given_y = (ids.contiguous() if isinstance(ids, Tensor) else None for ids in (x_ids, y_ids))
    return {
        "x_ids": given_x, "x_id": x_ids if isinstance(x_ids, int) else 0,
        "y_ids": given_y, "y_id": y_ids if isinstance(y_ids, int) else 0,
        **pairs._asdict(), "capacity": pairs.rows.shape[0],
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
        x, y, metric: as in `tile_best`. The scores for l1 are the negative distances as float32 sums them, which are no
            upper bounds: the thresholds must leave room for their rounding.
        thresholds: float32 [q]; -inf takes all, +inf none.
        excluded: int32 [q]: the row of y that is left out for each row of x, or -1.
        pairs: the buffer. A full one still counts, and marks the rows whose pairs it has no room for.
        x_ids, y_ids: the ids of the rows: int32 or int64 [q] and [c], or the id of the first, which the next follow.
    """
    operands = _operands(x, y, metric, append_pairs_kernel)
    blocks = _blocks(append_pairs_kernel, operands["width"])
    if operands["n_m"] * operands["n_n"]:
        launch(
            append_pairs_kernel, lambda meta: (operands["n_m"] * operands["n_n"],), int64_for=(x, y), **operands,
            x_thresholds=_padded(thresholds, blocks["BLOCK_M"]), excluded=excluded, **_appending(x_ids, y_ids, pairs),
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
        x, y, metric, pairs, x_ids, y_ids: as in `append_pairs`.
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


@launcher("rows", "columns", "x_scales", "y_scales")
def pair_scores(
    x: Tensor, x_scales: Tensor | None, rows: Tensor, y: Tensor, y_scales: Tensor | None, columns: Tensor, metric: str
) -> Tensor:
    """Scores float32 [n] of the pairs of rows x[rows[i]] and y[columns[i]].

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
            pair_scores_kernel, lambda meta: (triton.cdiv(out.numel(), meta["BLOCK_P"]),),
            width=x.shape[1], int64_for=(x, y),
            x=x, y=y, x_scales=x_scales, y_scales=y_scales, rows=rows, columns=columns, out=out, pairs=out.numel(),
            d=x.shape[1], x_m=x.stride(0), x_d=x.stride(1), y_n=y.stride(0), y_d=y.stride(1), METRIC=metric,
        )  # fmt: skip
    return out
