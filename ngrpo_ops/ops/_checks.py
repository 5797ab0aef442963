"""Checks that name the argument, what was expected and what came. None of them makes the host wait for a device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def require_tensor(value: Any, name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if isinstance(value, DTensor):
        raise TypeError(f"{name} is a sharded DTensor: pass {name}.full_tensor(), gathered on every rank")
    if value.layout is not torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")


LEAST_POSITIVE = 1e-30
"""Of temperatures: a smaller one would take finite logits to infinity."""

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The floating-point dtypes that the operations compute with."""


def require_embedding(embedding: Any, name: str = "embedding") -> None:
    """A dense floating-point table [V, d]."""
    require_tensor(embedding, name)
    if embedding.numel() == 0:
        raise ValueError(
            f"{name} must not be empty, got shape {tuple(embedding.shape)} "
            "(an empty ZeRO-3 shard? gather it first, with deepspeed.zero.GatheredParameters)"
        )
    require_table(embedding, name)


def require_table(embedding: Any, name: str = "embedding") -> None:
    """Some rows of a table, maybe none."""
    require_tensor(embedding, name)
    if embedding.dim() != 2 or embedding.dtype not in FLOATING or not embedding.shape[1]:
        raise ValueError(
            f"{name} must be a floating-point table [V, d], got {embedding.dtype} of shape {tuple(embedding.shape)}"
        )


def require_neighbors(vocabulary: int, k: Any) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k < vocabulary:
        raise ValueError(
            f"k must be an integer in [1, {vocabulary}): each of {vocabulary} rows has V - 1 others, got {k!r}"
        )


def require_ids(ids: Any, name: str) -> None:
    require_tensor(ids, name)
    if ids.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {ids.dtype}")


def require_floating(tensor: Any, name: str) -> None:
    require_tensor(tensor, name)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be floating point of 16, 32 or 64 bits, got {tensor.dtype}")


def values_are_readable(tensor: Tensor) -> bool:
    """Whether a check may look at a tensor's values: nothing waits for a device then, and nothing is being traced."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def require_shape(tensor: Tensor, shape: tuple[int, ...], name: str, meaning: str) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {meaning} = {shape}, got {tuple(tensor.shape)}")


def require_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device} but {other_name} on {other.device}")


def require_mask(mask: Any, shape: tuple[int, ...], name: str, meaning: str) -> None:
    require_tensor(mask, name)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} must be bool, got {mask.dtype}")
    require_shape(mask, shape, name, meaning)


def require_integer(value: Any, name: str, *, least: int = -(2**63), optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int{' or None' if optional else ''}, got {value!r}")
    if not least <= value < 2**63:
        raise ValueError(f"{name} must be at least {least} and fit in 64 bits, got {value!r}")


def require_number(value: Any, name: str, *, least: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not least <= value < math.inf or _is_huge(value):
        raise ValueError(f"{name} must be finite and at least {least}, got {value!r}")


def _is_huge(value: Any) -> bool:
    """Whether a number is an int that torch does not take for one."""
    return isinstance(value, int) and value >= 2**63


def require_flag(value: Any, name: str) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def require_choice(value: Any, choices: tuple[str, ...], name: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def require_positive(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    # math.isfinite would break a compiled graph with a symbolic float.
    if not LEAST_POSITIVE <= value < math.inf or _is_huge(value):
        raise ValueError(f"{name} must be positive and finite, at least {LEAST_POSITIVE}, got {value!r}")


def require_ids_in_range(ids: Tensor, size: int, name: str) -> None:
    # On an accelerator the indexing itself asserts; a check here would make the host wait.
    if ids.device.type == "cpu" and ids.numel():
        least, largest = (int(x) for x in ids.aminmax())
        if least < 0 or largest >= size:
            raise ValueError(f"{name} must be within [0, {size}), got values from {least} to {largest}")


def require_counter(value: int | Tensor, name: str, other: str, tensor: Tensor) -> Tensor:
    """A seed or step as a 0-d tensor. A Python number's is on the CPU, so that nothing is copied to a GPU; a tensor is
    there, or where `tensor`, the argument `other`, is."""
    if isinstance(value, Tensor):
        require_ids(value, name)
        require_shape(value, (), name, "0-d")
        if value.device.type != "cpu":
            require_same_device(name, value, other, tensor)
        return value
    require_integer(value, name)
    return torch.full((), value, dtype=torch.int64, device="cpu")


def within(ids: Tensor, size: int) -> Tensor:
    """Which ids lie in [0, size)."""
    return (ids >= 0) & (ids < size)
