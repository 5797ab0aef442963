"""The table of a model's input embeddings, where rows may be sharded. Runs in the process of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

# Whose hooks on an embedding leave its rows as they are: ours, sharding, and enable_input_require_grads.
_HARMLESS = ("ngrpo_ops.", "torch.distributed.", "deepspeed.", "transformers.", "peft.", "trl.", "accelerate.")


def vocabulary_size(model: Any) -> int:
    """V, the rows of the model's input table."""
    weight = input_weight(model.get_input_embeddings())
    return getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 leaves an empty tensor and notes the shape


@contextmanager
def input_table(module: Any, vocabulary: int) -> Iterator[Tensor]:
    """Within it the table [V, d] of what the module embeds every token as.

    The table is a DTensor where the module does nothing but look up rows, and the rows are sharded.
    """
    with _gathered(module):
        weight = input_weight(module)
        if _only_looks_up(module):
            yield module.weight
            return
        if not isinstance(weight, DTensor):
            # Weights that accelerate has offloaded are on meta until the forward. It moves the ids to where they are.
            device = torch.device("cpu") if weight.is_meta else weight.device
            yield module(torch.arange(vocabulary, device=device))
            return
        hooks = _foreign_hooks(module)
        if hooks:
            raise ValueError(
                f"the input embeddings are sharded and have a hook of another library ({hooks[0]}): what it returns "
                "for every token cannot be had; remove the hook, or do not shard"
            )
        ids = torch.arange(vocabulary, device=weight.device)
        # FSDP2 gathers only after a forward of the whole model has begun. So this goes around its hooks.
        whole = {f"module.{name}": parameter.full_tensor() for name, parameter in module.named_parameters()}
        yield functional_call(_ForwardWithoutHooks(module), whole, (ids,))


def _only_looks_up(module: Any) -> bool:
    """Whether the rows of the module's weight are what it returns: no forward, norm or hook changes them."""
    return (
        type(module).forward is nn.Embedding.forward  # FSDP2 makes a class of its own, with this forward
        and "forward" not in vars(module)  # accelerate's offloading replaces it
        and module.max_norm is None
        and not _foreign_hooks(module)
    )


def _foreign_hooks(module: nn.Module) -> list[str]:
    """The forward hooks of libraries that may change what the module returns."""
    hooks: list[Any] = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    hooks = [getattr(hook, "func", hook) for hook in hooks]  # of a functools.partial
    named = ((getattr(hook, "__module__", "") or "", getattr(hook, "__qualname__", repr(hook))) for hook in hooks)
    return [f"{where}.{name}" for where, name in named if not where.startswith(_HARMLESS)]


def input_weight(module: Any) -> Any:
    """The weight of an embedding module, also where LoRA has wrapped it."""
    return getattr(module, "base_layer", module).weight


class _ForwardWithoutHooks(nn.Module):
    """The forward of a module without the hooks on its call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module.forward(*args)


@contextmanager
def _gathered(module: nn.Module) -> Iterator[None]:
    """Within it parameters that DeepSpeed ZeRO-3 has partitioned are whole. Parameters that are whole stay whole."""
    partitioned = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id") and not len(parameter)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield
