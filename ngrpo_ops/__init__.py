"""N-GRPO (arXiv 2606.10768) as components: neighbour mixing for GRPO rollouts, for the trainers people already use."""

from .advantages import ADVANTAGE_PRESETS, Whitening
from .config import MixingConfig
from .functional import (
    DecodeStep,
    MixingCandidates,
    candidate_weights,
    decode_step,
    gaussian_noise,
    group_advantages,
    mix_embeddings,
    mixing_candidates,
    raise_faults,
    selective_log_softmax,
)
from .ops.nearest_neighbors.api import NearestNeighbors, nearest_neighbors
from .ops.nearest_neighbors.table import NeighborTable, RefreshReport
from .record import MixRecord

__version__ = "0.6.1"

__all__ = [
    "ADVANTAGE_PRESETS",
    "DecodeStep",
    "MixRecord",
    "MixingCandidates",
    "MixingConfig",
    "NearestNeighbors",
    "NeighborTable",
    "RefreshReport",
    "Whitening",
    "candidate_weights",
    "decode_step",
    "gaussian_noise",
    "group_advantages",
    "mix_embeddings",
    "mixing_candidates",
    "nearest_neighbors",
    "raise_faults",
    "selective_log_softmax",
]
