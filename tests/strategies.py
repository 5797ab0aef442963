"""Input factories and error budgets shared by the tests of the operations."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
METRICS = ("cosine", "dot", "l2", "l1")
LAYOUTS = ("contiguous", "transposed", "sliced", "offset")

dtypes = st.sampled_from(FLOATS)
metrics = st.sampled_from(METRICS)
layouts = st.sampled_from(LAYOUTS)
generators = st.integers(0, 2**31).map(lambda seed: torch.Generator().manual_seed(seed))


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def compute_roundoff(dtype: torch.dtype) -> float:
    """Of the arithmetic the package promises: float64 for float64, float32 for everything else."""
    return unit_roundoff(torch.float64 if dtype == torch.float64 else torch.float32)


def rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """What storing `value` in `dtype` may add."""
    info = torch.finfo(dtype)
    return unit_roundoff(dtype) * value.abs() + info.smallest_normal * info.eps


def assert_within(result: Tensor, exact: Tensor, budget: Tensor | float) -> None:
    """|result - exact| <= budget elementwise; an infinite value must be met exactly, a NaN never is."""
    result, exact = result.double(), exact.double()
    assert result.shape == exact.shape
    good = ((result - exact).abs() <= budget) | (result == exact)
    assert bool(good.all()), f"off by {(result - exact).abs()[~good].max()}, allowed {budget}"


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides or another storage offset."""
    if layout == "transposed":
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "sliced":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), 7, dtype=x.dtype)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "offset":
        flat = torch.full((x.numel() + 3,), 7, dtype=x.dtype)
        flat[3:] = x.reshape(-1)
        return flat[3:].view(x.shape)
    return x.contiguous()


@st.composite
def tables(draw: st.DrawFn, rows: st.SearchStrategy[int], columns: st.SearchStrategy[int]) -> Tensor:
    """Embedding tables with zero rows, duplicate rows and rows of very different scale, in every dtype and layout."""
    generator, dtype = draw(generators), draw(dtypes)
    v, d = draw(rows), draw(columns)
    x = torch.randn(v, d, generator=generator, dtype=torch.float64)
    pick = torch.randint(v, (5,), generator=generator)
    x[pick[0]] = 0.0
    x[pick[1]] *= 1e4 if dtype != torch.float16 else 1e3
    x[pick[2]] = x[pick[3]]
    x[pick[4]] *= 1e-3
    if draw(st.booleans()) and v > 4:  # many copies of one row
        x[torch.rand(v, generator=generator) < 0.5] = x[pick[3]].clone()
    return lay_out(x.to(dtype), draw(layouts))


@st.composite
def exact_tables(draw: st.DrawFn, metric: str, rows: st.SearchStrategy[int]) -> Tensor:
    """Tables whose scores are exact in float32, whatever the order of summation: ties are real ones.

    Small integers; for cosine rows of 0, 1, 4 or 16 entries of equal power-of-two size, whose norms are powers of two.
    """
    generator, dtype, v = draw(generators), draw(dtypes), draw(rows)
    if metric != "cosine":
        d = draw(st.integers(1, 20))
        bound = draw(st.sampled_from([1, 3, 15]))
        x = torch.randint(-bound, bound + 1, (v, d), generator=generator).double()
    else:
        d = draw(st.integers(16, 24))
        x = torch.zeros(v, d, dtype=torch.float64)
        for row in x:
            size = int(torch.tensor([0, 1, 4, 4, 16])[torch.randint(5, (), generator=generator)])
            columns = torch.randperm(min(d, 16 if size == 16 else 6), generator=generator)[:size]
            signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
            row[columns] = signs * 2.0 ** int(torch.randint(-3, 4, (), generator=generator))
    return lay_out(x.to(dtype), draw(layouts))
