"""The neighbour table that a configuration asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import MixingConfig
from .ops.nearest_neighbors.table import NeighborTable


def table_of(config: MixingConfig, vocabulary: int) -> NeighborTable | None:
    """The table that rollouts of this configuration read, to be refreshed; None if they read none."""
    if config.strategy != "neighbor" or config.k == 1 or config.mixing_rate == 0:
        return None
    allowed = None
    if config.allowed_token_ids is not None:
        allowed = torch.zeros(vocabulary, dtype=torch.bool)
        allowed[list(config.allowed_token_ids)] = True
    return NeighborTable(config.k - 1, metric=config.metric, allowed=allowed)


def neighbor_ids_of(
    config: MixingConfig, table: NeighborTable | None, vocabulary: int, device: torch.device
) -> Tensor | None:
    """[V, k - 1], as `decode_step` takes them; None for a strategy that has no neighbours."""
    if config.strategy != "neighbor":
        return None
    if table is None:  # none at k = 1; at a rate of 0 nobody looks
        return torch.zeros((), dtype=torch.int64, device=device).expand(vocabulary, config.k - 1)
    return table.ids
