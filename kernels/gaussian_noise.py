"""Gaussian noise on mixed embeddings, and the noise of a row's counter that the decode step draws by too."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .primitives import LEAST_UNIT, inverse_of_power, launch, launcher, power_of_two, random_words, widen


@triton.jit
def _open_uniform(word):
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23


@triton.jit
def _inverse_erf(x):
    """Of Giles, "Approximating the erfinv function" (GPU Computing Gems, 2012), good to float32's last bits."""
    w = -tl.log((1.0 - x) * (1.0 + x))
    near = w - 2.5
    p = tl.full(x.shape, 2.81022636e-08, tl.float32)
    p = tl.fma(p, near, 3.43273939e-07)
    p = tl.fma(p, near, -3.5233877e-06)
    p = tl.fma(p, near, -4.39150654e-06)
    p = tl.fma(p, near, 0.00021858087)
    p = tl.fma(p, near, -0.00125372503)
    p = tl.fma(p, near, -0.00417768164)
    p = tl.fma(p, near, 0.246640727)
    p = tl.fma(p, near, 1.50140941)
    far = tl.sqrt(tl.maximum(w, 5.0)) - 3.0
    q = tl.full(x.shape, -0.000200214257, tl.float32)
    q = tl.fma(q, far, 0.000100950558)
    q = tl.fma(q, far, 0.00134934322)
    q = tl.fma(q, far, -0.00367342844)
    q = tl.fma(q, far, 0.00573950773)
    q = tl.fma(q, far, -0.0076224613)
    q = tl.fma(q, far, 0.00943887047)
    q = tl.fma(q, far, 1.00167406)
    q = tl.fma(q, far, 2.83297682)
    return tl.where(w < 5.0, p, q) * x


@triton.jit
def noise_uniform(seed, step, row_id, index):
    """The uniform of each index: four to a stream."""
    w0, w1, w2, w3 = random_words(seed, step, row_id, 1 + index // 4)
    at = index % 4
    return _open_uniform(tl.where(at == 0, w0, tl.where(at == 1, w1, tl.where(at == 2, w2, w3))))


@triton.jit
def normal(seed, step, row_id, index):
    return 1.4142135623730951 * _inverse_erf(2.0 * noise_uniform(seed, step, row_id, index) - 1.0)


@triton.jit
def add_squares(unit, squares, value):
    """A sum of squares in squares of `unit`, a power of two that grows: no square overflows or vanishes."""
    larger = tl.maximum(unit, power_of_two(tl.max(tl.abs(value), axis=0)))
    inverse = inverse_of_power(larger)
    shrink, scaled = unit * inverse, value * inverse
    return larger, squares * shrink * shrink + tl.sum(scaled * scaled, axis=0)


@triton.jit
def gaussian_noise_kernel(
    mixed, scales, seeds, row_ids, steps, out, d, stride_m, stride_d, INT64: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = tl.program_id(0)
    base = mixed + widen(row, INT64) * stride_m
    seed, step, row_id = tl.load(seeds + row), tl.load(steps + row), tl.load(row_ids + row)
    unit, squares = tl.full([], LEAST_UNIT, tl.float32), 0.0
    for start in range(0, d, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        value = tl.load(base + widen(columns, INT64) * stride_d, mask=columns < d, other=0.0).to(tl.float32)
        unit, squares = add_squares(unit, squares, value)
    size = tl.load(scales + row) * unit * tl.sqrt_rn(squares / d)
    for start in range(0, d, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        where = out + widen(row, INT64) * d + columns
        tl.store(where, size * normal(seed, step, row_id, columns), mask=columns < d)


@launcher("scale", "seed", "row_ids", "steps")
def gaussian_noise(mixed: Tensor, scale: Tensor, seed: Tensor, row_ids: Tensor, steps: Tensor) -> Tensor:
    """[M, d] float32: scale times the root mean square of each row of `mixed`, times N(0, I)."""
    rows, d = mixed.shape
    out = torch.empty(rows, d, dtype=torch.float32, device=mixed.device)
    launch(
        gaussian_noise_kernel, lambda meta: (rows,), width=d, int64_for=(mixed, out),
        mixed=mixed, scales=scale, seeds=seed, row_ids=row_ids, steps=steps, out=out, d=d, stride_m=mixed.stride(0),
        stride_d=mixed.stride(1),
    )  # fmt: skip
    return out
