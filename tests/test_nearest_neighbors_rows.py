"""The kernels of single rows: statistics, prepared rows and movements against float64, and the bound they give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ngrpo_ops.kernels import nearest_neighbors as kernels
from ngrpo_ops.kernels import nearest_neighbors_rows as row_kernels
from ngrpo_ops.kernels.primitives import forced_int64, recording
from ngrpo_ops.ops.nearest_neighbors.bounds import rounding_error, underflow_error
from ngrpo_ops.testing import DEVICE, METRICS, assert_within, generators, integers, lay_out, layouts, unit_roundoff

U = unit_roundoff(torch.float32)
PRODUCTS = ("cosine", "dot", "l2")
LEAST_NORMAL = 2.0**-126
_counts = st.one_of(st.integers(1, 9), st.sampled_from([63, 64, 65, 130]))
_widths = st.one_of(st.integers(1, 9), st.sampled_from([54, 56, 61, 62, 63, 64, 127, 128, 129, 300]))


@st.composite
def row_tables(draw: st.DrawFn, n: int | None = None, d: int | None = None, limit: float = 1e18) -> Tensor:
    """Rows of every scale from the smallest subnormal numbers to norms of `limit`, zero rows, duplicates, rows of one
    large and many tiny elements, in every dtype that a kernel takes and every layout."""
    generator = draw(generators)
    n, d = draw(_counts) if n is None else n, draw(_widths) if d is None else d
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):
        low, high = (-150, torch.tensor(limit).log2().item()) if dtype != torch.float16 else (-26, 12)
        exponents = low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)
        norms = torch.linalg.vector_norm(x, dim=1)
        x *= (exponents.exp2() / norms)[:, None]
    pick = torch.randint(n, (4,), generator=generator)
    x[pick[0]] *= torch.where(torch.rand(d, generator=generator) < 0.3, 1.0, 1e-30).double()
    x[pick[1]] = x[pick[2]]
    x[pick[3]] = 0.0
    x = x.to(dtype)
    if dtype == torch.bfloat16:  # whose subnormal numbers the interpreter converts wrongly
        x[x.abs() < LEAST_NORMAL] = 0.0
    if dtype == torch.float32 and draw(st.booleans()):
        x = x.bfloat16().float()  # as stored bfloat16 tables are: no roundoff
    return lay_out(x.to(DEVICE), draw(layouts))


def scored(x: Tensor, metric: str, inverse_norms: Tensor | None = None) -> Tensor:
    """The float32 rows that are scored, as float64."""
    x = x.float()
    if metric == "cosine":
        x = x * (row_kernels.row_statistics(x, metric)[1] if inverse_norms is None else inverse_norms)[:, None]
    return x.double()


def nearest_bfloat16(x: Tensor) -> Tensor:
    """Below the smallest normal number 0, without a sign."""
    rounded = x.bfloat16().float()
    return torch.where(rounded.abs() < LEAST_NORMAL, 0.0, rounded)


def up_to_bfloat16(x: Tensor) -> Tensor:
    rounded = x.bfloat16()
    rounded = torch.where(rounded.float() < x, rounded.nextafter(torch.full_like(rounded, torch.inf)), rounded).float()
    return torch.where(x > 0, rounded.clamp(min=LEAST_NORMAL), 0.0)


def prepared_by_torch(
    x: Tensor, rows: Tensor | slice | None, norms: Tensor, inverse_norms: Tensor, roundoffs: Tensor, metric: str, *,
    queries: bool, rounding: float, underflow: float,
) -> Tensor:  # fmt: skip
    """The formulas of `prepare_rows`, in the same order, in plain torch."""
    index = slice(None) if rows is None else rows
    x, norm, inverse, roundoff = (t[index].float() for t in (x, norms, inverse_norms, roundoffs))
    if metric == "cosine":
        x, norm = x * inverse[:, None], (inverse > 0).float()
    r, t = (torch.tensor(value, dtype=torch.float32, device=x.device) for value in (rounding, underflow))
    one, roundoff = torch.ones_like(norm), roundoff * 1.01
    scale = 2.0 if metric == "l2" and queries else 1.0
    if queries:
        extra = [up_to_bfloat16((roundoff + r) * norm * scale), up_to_bfloat16(norm * 1.004 * scale)]
    else:
        extra = [up_to_bfloat16(norm), up_to_bfloat16(roundoff * norm)]
    if metric == "dot":
        extra.append(up_to_bfloat16(t.expand_as(norm)) if queries else one)
    if metric == "l2":
        square = norm * norm * (r - 1.0) + (t if queries else 0.0)
        high = nearest_bfloat16(square)
        middle = nearest_bfloat16(square - high)
        squares = [high, middle, nearest_bfloat16(square - high - middle)]
        extra += [*squares, one, one, one] if queries else [one, one, one, *squares]
    out = torch.cat([nearest_bfloat16(x) * scale, torch.stack(extra, dim=1)], dim=1)
    return torch.nn.functional.pad(out, (0, -out.shape[1] % kernels.STEP)).bfloat16()


def constants(d: int) -> dict[str, float]:
    return {"rounding": rounding_error(d, truncating=True), "underflow": underflow_error(d)}


def prepare(x: Tensor, metric: str, queries: bool, rows: Tensor | slice | None = None) -> Tensor:
    statistics = row_kernels.row_statistics(x, metric)[:3]
    return row_kernels.prepare_rows(x, rows, *statistics, metric, queries=queries, **constants(x.shape[1]))


# Statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@given(data=st.data(), int64=st.booleans())
def test_row_statistics_kernel_against_oracle(metric, data, int64):
    x = data.draw(row_tables(limit=2.0**127))
    d = x.shape[1]
    if int64:
        with forced_int64():
            norms, inverse, roundoffs, finite = row_kernels.row_statistics(x, metric)
    else:
        norms, inverse, roundoffs, finite = row_kernels.row_statistics(x, metric)
    exact = torch.linalg.vector_norm(x.double(), dim=1)
    exact = torch.where(exact >= 2.0**128, torch.inf, exact)
    assert_within(norms, exact, (d / 2 + 2) * U * exact + 2.0**-149)
    assert bool(finite.all()) and finite.dtype == torch.bool
    assert torch.equal(inverse.double(), torch.where(norms < 1e-30, 0.0, (1.0 / norms.double())).float().double())
    if metric == "l1":
        assert not bool(roundoffs.any())
        return
    rows = scored(x, metric, inverse)
    usual = norms < 1e38  # others round to inf
    length = torch.linalg.vector_norm(rows, dim=1)
    error = torch.linalg.vector_norm(rows - nearest_bfloat16(rows.float()).double(), dim=1)
    relative = torch.where(length > 0, error / length, 0.0)
    assert_within(roundoffs[usual], relative[usual], (d + 8) * U * relative[usual] + 2.0**-60 * d)
    assert bool((roundoffs[length == 0] == 0).all())


@given(generator=generators, n=_counts, d=_widths, value=st.sampled_from([torch.nan, torch.inf, -torch.inf]))
@settings(max_examples=15)
def test_row_statistics_kernel_shows_rows_that_are_not_finite(generator, n, d, value):
    x = torch.randn(n, d, generator=generator).to(DEVICE)
    bad = integers(generator, n, 3)
    x[bad, integers(generator, d, 3)] = value
    norms, _, _, finite = row_kernels.row_statistics(x, "cosine")
    expected = torch.ones(n, dtype=torch.bool, device=DEVICE)
    expected[bad] = False
    assert torch.equal(finite, expected) and torch.equal(norms.isfinite(), expected)


def test_row_statistics_kernel_of_extreme_rows():
    least, most = 2.0**-149, torch.finfo(torch.float32).max
    x = torch.tensor(
        [[least, 0, 0], [3 * least, 4 * least, 0], [most, 0, 0], [most, -most, most], [1e19, least, -1e19]]
    )
    norms, inverse, _, finite = row_kernels.row_statistics(x.to(DEVICE), "dot")
    assert norms.tolist()[:3] == [least, 5 * least, most] and norms[3] == torch.inf
    assert_within(norms[4:], torch.tensor([1e19 * 2.0**0.5]), 3 * U * 1.5e19)
    assert bool(finite.all()) and inverse.tolist()[:2] == [0.0, 0.0]


# Prepared rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", PRODUCTS)
@given(data=st.data(), generator=generators, queries=st.booleans(), int64=st.booleans())
def test_prepare_rows_kernel_has_the_bits_of_torch(metric, data, generator, queries, int64):
    x = data.draw(row_tables(limit=1e30 if metric == "cosine" else 1e18))
    n, d = x.shape
    first = int(torch.randint(n, (), generator=generator))
    rows = data.draw(st.sampled_from([None, slice(first, n), slice(0, first), integers(generator, n, 2 * n)]))
    norms, inverse, roundoffs, _ = row_kernels.row_statistics(x, metric)
    arguments = (x, rows, norms, inverse, roundoffs, metric)
    if int64:
        with forced_int64():
            got = row_kernels.prepare_rows(*arguments, queries=queries, **constants(d))
    else:
        got = row_kernels.prepare_rows(*arguments, queries=queries, **constants(d))
    expected = prepared_by_torch(*arguments, queries=queries, **constants(d))
    assert got.shape == expected.shape and got.shape[1] % kernels.STEP == 0
    assert torch.equal(got.float(), expected.float())


def assert_bounds(x: Tensor, y: Tensor, metric: str) -> None:
    """No product of prepared rows is below the score, however the accumulation rounds, nor far above it."""
    d = x.shape[1]
    r, t = constants(d).values()
    x_statistics = row_kernels.row_statistics(x, metric)[:3]
    y_statistics = row_kernels.row_statistics(y, metric)[:3] if y is not x else x_statistics
    queries = row_kernels.prepare_rows(x, None, *x_statistics, metric, queries=True, **constants(d)).double()
    columns = row_kernels.prepare_rows(y, None, *y_statistics, metric, queries=False, **constants(d)).double()
    product = queries @ columns.T
    # A truncating accumulation of d + 9 terms, and the smallest normal number for each product that underflows.
    least = product - 2 * (d + 9) * U * (queries.abs() @ columns.abs().T) - (d + 9) * LEAST_NORMAL
    a, b = scored(x, metric, x_statistics[1]), scored(y, metric, y_statistics[1])
    if metric == "l2":
        score = -torch.stack([(row - b).square().sum(1) for row in a])
        magnitude = score.abs()
    else:
        score, magnitude = a @ b.T, a.abs() @ b.abs().T
    highest = score + (d + 4) * U * magnitude + (d + 4) * LEAST_NORMAL
    if metric == "cosine":  # which adds no t: the smallest numbers of rows of norm 1 are none
        least, highest = least + (d + 9) * LEAST_NORMAL, highest - (d + 4) * LEAST_NORMAL
    assert bool((least >= highest).all()), f"{(highest - least).max()} too low"
    # As the docstring of the kernels promises.
    length_x, length_y = torch.linalg.vector_norm(a, dim=1)[:, None], torch.linalg.vector_norm(b, dim=1)
    p_x, p_y = x_statistics[2].double()[:, None], y_statistics[2].double()
    error = (r + 1.01 * (p_x + p_y)) * length_x * length_y
    if metric == "l2":
        error = 2 * error + r * (length_x.square() + length_y.square())
    assert bool((product - score <= 2.1 * (error + t) + 2.0**-124 * (length_x + length_y)).all())


@pytest.mark.parametrize("metric", PRODUCTS)
@given(data=st.data())
@settings(max_examples=20)
def test_prepare_rows_kernel_bounds_the_scores(metric, data):
    """Rows of very different norms, in two dtypes, down to those that are zero as bfloat16."""
    limit = 1e30 if metric == "cosine" else 1e18
    n = data.draw(st.integers(1, 30))
    x = data.draw(row_tables(n, limit=limit))
    y = data.draw(row_tables(n, x.shape[1], limit=limit)) if data.draw(st.booleans()) else x
    assert_bounds(x, y, metric)


@pytest.mark.parametrize("metric", PRODUCTS)
def test_prepare_rows_kernel_bounds_the_worst_roundoff(metric):
    """Rows whose elements all lie midway between two bfloat16 numbers, with all errors in one direction."""
    worst = torch.full((2, 64), 1.0 + 2.0**-8, device=DEVICE)  # a tie: rounds to 1
    worst[1] = 1.0 + 2.0**-8 + 2.0**-20
    tiny = torch.full((3, 64), 0.9 * 2.0**-126, device=DEVICE)  # rounds to 0
    tiny[1], tiny[2] = 1.4 * 2.0**-126, 2.0**-149
    for x in (worst, -worst, tiny):
        for y in (worst, 1e15 * worst, tiny):
            assert_bounds(x, y, metric)


@pytest.mark.parametrize("metric", PRODUCTS)
@given(data=st.data())
@settings(max_examples=10)
def test_kernels_bound_the_scores_of_kernels(metric, data):
    """The product that the tiles accumulate, against the score that a search returns."""
    x = data.draw(row_tables())
    y = data.draw(row_tables(d=x.shape[1]))
    q, c = len(x), len(y)
    excluded = torch.full((q,), -1, dtype=torch.int32, device=DEVICE)
    pairs, everything = kernels.no_pairs(q, c, DEVICE), torch.full((q,), -torch.inf, device=DEVICE)
    kernels.append_pairs(prepare(x, metric, True), prepare(y, metric, False), metric, everything, excluded, pairs)
    row = torch.arange(q, device=DEVICE)[:, None].expand(q, c).flatten()
    scales = [row_kernels.row_statistics(z, metric)[1] if metric == "cosine" else None for z in (x, y)]
    scores = kernels.pair_scores(x, scales[0], row, y, scales[1], pairs.columns.flatten().long(), metric)
    assert bool((pairs.scores.flatten() >= scores).all()) and pairs.counts.tolist() == [c] * q


# Movements --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@given(data=st.data(), generator=generators, step=st.sampled_from([0.0, 1e-6, 1e-2, 1.0]), int64=st.booleans())
def test_row_movements_kernel_against_oracle(metric, data, generator, step, int64):
    old = data.draw(row_tables(limit=1e30 if metric == "cosine" else 1e18))
    n, d = old.shape
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    new = old.double() * (1.0 + step * torch.randn(n, d, generator=generator).to(DEVICE))
    new = lay_out(new.to(dtype), data.draw(layouts))
    scales = [row_kernels.row_statistics(x, metric)[1] if metric == "cosine" else None for x in (old, new)]
    if int64:
        with forced_int64():
            moved = row_kernels.row_movements(old, scales[0], new, scales[1], metric)
    else:
        moved = row_kernels.row_movements(old, scales[0], new, scales[1], metric)
    difference = scored(new, metric, scales[1]) - scored(old, metric, scales[0])
    exact = torch.linalg.vector_norm(difference, 1 if metric == "l1" else 2, dim=1)
    assert_within(moved, exact, (d + 8) * U * exact + d * 2.0**-62)


# Edges ------------------------------------------------------------------------------------------------------------


def test_kernels_of_no_rows():
    none = torch.zeros(0, 8, device=DEVICE)
    assert [x.shape for x in row_kernels.row_statistics(none, "cosine")] == [(0,)] * 4
    assert prepare(none, "dot", True).shape == (0, kernels.STEP)
    assert row_kernels.row_movements(none, None, none, None, "l2").shape == (0,)
    some = torch.ones(3, 8, device=DEVICE)
    for rows in (slice(2, 2), slice(3, None), torch.zeros(0, dtype=torch.int64, device=DEVICE)):
        assert prepare(some, "cosine", False, rows).shape == (0, kernels.STEP)


def test_kernels_offsets_of_64_bits_where_rows_need_them():
    def launched(run):
        with recording() as launches:
            run()
        return [launch.arguments["INT64"] for launch in launches]

    for rows, wide in ((2**18, False), (2**21, True)):
        table = torch.empty(rows, 2048, dtype=torch.bfloat16, device="meta")
        few, statistic = torch.empty(16, 2048, device="meta"), torch.empty(rows, device="meta")
        arguments = (statistic, statistic, statistic, "dot")
        ids = torch.empty(16, dtype=torch.int64, device="meta")
        assert launched(lambda t=table: row_kernels.row_statistics(t, "dot")) == [wide]
        assert launched(lambda t=table: row_kernels.row_movements(t, None, t, None, "dot")) == [wide]
        for chosen in (ids, None, slice(0, 4)):
            run = lambda t=table, c=chosen, a=arguments: row_kernels.prepare_rows(  # noqa: E731
                t, c, *a, queries=True, rounding=0.0, underflow=0.0
            )
            assert launched(run) == [wide]
        assert launched(lambda t=few: row_kernels.row_statistics(t, "dot")) == [False]
    # The prepared rows may need them where the rows do not.
    narrow, statistic = torch.empty(2**25 + 1, 1, device="meta"), torch.empty(2**25 + 1, device="meta")
    run = lambda: row_kernels.prepare_rows(  # noqa: E731
        narrow, None, statistic, statistic, statistic, "dot", queries=True, rounding=0.0, underflow=0.0
    )
    assert launched(run) == [True]
