"""The table of a real model, and how many pairs a search scores one by one."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import harness  # noqa: F401  it makes the examples importable
import pytest
import torch
from shapes import DIVISOR
from torch import Tensor

from examples.real_model.load import NAME, ModelUnavailableError, load_model
from ngrpo_ops.ops.nearest_neighbors.scores import ScoredRows

__all__ = ["REAL_LR", "ModelUnavailableError", "real_tables", "scored_pairs"]

REAL_LR = 1e-5  # of a step on the real model


@cache
def real_tables() -> tuple[str, Tensor, Tensor]:
    """The name of a real model, its embedding, and its embedding after a step of training.

    Of the rows as many as `shapes.DIVISOR` leaves.

    Raises:
        ModelUnavailableError: it cannot be had.
    """
    name = os.environ.get("NGRPO_OPS_TABLE")
    model, tokenizer = load_model(name)
    before = model.get_input_embeddings().weight.detach().clone()
    batch = tokenizer(["The sun rises in the east and sets in the west."] * 4, return_tensors="pt")
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=REAL_LR)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    rows = len(before) // DIVISOR
    return name or NAME, before[:rows], model.get_input_embeddings().weight.detach()[:rows].clone()


def scored_pairs(run: Callable[[], Any]) -> int:
    """The pairs that a search scores one by one, after what it knows of all pairs by matrix products."""
    scored = 0
    original = ScoredRows.pair_scores

    def counted(self: ScoredRows, rows: Tensor, others: ScoredRows, columns: Tensor) -> Tensor:
        nonlocal scored
        scored += int((columns >= 0).sum())
        return original(self, rows, others, columns)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScoredRows, "pair_scores", counted)
        run()
    return scored
