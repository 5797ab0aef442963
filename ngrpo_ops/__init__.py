"""N-GRPO (arXiv 2606.10768) as components: neighbour mixing for GRPO rollouts, for the trainers people already use."""

from .config import MixingConfig
from .functional import (
    DecodeStep,
    MixingCandidates,
    NearestNeighbors,
    candidate_weights,
    decode_step,
    gaussian_noise,
    mix_embeddings,
    mixing_candidates,
    nearest_neighbors,
    raise_faults,
    selective_log_softmax,
)
from .ops.group_advantages.api import group_advantages
from .ops.group_advantages.presets import ADVANTAGE_PRESETS, Whitening
from .record import MixRecord
from .table import NeighborTable, RefreshReport

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
