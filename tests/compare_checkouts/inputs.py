"""What the cases share: seeded tensors, gradients, refusals, and the names that differ between checkouts."""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ngrpo_ops import MixingConfig, group_advantages

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "transposed", "sliced", "offset")
METRICS = ("cosine", "dot", "l2", "l1")
STRATEGIES = ("neighbor", "topk", "gumbel", "gaussian", "moi", "multiplex", "anchor")
OWN_WEIGHTS = ("gumbel", "moi", "multiplex")
"""Strategies without a variant."""

RENAMED = {"ngrpo": "counter_based", "singles": "singleton_groups"}
"""Names up to 0.6.1, and their names since. Results are compared under the new ones."""


def dtypes(backend: str) -> tuple[torch.dtype, ...]:
    """The kernels take no float64."""
    return FLOATS if backend == "eager" else FLOATS[1:]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def counter_based_sampler() -> str:
    """The value of `sampler` in the checkout under test."""
    try:
        return MixingConfig(sampler="counter_based").sampler
    except ValueError:
        return "ngrpo"


def singleton_groups() -> str:
    """The keyword of `group_advantages` in the checkout under test."""
    parameters = inspect.signature(group_advantages).parameters
    return "singleton_groups" if "singleton_groups" in parameters else "singles"


class Inputs:
    """Random tensors of one case, seeded by its name: the same in both checkouts."""

    def __init__(self, name: str) -> None:
        self.generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def normal(
        self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, layout: str = "contiguous"
    ) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64) * scale
        return lay_out(x.to(dtype), layout)

    def integers(self, high: int, *shape: int, layout: str = "contiguous") -> Tensor:
        return lay_out(torch.randint(high, shape, generator=self.generator), layout)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
        return lay_out(torch.rand(shape, generator=self.generator, dtype=torch.float64).to(dtype), layout)

    def mask(self, probability: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) < probability


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides or another storage offset."""
    if layout == "transposed" and x.dim():
        return x.movedim(-1, 0).contiguous().movedim(0, -1)
    if layout == "sliced":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), 7)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "offset":
        flat = x.new_full((x.numel() + 3,), 7)
        flat[3:] = x.reshape(-1)
        return flat[3:].view(x.shape)
    return x


def with_gradients(inputs: Inputs, call: Callable[..., Any], **leaves: Tensor) -> dict[str, Any]:
    """The result of `call(**leaves)` and the gradients of the leaves under a random upstream gradient."""
    for leaf in leaves.values():
        leaf.requires_grad_()
    result = call(**leaves)
    outputs = result if isinstance(result, tuple) else (result,)
    upstream = [inputs.normal(*output.shape, dtype=output.dtype) for output in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    return {"result": outputs, "gradients": dict(zip(leaves, gradients, strict=True))}


class Case(NamedTuple):
    """What is compared: whatever nested value `run` returns for the inputs of this name."""

    group: str
    name: str
    run: Callable[[Inputs], Any]


Cases = Iterator[Case]


def text(value: str) -> tuple[str, str]:
    """Words: a change of them is reported and is not a difference."""
    return ("text", value)


def at_least(values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Entries that must all be there and equal. Additional ones are reported and are not a difference."""
    return ("at least", values)


def refusal(call: Callable[[], Any]) -> tuple[str, ...]:
    """The type and the words of the error that a call raises."""
    try:
        call()
    except Exception as error:
        return ("raised", type(error).__name__, str(error))
    return ("not refused",)
