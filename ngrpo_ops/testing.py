"""Error budgets and input factories for tests of the operations: this package's own, and those of whoever extends it.

Inputs are made on the device that NGRPO_OPS_TEST_DEVICE names, the CPU by default; there the kernels are interpreted.
Needs hypothesis.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

DEVICE = torch.device(os.environ.get("NGRPO_OPS_TEST_DEVICE", "cpu"))

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
METRICS = ("cosine", "dot", "l2", "l1")
STRATEGIES = ("neighbor", "topk", "gumbel", "gaussian", "moi", "multiplex", "anchor")
LAYOUTS = ("contiguous", "transposed", "sliced", "offset")

dtypes = st.sampled_from(FLOATS)
metrics = st.sampled_from(METRICS)
layouts = st.sampled_from(LAYOUTS)
generators = st.integers(0, 2**31).map(lambda seed: torch.Generator().manual_seed(seed))


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """torch.empty, empty_like and new_empty return NaN (the lowest value, True), so that what an operation forgets to
    write is seen."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            made = make(*args, **kwargs)
            if made.device.type == "meta" or made.is_sparse:
                return made
            if made.dtype.is_floating_point:
                return made.detach().fill_(torch.nan).requires_grad_(made.requires_grad)
            return made.fill_(True if made.dtype == torch.bool else torch.iinfo(made.dtype).min)

        return wrapper

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poisoned(Tensor.new_empty)),
    ):
        yield


# Error budgets ----------------------------------------------------------------------------------------------------


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def compute_roundoff(dtype: torch.dtype) -> float:
    """Of the arithmetic the package promises: float64 for float64, float32 for everything else."""
    return unit_roundoff(torch.float64 if dtype == torch.float64 else torch.float32)


def rounding(value: Tensor, dtype: torch.dtype, backend: str = "eager") -> Tensor:
    """What storing `value` in `dtype` may add. The interpreter cuts float32 to bfloat16 instead of rounding it."""
    info = torch.finfo(dtype)
    cut = 2 if backend == "triton" and DEVICE.type == "cpu" and dtype == torch.bfloat16 else 1
    return cut * (unit_roundoff(dtype) * value.abs() + info.smallest_normal * info.eps)


def assert_within(result: Tensor, exact: Tensor, budget: Tensor | float) -> None:
    """|result - exact| <= budget elementwise; an infinite value must be met exactly, a NaN never is."""
    result, exact = result.double().cpu(), exact.double().cpu()
    budget = budget.double().cpu() if isinstance(budget, Tensor) else budget
    assert result.shape == exact.shape
    good = ((result - exact).abs() <= budget) | (result == exact)
    assert bool(good.all()), f"off by {(result - exact).abs()[~good].max()}, allowed {budget}"


def assert_as_accurate(kernel: Tensor, eager: Tensor, exact: Tensor) -> None:
    """The kernel's largest error against float64 is at most twice the eager one's, a rounding of the result, and four
    roundings of the float32 arithmetic: two orders of summation differ by as much."""
    assert kernel.shape == eager.shape == exact.shape and kernel.dtype == eager.dtype
    if kernel.numel() == 0:
        return
    exact, kernel_value, eager_value = (x.double().cpu() for x in (exact, kernel, eager))
    assert torch.equal(kernel_value.isnan(), exact.isnan()), "NaN in other places than the exact result"
    exact, kernel_value, eager_value = (x.nan_to_num(nan=0.0) for x in (exact, kernel_value, eager_value))
    errors = [(x - exact).abs().max() for x in (kernel_value, eager_value)]
    band = rounding(exact, kernel.dtype, "triton").max() + 4 * compute_roundoff(kernel.dtype) * exact.abs().max()
    assert errors[0] <= 2 * errors[1] + band, f"error {errors[0]:.3g}, eager {errors[1]:.3g}, rounding {band:.3g}"


# Inputs -----------------------------------------------------------------------------------------------------------


def for_backend(x: Tensor, backend: str) -> Tensor:
    """The kernels take no float64."""
    return x.float() if backend == "triton" and x.dtype == torch.float64 else x


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal, on the device, the same numbers on every one."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def integers(generator: torch.Generator, high: int, *shape: int) -> Tensor:
    """Uniform below `high`, int64, on the device."""
    return torch.randint(high, shape, generator=generator).to(DEVICE)


def gradients(generator: torch.Generator, like: Tensor, kind: str) -> Tensor:
    """An upstream gradient: "dense", "expanded" (stride 0 along all but the last dimension) or "transposed"."""
    if kind == "expanded":
        return normal(generator, *like.shape[-1:], dtype=like.dtype).expand(like.shape)
    return lay_out(normal(generator, *like.shape, dtype=like.dtype), "contiguous" if kind == "dense" else "transposed")


gradient_kinds = st.sampled_from(["dense", "expanded", "transposed"])


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides or another storage offset."""
    if layout == "transposed" and x.dim():
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "sliced":
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), 7, dtype=x.dtype, device=x.device)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "offset":
        flat = torch.full((x.numel() + 3,), 7, dtype=x.dtype, device=x.device)
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
    return lay_out(x.to(dtype).to(DEVICE), draw(layouts))


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
    return lay_out(x.to(dtype).to(DEVICE), draw(layouts))
