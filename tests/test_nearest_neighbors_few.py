"""The search for a few queries by kernels, which reads the table once: its kernel against float64, and the whole of it
against the ordinary search, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ngrpo_ops import nearest_neighbors
from ngrpo_ops.kernels import nearest_neighbors_few as few_kernels
from ngrpo_ops.kernels import nearest_neighbors_rows as row_kernels
from ngrpo_ops.kernels.primitives import forced_int64, recording
from ngrpo_ops.ops.nearest_neighbors import few, fused
from ngrpo_ops.ops.nearest_neighbors.bounds import rounding_error, underflow_error
from ngrpo_ops.testing import DEVICE, generators, lay_out, layouts

METRICS = ("cosine", "dot", "l2")


@st.composite
def tables(draw: st.DrawFn, most: int = 90) -> Tensor:
    """Rows of several scales, some of them equal, nearly equal or 0, in every dtype and layout."""
    generator = draw(generators)
    n, d = draw(st.integers(3, most)), draw(st.sampled_from([1, 2, 7, 63, 64, 65, 130]))
    x = torch.randn(n, d, generator=generator, dtype=torch.float32)
    if draw(st.booleans()):
        x *= 10 ** (8 * torch.rand(n, 1, generator=generator) - 4)
    for _ in range(draw(st.integers(0, 3))):
        one, other = torch.randint(n, (2,), generator=generator)
        x[one] = x[other] * draw(st.sampled_from([1.0, 0.0, 1 + 1e-7, -1.0]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return lay_out(x.to(DEVICE, dtype), draw(layouts))


def upper_bounds(table: Tensor, queries: Tensor, metric: str) -> tuple[Tensor, ...]:
    """What the kernel returns, and norms and roundoffs of the queries."""
    d = table.shape[1]
    r, t = rounding_error(d, truncating=True), underflow_error(d)
    x = table[queries]
    norms, inverse, roundoffs, _ = row_kernels.row_statistics(x, metric)
    prepared = row_kernels.prepare_rows(
        x, None, norms, inverse, roundoffs, metric, queries=True, rounding=r, underflow=t
    )
    norms = (inverse > 0).float() if metric == "cosine" else norms
    return *few_kernels.score_few(prepared, norms, roundoffs, table, metric, rounding=r, underflow=t), norms, roundoffs


@pytest.mark.parametrize("metric", METRICS)
@given(table=tables(), count=st.integers(1, 64), int64=st.booleans())
def test_no_bound_is_below_its_score(metric, table, count, int64):
    d = table.shape[1]
    queries = torch.arange(count, device=DEVICE) % len(table)
    if int64:
        with forced_int64():
            upper, norms, roundoffs, states, x_norms, x_roundoffs = upper_bounds(table, queries, metric)
    else:
        upper, norms, roundoffs, states, x_norms, x_roundoffs = upper_bounds(table, queries, metric)
    x = table.double()
    true_norms = torch.linalg.vector_norm(x, dim=1)
    assert torch.allclose(norms.double(), true_norms, rtol=(d + 8) * 2.0**-24, atol=0)
    true_roundoffs = torch.linalg.vector_norm(x.float().bfloat16().double() - x, dim=1) / true_norms.clamp(min=1e-300)
    assert torch.allclose(roundoffs.double(), true_roundoffs, rtol=(d + 8) * 2.0**-23, atol=1e-12)
    assert not states.any()
    if metric == "cosine":
        x = torch.where(true_norms[:, None] > 0, x / true_norms.clamp(min=1e-300)[:, None], 0.0)
        true_norms = (true_norms > 0).double()
    true = -torch.cdist(x[queries], x).square() if metric == "l2" else x[queries] @ x.T
    # A score is that of float32 rows, whose rounding the bound covers too.
    r, t = rounding_error(d), underflow_error(d)
    lengths = x_norms.double()[:, None] * true_norms
    rounding = r / 3 * (lengths if metric != "l2" else (x_norms.double()[:, None] + true_norms).square())
    assert bool((upper.double() >= true + rounding).all() | (rounding == 0).all())
    error = (2 * r + 1.01 * (x_roundoffs.double()[:, None] + roundoffs.double())) * lengths
    if metric == "l2":
        error = 2 * error + 2 * r * (x_norms.double()[:, None].square() + true_norms.square())
    assert bool((upper.double() - true <= 2.1 * (error + t) + rounding).all())


@pytest.mark.parametrize("place", [0, 40, -1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30, 1e-30, 0.0])
def test_states_of_rows(value, place):
    table = torch.randn(90, 70, generator=torch.Generator().manual_seed(0))
    table[place] = value if value != 1e-30 else table[place] * value
    states = upper_bounds(table.to(DEVICE), torch.tensor([5, 17], device=DEVICE), "cosine")[3]
    expected = torch.zeros_like(states)
    extreme = few_kernels.EXTREME.value if value in (1e30, 1e-30) else few_kernels.ORDINARY.value
    expected[place] = few_kernels.NOT_FINITE.value if not abs(value) < float("inf") else extreme
    assert torch.equal(states, expected)


def searched_both_ways(table: Tensor, k: int, places: int = few._PLACES, **arguments: object) -> bool:
    """Whether the search for few queries was settled. Both searches return the same, to the bit."""
    settled: list[bool] = []
    search_few = few.search_few

    def noted(*few_arguments):
        found = search_few(*few_arguments)
        settled.append(found is not None)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few, "_PLACES", places)
        patch.setattr(few, "search_few", noted)
        patch.setattr(fused, "KERNELS_FROM", 0)  # a table of any size
        found = nearest_neighbors(table, k, backend="triton", **arguments)
        patch.setattr(fused, "KERNELS_FROM", 2**60)
        ordinary = nearest_neighbors(table, k, backend="triton", **arguments)
    assert torch.equal(found.ids, ordinary.ids) and torch.equal(found.scores, ordinary.scores)
    (result,) = settled
    return result


@pytest.mark.parametrize("places", [0, few._PLACES])
@given(table=tables(), metric=st.sampled_from(METRICS), data=st.data())
def test_a_search_for_few_queries_is_the_ordinary_one(places, table, metric, data):
    n = len(table)
    k = data.draw(st.integers(1, min(5, n - 2)))
    ids = st.integers(0, n - 1)
    queries = torch.tensor(data.draw(st.lists(ids, min_size=1, max_size=9)), device=DEVICE)
    allowed = None
    if data.draw(st.booleans()):
        allowed = torch.zeros(n, dtype=torch.bool, device=DEVICE)
        allowed[list(data.draw(st.sets(ids, min_size=k + 1)))] = True
    searched_both_ways(table, k, places, metric=metric, queries=queries, allowed=allowed)


@pytest.mark.parametrize("metric", METRICS)
def test_random_rows_are_settled_and_many_equal_ones_are_not(metric):
    table = torch.randn(3000, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    queries = torch.arange(0, 3000, 100, device=DEVICE)
    progress: list[tuple[int, int]] = []
    assert searched_both_ways(table, 3, metric=metric, queries=queries, progress=lambda *done: progress.append(done))
    assert progress[0] == (30, 30)
    table[:500] = table[0]
    assert not searched_both_ways(table, 3, metric=metric, queries=queries)


@pytest.mark.parametrize("place", [0, 40, -1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_named(value, place):
    table = torch.randn(90, 70, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    table[place, 3] = value
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "KERNELS_FROM", 0)
        with pytest.raises(ValueError, match=f"NaN or inf in 1 rows: {place % 90}$"):
            nearest_neighbors(table, 2, queries=torch.tensor([1, 2], device=DEVICE), backend="triton")


@pytest.mark.filterwarnings("ignore:overflow encountered")  # in the sums of such a row
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("scale", [1e-25, 1e-14, 1e19])
def test_extreme_rows_take_the_ordinary_search(scale, metric):
    table = torch.randn(90, 70, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    table[7] *= scale
    queries = torch.tensor([1, 7, 2], device=DEVICE)
    if metric != "cosine" and scale == 1e19:
        with pytest.raises(ValueError, match="rows of norm at most 1e\\+18"):
            searched_both_ways(table, 2, metric=metric, queries=queries)
    else:
        assert not searched_both_ways(table, 2, metric=metric, queries=queries)


def test_what_is_for_this_search():
    table, queries = torch.randn(2**11, 8), torch.arange(64)
    assert few.serves(table, 3, "cosine", queries, "triton")
    assert not few.serves(table, 3, "cosine", queries, "eager")
    assert not few.serves(table, 3, "l1", queries, "triton")
    assert not few.serves(table[:-1], 3, "cosine", queries, "triton")
    assert not few.serves(table, 3, "cosine", torch.arange(65), "triton")
    assert not few.serves(table, 129, "cosine", queries, "triton")
    wide = torch.empty(2**22, 4096, device="meta")  # whose bounds, or whose chosen rows, would take too much
    assert few.serves(wide[: 2**18], 3, "cosine", queries[:32], "triton")
    assert not few.serves(wide, 3, "cosine", queries[:32], "triton")
    assert not few.serves(wide[: 2**18], 128, "cosine", queries[:32], "triton")


def test_large_tables_are_addressed_by_64_bits():
    values = torch.empty(16, device="meta", dtype=torch.float32)
    x = torch.empty(16, 576, device="meta", dtype=torch.bfloat16)
    for n, d, expected in ((2**21, 512, False), (2**23, 512, True), (2**26, 8, False), (2**28, 1, True)):
        table = torch.empty(n, d, device="meta", dtype=torch.bfloat16)
        with recording() as launches:
            few_kernels.score_few(x, values, values, table, "cosine", rounding=1e-4, underflow=1e-36)
        assert [launch.arguments["INT64"] for launch in launches] == [expected]
