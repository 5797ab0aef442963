"""Registration of the grouped operation and its gradient with torch: schema, shape function, autograd."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._library import Operation, load_kernels
from .._precision import compute_dtype
from . import reference
from .reference import GroupSettings


@Operation
def group_advantages(rewards: Tensor, settings: GroupSettings, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "triton":
        return load_kernels("group_advantages").forward(rewards, settings)
    return reference.group_advantages(rewards, settings)


@group_advantages.register_fake
def _(rewards: Tensor, *settings_and_backend: Any) -> tuple[Tensor, Tensor]:
    groups = GroupSettings(*settings_and_backend[:-1]).num_groups(rewards.shape[0])
    return rewards.new_empty(rewards.shape), rewards.new_empty(groups, rewards.shape[1], dtype=compute_dtype(rewards))


@Operation
def group_advantages_backward(
    grad: Tensor, grad_scales: Tensor, rewards: Tensor, settings: GroupSettings, backend: str
) -> Tensor:
    if backend == "triton":
        return load_kernels("group_advantages").backward(grad, grad_scales, rewards, settings)
    return reference.group_advantages_backward(grad, grad_scales, rewards, settings)


@group_advantages_backward.register_fake
def _(grad: Tensor, grad_scales: Tensor, rewards: Tensor, *_: Any) -> Tensor:
    return rewards.new_empty(rewards.shape)


_TENSORS = 4  # the rewards, and weights, order and offsets, with which GroupSettings begins


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:]


def _backward(ctx: Any, grad: Tensor, grad_scales: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grad_rewards = group_advantages_backward(grad, grad_scales, *tensors, *ctx.options)
    return grad_rewards, *[None] * (len(tensors) + len(ctx.options) - 1)


group_advantages.register_autograd(_backward, setup_context=_setup_context)
group_advantages_backward.refuse_derivative("group_advantages")
