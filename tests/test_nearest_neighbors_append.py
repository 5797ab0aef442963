"""The kernels that append pairs to the places of their queries, and keep the best of them, against plain torch."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_nearest_neighbors_kernels import all_scores, as_wide, prepared, rows_per_tile
from torch import Tensor

from ngrpo_ops.kernels import nearest_neighbors as kernels
from ngrpo_ops.kernels.primitives import forced_int64, recording
from ngrpo_ops.testing import DEVICE, METRICS, generators, integers

_sizes = st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 100, 129]))
_IDS = 4096

Pair = tuple[int, int, float]


@pytest.fixture(params=[False, True], ids=["wide tiles", "small tiles"])
def tile_sizes(request, monkeypatch):
    if request.param:
        for kernel in (kernels.append_pairs_kernel, kernels.append_pairs_symmetric_kernel):
            rows_per_tile(kernel, monkeypatch, BLOCK_N=64, BLOCK_M=32)


@st.composite
def thresholds(draw: st.DrawFn, scores: Tensor) -> Tensor:
    """Of each row of scores [q, c]: one of its own scores, or just above it, or what takes all or none."""
    generator = draw(generators)
    q, c = scores.shape
    top = scores.float().sort(dim=1, descending=True).values
    rare = st.integers(0, 3).map(lambda i: i == 0)  # many pairs take many rounds, which the interpreter is slow at
    rank = integers(generator, c if draw(rare) else min(c, 3), q)
    chosen = top[torch.arange(q, device=scores.device), rank]
    kind = torch.randint(6, (q,), generator=generator).to(scores.device)
    chosen = torch.where(kind == 0, chosen.nextafter(torch.full_like(chosen, torch.inf)), chosen)
    if draw(rare):
        chosen = torch.where(kind == 1, torch.inf, torch.where(kind == 2, -torch.inf, chosen))
    return chosen


@st.composite
def ids_of(draw: st.DrawFn, n: int) -> tuple[Tensor | int, list[int]]:
    """How a call is given the ids of n rows, and the ids."""
    kind = draw(st.sampled_from(["first", "int64", "int32", "strided"]))
    if kind == "first":
        first = draw(st.sampled_from([0, 1, 17, 1000]))
        return first, list(range(first, first + n))
    ids = torch.randperm(_IDS, generator=draw(generators))[: 2 * n].sort().values.to(DEVICE)
    ids = ids[::2] if kind == "strided" else ids[:n]
    return ids.to(torch.int32 if kind == "int32" else torch.int64), ids.tolist()


def wanted(takes: Tensor, scores: Tensor, queries: list[int], candidates: list[int]) -> list[Pair]:
    row, column = takes.nonzero(as_tuple=True)
    found = zip(row.tolist(), column.tolist(), scores[row, column].tolist(), strict=True)
    return [(queries[i], candidates[j], score) for i, j, score in found]


def assert_appended(pairs: kernels.Pairs, expected: list[Pair]) -> None:
    """Just the pairs that are expected, each once, or as many of a query as it has places."""
    n, capacity = pairs.columns.shape
    of_query: dict[int, Counter[Pair]] = {i: Counter() for i in range(n)}
    for pair in expected:
        of_query[pair[0]][pair] += 1
    assert pairs.counts.tolist() == [of_query[i].total() for i in range(n)]
    for i in range(n):
        held = min(capacity, of_query[i].total())
        columns, scores = pairs.columns[i, :held].tolist(), pairs.scores[i, :held].tolist()
        assert not Counter((i, column, score) for column, score in zip(columns, scores, strict=True)) - of_query[i]


class Places(NamedTuple):
    """Places that lie within larger tensors, which must keep what lies behind them."""

    pairs: kernels.Pairs
    whole: list[Tensor]

    @staticmethod
    def of(capacity: int) -> Places:
        pairs = kernels.no_pairs(_IDS, capacity, DEVICE)
        whole = [torch.full((_IDS * capacity + 300,), 77, dtype=t.dtype, device=DEVICE) for t in pairs[:2]]
        columns, scores = (t[: _IDS * capacity].view(_IDS, capacity) for t in whole)
        return Places(pairs._replace(columns=columns, scores=scores), whole)

    def check(self, expected: list[Pair]) -> None:
        assert_appended(self.pairs, expected)
        assert all(bool((t[self.pairs.columns.numel() :] == 77).all()) for t in self.whole)


def capacities(data: st.DataObject, expected: list[Pair]) -> int:
    most = max(Counter(pair[0] for pair in expected).values(), default=0)
    return data.draw(st.sampled_from([most, most + 5, max(0, most - 1), most // 2, 0]))


def run(call: Any, int64: bool, *arguments: Any, **options: Any) -> None:
    if int64:
        with forced_int64():
            call(*arguments, **options)
    else:
        call(*arguments, **options)


@pytest.mark.usefixtures("tile_sizes")
@pytest.mark.parametrize("metric", ["dot", "l1"])
@settings(max_examples=12)
@given(data=st.data(), q=_sizes, c=_sizes, int64=st.booleans())
def test_append_pairs_kernel_against_oracle(metric, data, q, c, int64):
    y = data.draw(prepared(c, metric))
    x = as_wide(data.draw(prepared(q, metric)), y)
    scores = all_scores(x, y, metric)
    limits = data.draw(thresholds(scores))
    excluded = integers(data.draw(generators), c + 1, q).int() - 1
    takes = scores >= limits.double()[:, None]
    takes[excluded >= 0, excluded[excluded >= 0].long()] = False
    (x_given, x_ids), (y_given, y_ids) = data.draw(ids_of(q)), data.draw(ids_of(c))
    expected = wanted(takes, scores, x_ids, y_ids)
    places = Places.of(capacities(data, expected))
    run(kernels.append_pairs, int64, x, y, metric, limits, excluded, places.pairs, x_ids=x_given, y_ids=y_given)
    places.check(expected)


@pytest.mark.usefixtures("tile_sizes")
@pytest.mark.parametrize("metric", ["dot", "l1"])
@settings(max_examples=12)
@given(data=st.data(), q=_sizes, c=_sizes, diagonal=st.booleans(), int64=st.booleans())
def test_append_pairs_symmetric_kernel_against_oracle(metric, data, q, c, diagonal, int64):
    """On the diagonal each pair once from either side, off it all pairs; only allowed rows as candidates."""
    x = data.draw(prepared(q, metric))
    y = x if diagonal else data.draw(prepared(c, metric))
    x = as_wide(x, y)
    scores = all_scores(x, y, metric)
    x_limits = data.draw(thresholds(scores))
    y_limits = x_limits if diagonal else data.draw(thresholds(scores.T))
    allowed: list[Tensor | None] = [None, None]
    if data.draw(st.booleans()):
        for side, n in enumerate((q, len(y))):
            share = data.draw(st.sampled_from([0.0, 0.5, 0.9]))
            allowed[side] = (torch.rand(n, generator=data.draw(generators)) < share).to(DEVICE)
        allowed[1] = allowed[0] if diagonal else allowed[1]
    (x_given, x_ids), (y_given, y_ids) = data.draw(ids_of(q)), data.draw(ids_of(len(y)))
    y_given, y_ids = (x_given, x_ids) if diagonal else (y_given, y_ids)
    x_takes, y_takes = scores >= x_limits.double()[:, None], scores >= y_limits.double()
    if allowed[0] is not None and allowed[1] is not None:
        x_takes, y_takes = x_takes & allowed[1], y_takes & allowed[0][:, None]
    if diagonal:  # above it, and the other side's below it
        x_takes, y_takes = x_takes.triu(1), y_takes.triu(1)
    expected = wanted(x_takes, scores, x_ids, y_ids) + wanted(y_takes.T, scores.T, y_ids, x_ids)
    places = Places.of(capacities(data, expected))
    run(
        kernels.append_pairs_symmetric, int64, x, y, metric, x_limits, y_limits, *allowed, places.pairs,
        x_ids=x_given, y_ids=y_given, diagonal=diagonal,
    )  # fmt: skip
    places.check(expected)


@pytest.mark.usefixtures("tile_sizes")
def test_kernels_append_a_triangle_of_blocks():
    """Every ordered pair of different rows once, whatever the blocks; nothing where the thresholds are +inf."""
    generator = torch.Generator().manual_seed(5)
    table = torch.randint(-2, 3, (150, kernels.STEP), generator=generator).bfloat16().to(DEVICE)
    scores = all_scores(table, table, "dot")
    everything = torch.full((150,), -torch.inf, device=DEVICE)
    for limits in (everything, -everything, scores.float().sort(dim=1).values[:, -4].contiguous()):
        pairs = kernels.no_pairs(150, 149, DEVICE)
        blocks = [slice(start, min(start + 70, 150)) for start in range(0, 150, 70)]
        for i, rows in enumerate(blocks):
            for others in blocks[i:]:
                kernels.append_pairs_symmetric(
                    table[rows], table[others], "dot", limits[rows], limits[others], None, None, pairs,
                    x_ids=rows.start, y_ids=others.start, diagonal=rows == others,
                )  # fmt: skip
        takes = scores >= limits.double()[:, None]
        takes.fill_diagonal_(False)
        assert_appended(pairs, wanted(takes, scores, list(range(150)), list(range(150))))


def test_kernels_append_nothing_of_no_rows():
    none, some = (torch.zeros(n, kernels.STEP, dtype=torch.bfloat16, device=DEVICE) for n in (0, 3))
    pairs, no_limits = kernels.no_pairs(8, 4, DEVICE), torch.zeros(0, device=DEVICE)
    limits, excluded = torch.zeros(3, device=DEVICE), torch.full((3,), -1, dtype=torch.int32, device=DEVICE)
    kernels.append_pairs(none, some, "dot", no_limits, excluded[:0], pairs)
    kernels.append_pairs(some, none, "dot", limits, excluded, pairs)
    kernels.append_pairs_symmetric(some, none, "dot", limits, no_limits, None, None, pairs, diagonal=False)
    kernels.append_pairs_symmetric(none, none, "dot", no_limits, no_limits, None, None, pairs, diagonal=True)
    assert not bool(pairs.counts.any())


def test_append_kernels_offsets_of_64_bits_where_rows_need_them():
    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    for rows, wide in ((2**18, False), (2**21, True)):
        few, table, pairs = meta(16, 2048), meta(rows, 2048), kernels.no_pairs(rows, 8, torch.device("meta"))
        x_limits, y_limits = meta(16, dtype=torch.float32), meta(rows, dtype=torch.float32)
        with recording() as launches:
            kernels.append_pairs(few, table, "dot", x_limits, meta(16, dtype=torch.int32), pairs)
            kernels.append_pairs_symmetric(few, table, "dot", x_limits, y_limits, None, None, pairs, diagonal=False)
        assert [launch.arguments["INT64"] for launch in launches] == [wide, wide]
    for places, wide in ((2**8, False), (2**11, True)):  # of two million queries
        pairs, (x, y) = kernels.no_pairs(2**21, places, torch.device("meta")), (meta(2**21), meta(9))
        with recording() as launches:
            kernels.append_pairs(meta(16, 64), meta(16, 64), "dot", x, meta(16, dtype=torch.int32), pairs)
            kernels.keep_best(pairs, "dot", x, x, x, x, x, y, y, k=1, kept=2, rounding=0.0, underflow=0.0)
        assert [launch.arguments["INT64"] for launch in launches] == [wide, wide]


@st.composite
def places_of_pairs(draw: st.DrawFn, n: int, c: int) -> kernels.Pairs:
    """Pairs of n queries with columns below c: few scores, so that many are equal; some queries have no room left."""
    generator, capacity = draw(generators), min(c, draw(st.sampled_from([1, 2, 5, 40])))
    pairs = kernels.no_pairs(n, capacity, DEVICE)
    pairs.counts.copy_(torch.randint(draw(st.sampled_from([1, capacity + 1, capacity + 3])), (n,), generator=generator))
    pairs.columns.copy_(torch.stack([torch.randperm(c, generator=generator)[:capacity] for _ in range(n)]))
    kinds = draw(st.sampled_from([2, 5, 1000]))
    scores = torch.randint(-kinds, kinds, (n, capacity), generator=generator).float() / draw(st.sampled_from([1, 7]))
    pairs.scores.copy_(torch.where(scores == 0, torch.tensor([0.0, -0.0])[pairs.columns.cpu() % 2], scores))
    return pairs


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=25)
@given(data=st.data(), n=st.integers(1, 70), c=st.integers(1, 40), extra=st.integers(0, 3), int64=st.booleans())
def test_keep_best_kernel_against_oracle(metric, data, n, c, extra, int64):
    pairs = data.draw(places_of_pairs(n, c))
    generator, capacity = data.draw(generators), pairs.columns.shape[1]
    kept = data.draw(st.integers(1, capacity))
    k = max(1, kept - extra)
    rounding, underflow = data.draw(st.sampled_from([0.0, 1e-5, 2e-2])), data.draw(st.sampled_from([0.0, 1e-3]))
    x_norms, y_norms = (torch.rand(m, generator=generator).to(DEVICE) for m in (n, c))
    if metric == "cosine":
        x_norms, y_norms = (x_norms > 0.1).float(), (y_norms > 0.1).float()
    x_roundoffs, y_roundoffs = (torch.rand(m, generator=generator).to(DEVICE) * 4e-3 for m in (n, c))
    # From before: nothing known, a known score, or a query that takes nothing.
    kind = torch.randint(4, (n,), generator=generator).to(DEVICE)
    before = torch.where(kind == 0, torch.inf, torch.where(kind == 1, 0.2, -torch.inf))
    thresholds, kth = before.clone(), torch.where(kind == 0, -torch.inf, before)
    is_far = torch.zeros(n, dtype=torch.bool, device=DEVICE)
    expected = [
        kept_of_query(
            metric, pairs, i, float(before[i]), float(kth[i]), k, kept, rounding, underflow,
            (x_norms, x_roundoffs), (y_norms, y_roundoffs),
        )
        for i in range(n)
    ]  # fmt: skip
    untouched = pairs.columns.clone(), pairs.scores.clone()
    run(
        kernels.keep_best, int64, pairs, metric, thresholds, kth, is_far, x_norms, x_roundoffs, y_norms, y_roundoffs,
        k=k, kept=kept, rounding=rounding, underflow=underflow,
    )  # fmt: skip
    for i, (lost, best, threshold, reached, far) in enumerate(expected):
        assert kth[i].item() == pytest.approx(reached, rel=1e-6, abs=1e-6)
        if lost:
            assert thresholds[i] == torch.inf and pairs.counts[i] > capacity
            assert all(torch.equal(now[i], then[i]) for now, then in zip(pairs[:2], untouched, strict=True))
            continue
        assert thresholds[i].item() == pytest.approx(threshold, rel=1e-6, abs=1e-6)
        assert is_far[i].item() is far
        held = int(pairs.counts[i])
        found = list(zip(pairs.columns[i, :held].tolist(), pairs.scores[i, :held].tolist(), strict=True))
        assert found == best[:held]  # in their order, and no fewer than reach the threshold
        upper = torch.tensor([score for _, score in best], dtype=torch.float32)
        upper = upper * (1.0 - torch.tensor(rounding, dtype=torch.float32)) if metric == "l1" else upper
        assert held == int((upper >= thresholds[i].cpu()).sum())


def kept_of_query(
    metric: str, pairs: kernels.Pairs, i: int, threshold: float, kth: float, k: int, kept: int, rounding: float,
    underflow: float, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor],
) -> tuple[bool, list[tuple[int, float]], float, float, bool]:  # fmt: skip
    """Whether query i is lost; its pairs, best first; its threshold, the k-th lower bound, and whether it is far."""
    capacity = pairs.columns.shape[1]
    count = int(pairs.counts[i])
    held = min(count, capacity)
    found = zip(pairs.columns[i, :held].tolist(), pairs.scores[i, :held].tolist(), strict=True)
    best = sorted(found, key=lambda pair: (-pair[1], pair[0]))
    upper, lower = [], []
    for column, score in best:
        x_norm, x_roundoff, y_norm, y_roundoff = (
            float(x[0][i]),
            float(x[1][i]),
            float(y[0][column]),
            float(y[1][column]),
        )
        if metric == "l1":
            upper.append(score * (1 - rounding))
            lower.append(upper[-1] - 2.2 * rounding * abs(upper[-1]))
            continue
        error = (rounding + 1.01 * (x_roundoff + y_roundoff)) * x_norm * y_norm
        if metric == "l2":
            error = 2 * error + rounding * (x_norm**2 + y_norm**2)
        upper.append(score)
        lower.append(score - 2.1 * (error + underflow) - 2.0**-124 * (x_norm + y_norm))
    reached = max(kth, min(lower[:k])) if held >= k else kth
    last, far = min(lower[:kept]) if held >= kept else -math.inf, False
    if kept > k:
        last_upper = upper[kept - 1] if held >= kept else -math.inf
        far = reached > last_upper
        last = last_upper if far else last
    return count > capacity, best, max(threshold, last), reached, far
