"""The kernels that append pairs to a buffer, against plain comparison of all scores."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_nearest_neighbors_kernels import all_scores, as_wide, prepared, rows_per_tile
from torch import Tensor

from ngrpo_ops.kernels import nearest_neighbors as kernels
from ngrpo_ops.kernels.primitives import forced_int64, recording
from ngrpo_ops.testing import DEVICE, generators, integers

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


def assert_appended(pairs: kernels.Pairs, expected: list[Pair], before: int = 0) -> None:
    """Just the pairs that are expected, each once, or as many as there is room for."""
    capacity = pairs.rows.shape[0]
    assert pairs.total.tolist() == [before + len(expected)] and pairs.total.dtype == torch.int64
    kept = slice(before, min(capacity, before + len(expected)))
    columns = (pairs.rows[kept].tolist(), pairs.columns[kept].tolist(), pairs.scores[kept].tolist())
    got = Counter(zip(*columns, strict=True))
    missing = Counter(expected) - got
    assert got.total() + missing.total() == len(expected) and not got - Counter(expected)
    lost = {i for i, _, _ in missing}
    assert {i for i, mark in enumerate(pairs.lost.tolist()) if mark} == lost
    assert (not lost) == (before + len(expected) <= capacity)


def buffer(capacity: int) -> tuple[kernels.Pairs, list[Tensor]]:
    """A buffer that lies within larger tensors, which must keep what lies behind it."""
    pairs = kernels.no_pairs(capacity, _IDS, DEVICE)
    whole = [torch.full((capacity + 300,), 77, dtype=t.dtype, device=DEVICE) for t in pairs[:3]]
    return pairs._replace(rows=whole[0][:capacity], columns=whole[1][:capacity], scores=whole[2][:capacity]), whole


def capacities(data: st.DataObject, expected: int) -> int:
    return data.draw(st.sampled_from([expected, expected + 5, max(0, expected - 1), expected // 2, 0]))


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
    pairs, whole = buffer(capacities(data, len(expected)))
    run(kernels.append_pairs, int64, x, y, metric, limits, excluded, pairs, x_ids=x_given, y_ids=y_given)
    assert_appended(pairs, expected)
    assert all(bool((t[pairs.rows.shape[0] :] == 77).all()) for t in whole)


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
    pairs, whole = buffer(capacities(data, len(expected)))
    run(
        kernels.append_pairs_symmetric, int64, x, y, metric, x_limits, y_limits, *allowed, pairs,
        x_ids=x_given, y_ids=y_given, diagonal=diagonal,
    )  # fmt: skip
    assert_appended(pairs, expected)
    assert all(bool((t[pairs.rows.shape[0] :] == 77).all()) for t in whole)


@pytest.mark.usefixtures("tile_sizes")
def test_kernels_append_a_triangle_of_blocks_to_one_buffer():
    """Every ordered pair of different rows once, whatever the blocks; nothing where the thresholds are +inf."""
    generator = torch.Generator().manual_seed(5)
    table = torch.randint(-2, 3, (150, kernels.STEP), generator=generator).bfloat16().to(DEVICE)
    scores = all_scores(table, table, "dot")
    everything = torch.full((150,), -torch.inf, device=DEVICE)
    for limits in (everything, -everything, scores.float().sort(dim=1).values[:, -4].contiguous()):
        pairs = kernels.no_pairs(150 * 149, 150, DEVICE)
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
    pairs, no_limits = kernels.no_pairs(4, 8, DEVICE), torch.zeros(0, device=DEVICE)
    limits, excluded = torch.zeros(3, device=DEVICE), torch.full((3,), -1, dtype=torch.int32, device=DEVICE)
    kernels.append_pairs(none, some, "dot", no_limits, excluded[:0], pairs)
    kernels.append_pairs(some, none, "dot", limits, excluded, pairs)
    kernels.append_pairs_symmetric(some, none, "dot", limits, no_limits, None, None, pairs, diagonal=False)
    kernels.append_pairs_symmetric(none, none, "dot", no_limits, no_limits, None, None, pairs, diagonal=True)
    assert pairs.total.tolist() == [0] and not bool(pairs.lost.any())


def test_append_kernels_offsets_of_64_bits_where_rows_need_them():
    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    for rows, wide in ((2**18, False), (2**21, True)):
        few, table, pairs = meta(16, 2048), meta(rows, 2048), kernels.no_pairs(8, rows, torch.device("meta"))
        x_limits, y_limits = meta(16, dtype=torch.float32), meta(rows, dtype=torch.float32)
        with recording() as launches:
            kernels.append_pairs(few, table, "dot", x_limits, meta(16, dtype=torch.int32), pairs)
            kernels.append_pairs_symmetric(few, table, "dot", x_limits, y_limits, None, None, pairs, diagonal=False)
        assert [launch.arguments["INT64"] for launch in launches] == [wide, wide]
