"""CPU forms that are faster than the oracles of `reference` and held to them like the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import decoding
from .ops._precision import ROW_BLOCK_ELEMENTS


def decode_step(logits: Tensor, embedding: Tensor, neighbor_ids: Tensor | None, *settings: Any) -> decoding.Step:
    """The oracle, a cache's worth of rows at a time."""
    rows = logits.shape[0]
    *others, row_ids, enabled = settings
    by_row = [*others, torch.arange(rows) if row_ids is None else row_ids, enabled]
    steps = []
    for block in torch.arange(rows).split(max(1, ROW_BLOCK_ELEMENTS // logits.shape[1])):
        of_block = slice(int(block[0]), int(block[-1]) + 1)
        part: list[Any] = [x[of_block] if isinstance(x, Tensor) and x.dim() else x for x in by_row]
        steps.append(decoding.decode_step(logits[of_block], embedding, neighbor_ids, *part))
    return steps[0] if len(steps) == 1 else decoding.Step(*map(torch.cat, zip(*steps, strict=True)))
