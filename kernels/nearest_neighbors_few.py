"""The scores of a few queries with every row, of a table that is read once and as it is in memory.

Rows are neither prepared nor known before: one pass computes the statistics of a row beside its products. So what
nearest_neighbors_rows.py derives for prepared rows is added in float32, and two things differ.

- For cosine a row is rounded to bfloat16 before it is normalized. Its roundoff relative to its norm is that of the row,
  and the norm of the score differs from this one by (d + 4) u, relative, as sums go in other orders. r has room for
  that: the terms that it stands for are (3 d + 26) u where accumulation truncates, and r is 6.6 (d + 16) u.
- Squares are summed as they are. A row whose norm is not in [1e-12, 1e18] is extreme: its sums may overflow or vanish,
  and nothing is said of it. A row of zeros is not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import primitives
from .nearest_neighbors_rows import load_rows, to_bfloat16
from .primitives import ceil_div, launch, launcher, widen

ORDINARY, NOT_FINITE, EXTREME = (tl.constexpr(state) for state in range(3))
_LEAST_SQUARE, _MOST_SQUARE = tl.constexpr(1e-24), tl.constexpr(1e36)


@triton.jit(do_not_specialize=["q", "n"])
def score_few_kernel(
    x, x_norms, x_roundoffs, y, upper, norms, roundoffs, states, q, n, d, rounding, underflow, x_m, y_n, y_d,
    METRIC: tl.constexpr, UPCAST: tl.constexpr, INT64: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    row = widen(tl.program_id(0), INT64) * BLOCK_N + tl.arange(0, BLOCK_N)
    query = tl.arange(0, BLOCK_Q)
    live, asked = row < n, query < q
    products = tl.zeros((BLOCK_N, BLOCK_Q), dtype=tl.float32)
    squares = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    errors = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    largest = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.int32)
    for start in range(0, d, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        value = load_rows(y, row, k, live[:, None] & (k < d)[None, :], y_n, y_d, INT64)
        rounded = to_bfloat16(value)
        # The extra columns of the queries, from d on, meet zeros.
        a = tl.load(x + query[None, :] * x_m + k[:, None], mask=asked[None, :], other=0.0)
        if UPCAST:  # the interpreter's product of bfloat16 blocks is wrong
            products = tl.dot(rounded, a.to(tl.float32), products)
        else:
            products = tl.dot(rounded.to(tl.bfloat16), a, products)
        squares += value * value
        errors += (value - rounded) * (value - rounded)
        largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)  # in the order of magnitudes
    square, largest = tl.sum(squares, axis=1), tl.max(largest, axis=1)
    norm = tl.sqrt_rn(square)
    is_zero = norm == 0.0
    divisor = tl.where(is_zero, 1.0, norm)
    roundoff = tl.where(is_zero, 0.0, tl.div_rn(tl.sqrt_rn(tl.sum(errors, axis=1)), divisor))
    is_extreme = (largest > 0) & ((square < _LEAST_SQUARE) | (square > _MOST_SQUARE))
    state = tl.where(is_extreme, EXTREME, ORDINARY)
    tl.store(states + row, tl.where(largest < 0x7F800000, state, NOT_FINITE), mask=live)
    tl.store(norms + row, norm, mask=live)
    tl.store(roundoffs + row, roundoff, mask=live)

    x_norm = tl.load(x_norms + query, mask=asked, other=0.0)
    x_roundoff = tl.load(x_roundoffs + query, mask=asked, other=0.0)
    if METRIC == "cosine":
        products *= tl.div_rn(tl.full((BLOCK_N,), 1.0, tl.float32), divisor)[:, None]
        norm = tl.where(is_zero, 0.0, 1.0)
    of_query = ((rounding + 1.01 * x_roundoff) * x_norm)[None, :] * norm[:, None]
    of_row = (1.004 * x_norm)[None, :] * (1.01 * roundoff * norm)[:, None]
    if METRIC == "cosine":
        out = products + (of_query + of_row)
    elif METRIC == "dot":
        out = products + (of_query + of_row + underflow)
    else:  # the queries are doubled
        lengths = (x_norm * x_norm)[None, :] + (norm * norm)[:, None]
        out = products + (2.0 * (of_query + of_row) + underflow) - (1.0 - rounding) * lengths
    at = upper + widen(query, INT64)[None, :] * n + row[:, None]
    tl.store(at, out, mask=live[:, None] & asked[None, :])


@launcher("x_norms", "x_roundoffs")
def score_few(
    x: Tensor, x_norms: Tensor, x_roundoffs: Tensor, y: Tensor, metric: str, *, rounding: float, underflow: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Upper bounds of the scores of a few queries with every row of y, and the statistics of the rows.

    Args:
        x: bfloat16 [q, w], the queries as `prepare_rows(..., queries=True)` returns them, at most 64.
        x_norms, x_roundoffs: float32 [q], with which they were prepared. For cosine the norms are 1, and 0 for zero
            rows.
        y: [n, d], floating point, any strides.
        metric: "cosine", "dot" or "l2".
        rounding, underflow: r and t of nearest_neighbors_rows.py.

    Returns:
        upper: float32 [q, n]. The scores are below by at most the error of prepared rows.
        norms, roundoffs: float32 [n]: |y| and |y - bfloat16(y)| / |y|.
        states: int32 [n]: `ORDINARY`, `NOT_FINITE` or `EXTREME`. All else of a row is only said where it is ordinary.
    """
    (q, _), (n, d) = x.shape, y.shape
    upper = torch.empty(q, n, dtype=torch.float32, device=y.device)
    norms, roundoffs = torch.empty(2, n, dtype=torch.float32, device=y.device)
    states = torch.empty(n, dtype=torch.int32, device=y.device)
    if n and q:
        launch(
            score_few_kernel, lambda meta: (ceil_div(n, meta["BLOCK_N"]),), width=q, int64_for=(y, upper),
            x=x, x_norms=x_norms, x_roundoffs=x_roundoffs, y=y, upper=upper, norms=norms, roundoffs=roundoffs,
            states=states, q=q, n=n, d=d, rounding=rounding, underflow=underflow, x_m=x.stride(0), y_n=y.stride(0),
            y_d=y.stride(1), METRIC=metric, UPCAST=primitives.interpreted(score_few_kernel),
        )  # fmt: skip
    return upper, norms, roundoffs, states
