"""The best pairs of each tile of scores, and the scores of given pairs. The tiles never leave the chip.

The caller prepares the rows. They are bfloat16, with extra columns that turn their inner product into an upper bound of
the score. For l1, which is no inner product, they are the float32 rows themselves.

One program scores BLOCK_M rows of x against BLOCK_N rows of y. T rounds of a masked maximum then write the T best of
each of its rows, and in the symmetric kernel of each of its columns too. No program keeps a running list: it depends on
its tile alone, and merging the results of the tiles is a small fraction of the work. So a few queries are spread over
as many programs as the vocabulary has tiles.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, primitives
from .primitives import launch, launcher, widen

STEP = 64  # columns multiplied at once; the width of prepared rows is a multiple of it


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


def _operands(x: Tensor, y: Tensor, metric: str, kernel: Any) -> dict[str, Any]:
    width = 0 if metric == "l1" else x.shape[0]
    blocks = configs.pinned(kernel.__name__, width, interpreted=primitives.interpreted(kernel)).kwargs
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
