"""Scores of pairs by the kernel against float64, and which searches the kernels are for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ngrpo_ops.kernels import nearest_neighbors as kernels
from ngrpo_ops.kernels.primitives import forced_int64, recording
from ngrpo_ops.ops import _precision
from ngrpo_ops.ops.nearest_neighbors import fused
from ngrpo_ops.ops.nearest_neighbors.fused import FusedScan
from ngrpo_ops.ops.nearest_neighbors.scores import ScoredRows
from ngrpo_ops.testing import (
    DEVICE,
    METRICS,
    assert_within,
    generators,
    integers,
    lay_out,
    layouts,
    tables,
    unit_roundoff,
)

U = unit_roundoff(torch.float32)
_sizes = st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 127, 128, 129, 300]))


@st.composite
def prepared(draw: st.DrawFn, rows: int, metric: str) -> Tensor:
    """Rows of small integers, so that every order of summation gives the same: ties are real ones."""
    generator = draw(generators)
    bound = draw(st.sampled_from([1, 3]))
    width = draw(st.integers(1, 20)) if metric == "l1" else kernels.STEP * draw(st.integers(1, 3))
    x = torch.randint(-bound, bound + 1, (rows, width), generator=generator)
    x[:, draw(st.sampled_from([2, 8, width])) :] = 0
    if draw(st.booleans()):
        x[torch.rand(rows, generator=generator) < 0.5] = x[0].clone()
    return x.to(torch.float32 if metric == "l1" else torch.bfloat16).to(DEVICE)


def all_scores(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """float64 [q, c]"""
    return -torch.cdist(x.double(), y.double(), p=1) if metric == "l1" else x.double() @ y.double().T


def as_wide(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, max(0, y.shape[1] - x.shape[1])))[:, : y.shape[1]]


def rows_per_tile(kernel: object, monkeypatch: pytest.MonkeyPatch, **blocks: int) -> None:
    """Small tiles under the interpreter, so that small inputs have several in both directions."""
    name = kernel.__name__  # type: ignore[attr-defined]
    monkeypatch.setitem(kernels.configs._INTERPRETED, name, {**kernels.configs._INTERPRETED[name], **blocks})


def _pairs(table: Tensor, generator: torch.Generator, n: int) -> tuple[Tensor, Tensor]:
    return integers(generator, len(table), n), integers(generator, len(table), n)


def _inverse_norms(table: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(table.double(), dim=1)
    return torch.where(norms > 0, 1.0 / norms, 0.0).float()


@pytest.mark.parametrize("metric", METRICS)
@settings(max_examples=15)
@given(data=st.data(), n=st.integers(1, 2100), generator=generators)
def test_pair_scores_kernel_against_oracle(metric, data, n, generator):
    table = data.draw(tables(st.integers(1, 40), st.sampled_from([1, 2, 64, 129, 300])))
    table = table.float() if table.dtype == torch.float64 else table
    scales = _inverse_norms(table) if metric == "cosine" else None
    rows, columns = _pairs(table, generator, n)
    columns[torch.rand(n, generator=generator) < 0.3] = -1  # no pair
    got = kernels.pair_scores(table, scales, rows, table, scales, columns, metric)
    assert bool((got[columns < 0] == -torch.inf).all())
    got, rows, columns = got[columns >= 0], rows[columns >= 0], columns[columns >= 0]
    x, y = table.double()[rows], table.double()[columns]
    if scales is not None:
        x, y = x * scales[rows, None].double(), y * scales[columns, None].double()
    terms = {"l1": lambda: -(x - y).abs(), "l2": lambda: -((x - y) ** 2)}.get(metric, lambda: x * y)()
    # Sums of d products, differences among them rounded; cosine scales both sides first.
    budget = (table.shape[1] + 8) * U * terms.abs().sum(1)
    if metric in ("l1", "l2"):
        budget += 2 * U * (x.abs() + y.abs()).pow(2 if metric == "l2" else 1).sum(1)
    assert_within(got, terms.sum(1), budget + 1e-44)
    assert not bool(((got == 0) & got.signbit()).any())


@pytest.mark.parametrize("metric", METRICS)
@given(layout=layouts, generator=generators, int64=st.booleans())
@settings(max_examples=5)
def test_the_bits_of_a_pair_are_its_own(metric, layout, generator, int64):
    """Whatever other pairs are scored with it, in whatever layout the table lies, and from either side."""
    table = torch.randn(50, 130, generator=generator).bfloat16().float().to(DEVICE)
    scales = _inverse_norms(table) if metric == "cosine" else None
    rows, columns = _pairs(table, generator, 1500)
    first = kernels.pair_scores(table, scales, rows, table, scales, columns, metric)
    order = torch.randperm(1500, generator=generator)[:700].to(DEVICE)
    strided = lay_out(table.bfloat16(), layout)

    def again() -> Tensor:
        return kernels.pair_scores(strided, scales, columns[order], strided, scales, rows[order], metric)

    if int64:
        with forced_int64():
            assert torch.equal(again(), first[order])
    else:
        assert torch.equal(again(), first[order])


def test_rows_that_lie_otherwise_score_as_their_copy():
    """A GPU's compiler may order sums by strides and alignment: a dense copy is scored."""
    whole = torch.randn(40, 12, device=DEVICE)
    flat = torch.randn(40 * 8 + 1, device=DEVICE)[1:].view(40, 8)  # contiguous, of another alignment
    assert flat.data_ptr() % 16
    for rows in (whole[:, :8], whole.T, flat):
        scored = ScoredRows(rows, "dot", backend="triton").embedding
        assert scored.is_contiguous() and scored.data_ptr() % 16 == 0 and torch.equal(scored, rows)
    assert ScoredRows(whole, "dot", backend="triton").embedding is whole
    assert ScoredRows(flat, "dot").embedding is flat


def test_gpus_without_matrix_units_search_in_plain_torch(monkeypatch):
    rows = ScoredRows(torch.randn(40, 8), "cosine", backend="triton")
    assert not FusedScan.serves(rows, 3)  # so few rows are scored as fast in plain torch
    monkeypatch.setattr(fused, "KERNELS_FROM", 0)
    assert FusedScan.serves(rows, 3) and not FusedScan.serves(rows, 600)
    assert not FusedScan.serves(ScoredRows(torch.randn(40, 8), "cosine"), 3)
    monkeypatch.setattr(fused, "has_matrix_units", lambda device: False)
    assert not FusedScan.serves(rows, 3) and rows.kernels is not None
    monkeypatch.undo()
    _precision.has_matrix_units.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, expected in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert _precision.has_matrix_units(torch.device("cuda")) is expected
        _precision.has_matrix_units.cache_clear()


def test_nothing_to_score():
    table = torch.randn(3, 4, device=DEVICE)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert kernels.pair_scores(table, None, none, table, None, none, "dot").shape == (0,)


def test_offsets_of_64_bits_where_rows_need_them():
    """A table of more than 2^31 elements, and tiles whose results are as many."""

    def launched(run):
        with recording() as launches:
            run()
        return [launch.arguments["INT64"] for launch in launches]

    def meta(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="meta")

    ids = meta(10, dtype=torch.int64)
    for rows, wide in ((2**18, False), (2**21, True)):
        table = meta(rows, 2048)
        assert launched(lambda t=table: kernels.pair_scores(t, None, ids, t, None, ids, "dot")) == [wide]
    strided = torch.empty(1, device="meta").as_strided((1000, 8), (2**22, 1))
    assert launched(lambda: kernels.pair_scores(strided, None, ids, strided, None, ids, "dot")) == [True]
