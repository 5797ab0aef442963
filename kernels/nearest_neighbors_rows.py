"""What a search needs of single rows: their statistics, their prepared form, and how far they moved.

Nothing of it is reduced over the rows or read by the host: a row's statistics and its prepared form are its own.

Prepared rows are bfloat16, with extra columns that turn their inner product into an upper bound of the score. Notation:
x and y are two float32 rows (normalized for cosine), u is 2^-24, d the width of the rows. x^ is x rounded to bfloat16
and p_x |x| = |x^ - x| its roundoff. r is the relative float32 rounding in a product of d + 9 terms, truncating, in the
score it stands for and in the norms, as the caller gives it (`rounding`), and t (`underflow`) the absolute one.

    extra columns     query                                        column
    cosine            (r + 1.01 p_x) |x|, 1.004 |x|                |y|, 1.01 p_y |y|
    dot               the same, t                                  the same, 1
    l2 (queries 2 x)  twice the same, t - (1 - r)|x|^2, 1          the same, 1, -(1 - r)|y|^2

Why no product of prepared rows is below the score:

- x^.y^ - x.y = (x^ - x).y + x^.(y^ - y), which is at least -p_x |x||y| - |x^| p_y |y|. No element grows by more than
  2^-8 of itself, also where the smallest numbers round to 0, so that |x^| <= 1.004 |x|.
- The extra columns add at least r |x||y| + 1.01 p_x |x||y| + 1.004 |x| 1.01 p_y |y|. They are rounded up; those that
  are not 0 are normal numbers, which no unit flushes.
- What this leaves, r |x||y| + 0.01 (p_x |x||y| + 1.004 |x| p_y |y|), pays for the accumulation. It is off by at most
  2 (d + 9) u times the sum of the magnitudes of its terms. The terms of x^.y^ and r pay from r, as they did when one
  roundoff stood for all rows. Those of p_x and p_y pay from their own 0.01, enough for widths below 50,000.
- The same 0.01 covers the rounding of p itself, (d + 8) u. Squares that underflow in p are below 2^-60 sqrt(d) of
  |x||y|, a small part of r. Products that underflow are t's.
- l2 doubles x.y and all it adds. (1 - r) takes r (|x|^2 + |y|^2) from the squares, so that r (|x| + |y|)^2 is added in
  all. A square is the sum of three bfloat16 numbers; what is below the smallest normal number is t's.

Nor is a product above its score by more than 2.1 (s + t) + 2^-124 (|x| + |y|). Here s is (r + 1.01 (p_x + p_y)) |x||y|,
for l2 twice that and r (|x|^2 + |y|^2). The last part is of extra columns that are the smallest normal number.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .nearest_neighbors import STEP
from .primitives import ceil_div, inverse_of_power, launch, launcher, power_of_two, widen

ZERO_NORM = tl.constexpr(1e-30)  # a row with a smaller norm counts as a zero row for cosine
EXTRA_COLUMNS = {"cosine": 2, "dot": 3, "l2": 8}
_TAIL = 128  # extra columns and padding: at most 8 + STEP - 1
_LEAST_NORMAL = tl.constexpr(2.0**-126)


@triton.jit
def product(a, b):
    """a * b, rounded. The compiler would contract a plain product into the sum that follows it."""
    return tl.fma(a, b, tl.zeros_like(a))


@triton.jit
def to_bfloat16(x):
    """The nearest bfloat16 number, ties to even, as float32; 0 below the smallest normal number, which some units flush
    and others do not. In integers, because the interpreter cuts where a GPU rounds."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    return tl.where((bits & 0x7F800000) == 0, 0.0, bits.to(tl.float32, bitcast=True))


@triton.jit
def _up_to_bfloat16(x):
    """The next bfloat16 number at or above x >= 0, as float32; a normal number unless x is 0."""
    bits = (x.to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000
    return tl.where(x > 0.0, tl.maximum(bits.to(tl.float32, bitcast=True), _LEAST_NORMAL), 0.0)


@triton.jit
def load_rows(x, row, k, mask, x_m, x_d, INT64: tl.constexpr):
    """Elements of rows as float32, 0 where the mask is not set."""
    return tl.load(x + row[:, None] * x_m + widen(k, INT64)[None, :] * x_d, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["n"])
def row_statistics_kernel(
    x, norms, inverse_norms, roundoffs, finite, n, d, x_m, x_d,
    METRIC: tl.constexpr, INT64: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = widen(tl.program_id(0), INT64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < n
    # The row is read once from memory, and again from the cache.
    largest = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.int32)
    for start in range(0, d, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        value = load_rows(x, row, k, live[:, None] & (k < d)[None, :], x_m, x_d, INT64)
        largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)  # in the order of magnitudes
    largest = tl.max(largest, axis=1)
    unit = power_of_two(largest.to(tl.float32, bitcast=True))
    inverse_unit = inverse_of_power(unit)[:, None]
    squares = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        value = load_rows(x, row, k, live[:, None] & (k < d)[None, :], x_m, x_d, INT64) * inverse_unit
        squares += value * value
    length = tl.sqrt_rn(tl.sum(squares, axis=1))  # in units
    norm = length * unit
    zero = norm < ZERO_NORM
    inverse_norm = tl.where(zero, 0.0, tl.div_rn(tl.full((BLOCK_N,), 1.0, tl.float32), tl.where(zero, 1.0, norm)))
    tl.store(norms + row, norm, mask=live)
    tl.store(inverse_norms + row, inverse_norm, mask=live)
    tl.store(finite + row, largest < 0x7F800000, mask=live)
    if METRIC == "l1":
        tl.store(roundoffs + row, tl.zeros((BLOCK_N,), dtype=tl.float32), mask=live)
        return
    squares = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        value = load_rows(x, row, k, live[:, None] & (k < d)[None, :], x_m, x_d, INT64)
        if METRIC == "cosine":
            value = product(value, tl.broadcast_to(inverse_norm[:, None], (BLOCK_N, BLOCK_D)))
            error = value - to_bfloat16(value)
        else:
            error = (value - to_bfloat16(value)) * inverse_unit
        squares += error * error
    roundoff = tl.sqrt_rn(tl.sum(squares, axis=1))
    if METRIC != "cosine":  # whose rows have the norm 1
        roundoff = tl.where(length > 0.0, tl.div_rn(roundoff, tl.where(length > 0.0, length, 1.0)), 0.0)
    tl.store(roundoffs + row, roundoff, mask=live)


@triton.jit(do_not_specialize=["n", "first"])
def prepare_rows_kernel(
    x, rows, norms, inverse_norms, roundoffs, out, n, d, w, first, rounding, underflow, x_m, x_d,
    METRIC: tl.constexpr, QUERIES: tl.constexpr, TAIL: tl.constexpr, INT64: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    m = widen(tl.program_id(0), INT64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = m < n
    row = m + first if rows is None else widen(tl.load(rows + m, mask=live, other=0), INT64)
    inverse_norm = tl.load(inverse_norms + row, mask=live, other=0.0)
    for start in range(0, d, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        used = live[:, None] & (k < d)[None, :]
        value = load_rows(x, row, k, used, x_m, x_d, INT64)
        if METRIC == "cosine":
            value *= inverse_norm[:, None]
        value = to_bfloat16(value)
        if METRIC == "l2" and QUERIES:
            value *= 2.0
        tl.store(out + m[:, None] * w + k[None, :], value.to(tl.bfloat16), mask=used)
    norm = tl.load(norms + row, mask=live, other=0.0)
    if METRIC == "cosine":
        norm = tl.where(inverse_norm > 0.0, 1.0, 0.0)
    roundoff = product(tl.load(roundoffs + row, mask=live, other=0.0), tl.full((BLOCK_N,), 1.01, tl.float32))
    if QUERIES:
        extra_0 = product(roundoff + rounding, norm)
        extra_1 = norm * 1.004
        if METRIC == "l2":
            extra_0 *= 2.0
            extra_1 *= 2.0
    else:
        extra_0 = norm
        extra_1 = roundoff * norm
    i = tl.arange(0, TAIL)[None, :]
    extra = tl.where(i == 0, _up_to_bfloat16(extra_0)[:, None], 0.0)
    extra = tl.where(i == 1, _up_to_bfloat16(extra_1)[:, None], extra)
    if METRIC == "dot":
        one = tl.full((BLOCK_N,), 1.0, tl.float32)
        extra = tl.where(i == 2, _up_to_bfloat16(one * underflow if QUERIES else one)[:, None], extra)
    if METRIC == "l2":
        square = product(product(norm, norm), tl.zeros_like(norm) + (rounding - 1.0))
        if QUERIES:
            square += underflow
        high = to_bfloat16(square)
        middle = to_bfloat16(square - high)
        low = to_bfloat16(square - high - middle)
        SQUARE: tl.constexpr = 2 if QUERIES else 5
        extra = tl.where((i >= 2) & (i < 8), 1.0, extra)
        extra = tl.where(i == SQUARE, high[:, None], extra)
        extra = tl.where(i == SQUARE + 1, middle[:, None], extra)
        extra = tl.where(i == SQUARE + 2, low[:, None], extra)
    tl.store(out + m[:, None] * w + d + i, extra.to(tl.bfloat16), mask=live[:, None] & (d + i < w))


@triton.jit(do_not_specialize=["n"])
def row_movements_kernel(
    old, old_inverse, new, new_inverse, out, n, d, old_m, old_d, new_m, new_d,
    METRIC: tl.constexpr, INT64: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = widen(tl.program_id(0), INT64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < n
    if METRIC == "cosine":
        old_scale = tl.load(old_inverse + row, mask=live, other=0.0)[:, None]
        new_scale = tl.load(new_inverse + row, mask=live, other=0.0)[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for start in range(0, d, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        used = live[:, None] & (k < d)[None, :]
        a = load_rows(old, row, k, used, old_m, old_d, INT64)
        b = load_rows(new, row, k, used, new_m, new_d, INT64)
        if METRIC == "cosine":  # between the rounded rows, which are what is scored
            a = product(a, tl.broadcast_to(old_scale, (BLOCK_N, BLOCK_D)))
            b = product(b, tl.broadcast_to(new_scale, (BLOCK_N, BLOCK_D)))
        if METRIC == "l1":
            total += tl.abs(b - a)
        else:
            total += (b - a) * (b - a)
    moved = tl.sum(total, axis=1)
    if METRIC != "l1":
        moved = tl.sqrt_rn(moved)
    tl.store(out + row, moved, mask=live)


@launcher()
def row_statistics(x: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is known of each row of x [n, d], floating point, any strides.

    Args:
        metric: "cosine", "dot", "l2" or "l1".

    Returns:
        norms: float32 [n], the Euclidean ones, exact to (d / 2 + 2) u for every finite row, however large or small. A
            row that is not finite has the norm NaN or inf, and so has a finite one whose norm float32 cannot hold.
        inverse_norms: float32 [n], 0 for norms below 1e-30.
        roundoffs: float32 [n], |x - bfloat16(x)| / |x| of the row, which is normalized for cosine; 0 for zero rows, and
            for l1, which needs none.
        finite: bool [n], whether the row has neither NaN nor inf.
    """
    n, d = x.shape
    norms, inverse_norms, roundoffs = (torch.empty(n, dtype=torch.float32, device=x.device) for _ in range(3))
    finite = torch.empty(n, dtype=torch.bool, device=x.device)
    if n:
        launch(
            row_statistics_kernel, lambda meta: (ceil_div(n, meta["BLOCK_N"]),), width=d, int64_for=(x,),
            x=x, norms=norms, inverse_norms=inverse_norms, roundoffs=roundoffs, finite=finite, n=n, d=d,
            x_m=x.stride(0), x_d=x.stride(1), METRIC=metric,
        )  # fmt: skip
    return norms, inverse_norms, roundoffs, finite


@launcher("rows", "norms", "inverse_norms", "roundoffs")
def prepare_rows(
    x: Tensor,
    rows: Tensor | slice | None,
    norms: Tensor,
    inverse_norms: Tensor,
    roundoffs: Tensor,
    metric: str,
    *,
    queries: bool,
    rounding: float,
    underflow: float,
) -> Tensor:
    """Rows of x, prepared: bfloat16 [n, w] with w the next multiple of `STEP` at or above d and the extra columns.

    The inner product of a query's and a column's prepared rows, accumulated in float32, rounded or truncated, is an
    upper bound of their score. The derivation is at the top of this file.

    Args:
        x: [v, d], floating point, any strides.
        rows: int64 [n], or a slice of step 1; None: all rows.
        norms, inverse_norms, roundoffs: float32 [v], as `row_statistics` returns them for the metric.
        metric: "cosine", "dot" or "l2".
        queries: for which side of the product: the queries', or the columns'.
        rounding, underflow: r and t.
    """
    first, stop, _ = (rows if isinstance(rows, slice) else slice(None)).indices(x.shape[0])
    n = rows.shape[0] if isinstance(rows, Tensor) else max(0, stop - first)
    d = x.shape[1]
    w = ceil_div(d + EXTRA_COLUMNS[metric], STEP) * STEP
    out = torch.empty(n, w, dtype=torch.bfloat16, device=x.device)
    if n:
        launch(
            prepare_rows_kernel, lambda meta: (ceil_div(n, meta["BLOCK_N"]),), width=d, int64_for=(x, out),
            x=x, rows=rows if isinstance(rows, Tensor) else None, norms=norms, inverse_norms=inverse_norms,
            roundoffs=roundoffs, out=out, n=n, d=d, w=w, first=first, rounding=rounding, underflow=underflow,
            x_m=x.stride(0), x_d=x.stride(1), METRIC=metric, QUERIES=queries, TAIL=_TAIL,
        )  # fmt: skip
    return out


@launcher("old_inverse_norms", "new_inverse_norms")
def row_movements(
    old: Tensor, old_inverse_norms: Tensor | None, new: Tensor, new_inverse_norms: Tensor | None, metric: str
) -> Tensor:
    """How far each row moved: float32 [n], the norm of the difference, off by at most (d + 8) u relative to itself.

    Differences whose square underflows count as 0. Norms must be those that a search accepts: up to 1e30 for cosine, up
    to 1e18 otherwise.

    Args:
        old, new: [n, d], floating point, any strides.
        old_inverse_norms, new_inverse_norms: float32 [n] for cosine, whose rows are normalized; else None.
        metric: "cosine", "dot", "l2" or "l1", which has a norm of its own.
    """
    n, d = new.shape
    out = torch.empty(n, dtype=torch.float32, device=new.device)
    if n:
        launch(
            row_movements_kernel, lambda meta: (ceil_div(n, meta["BLOCK_N"]),), width=d, int64_for=(old, new),
            old=old, old_inverse=old_inverse_norms, new=new, new_inverse=new_inverse_norms, out=out, n=n, d=d,
            old_m=old.stride(0), old_d=old.stride(1), new_m=new.stride(0), new_d=new.stride(1), METRIC=metric,
        )  # fmt: skip
    return out
