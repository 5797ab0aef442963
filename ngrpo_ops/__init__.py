"""N-GRPO (arXiv 2606.10768) as components: neighbour mixing for GRPO rollouts, for the trainers people already use."""

from .advantages import ADVANTAGE_PRESETS, Whitening
from .config import MixingConfig
from .functional import (
    DecodeStep,
    NearestNeighbors,
    candidate_weights,
    decode_step,
    group_advantages,
    mix_embeddings,
    nearest_neighbors,
    selective_log_softmax,
)
from .record import MixRecord
from .table import NeighborTable, RefreshReport

__version__ = "0.3.0"

__all__ = [
    "ADVANTAGE_PRESETS",
    "DecodeStep",
    "MixRecord",
    "MixingConfig",
    "NearestNeighbors",
    "NeighborTable",
    "RefreshReport",
    "Whitening",
    "candidate_weights",
    "decode_step",
    "group_advantages",
    "mix_embeddings",
    "nearest_neighbors",
    "selective_log_softmax",
]
