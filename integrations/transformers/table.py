"""The table of a model's input embeddings, where rows may be sharded. Runs in the process of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call


def vocabulary_size(model: Any) -> int:
    """V, the rows of the model's input table."""
    weight = _weight(model.get_input_embeddings())
    return getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 leaves an empty tensor and notes the shape


@contextmanager
def input_table(module: Any, vocabulary: int) -> Iterator[Tensor]:
    """Within it the table [V, d] of what the module embeds every token as.

    The table is a DTensor where the module does nothing but look up rows, and the rows are sharded.
    """
    with _gathered(module):
        weight = _weight(module)
        if type(module).forward is nn.Embedding.forward:  # FSDP2 makes a class of its own, with this forward
            yield module.weight
            return
        ids = torch.arange(vocabulary, device=weight.device)
        if not isinstance(weight, DTensor):
            yield module(ids)
            return
        # FSDP2 gathers only after a forward of the whole model has begun. So this goes around its hooks.
        whole = {f"module.{name}": parameter.full_tensor() for name, parameter in module.named_parameters()}
        yield functional_call(_ForwardWithoutHooks(module), whole, (ids,))


def _weight(module: Any) -> Any:
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
