"""In which precision an operation computes, and what the hardware multiplies: bfloat16, TF32, float32, float64."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

FLOAT32_ROUNDOFF = 2.0**-24
"""The unit roundoff of float32."""

ROW_BLOCK_ELEMENTS = 2**19
"""Logits that a CPU form handles at a time: their float32 copy stays in a core's cache."""


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64 and float32 for everything else: the dtype in which an operation on `tensor` computes."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this processor has instructions that multiply bfloat16 matrices."""
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))


@functools.cache
def has_matrix_units(device: torch.device) -> bool:
    """Whether the kernels' bfloat16 products run on matrix units. Before NVIDIA's Ampere they would spill."""
    return device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


def matmul_input_roundoff() -> float:
    """What a float32 matrix multiplication may round its inputs to (TF32, bfloat16), truncation included."""
    try:
        precision = torch.get_float32_matmul_precision()
    except RuntimeError:  # the old and the new precision settings of torch disagree: assume the coarser
        precision = "medium"
    return {"highest": 0.0, "high": 2.0**-10}.get(precision, 2.0**-7)


def power_of_two(x: Tensor) -> Tensor:
    """The power of two at or below |x|, of float32 or float64, kept far from the ends of the dtype's range."""
    integers, exponent = (torch.int32, 0x7F800000) if x.dtype == torch.float32 else (torch.int64, 0x7FF << 52)
    limit = 2.0 ** (100 if x.dtype == torch.float32 else 1000)
    return (x.view(integers) & exponent).view(x.dtype).clamp(1 / limit, limit)
