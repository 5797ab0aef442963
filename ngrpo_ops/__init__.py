"""N-GRPO (arXiv 2606.10768) as components: neighbor mixing for GRPO rollouts, for the trainers people already use."""

from .config import MixingConfig
from .ops.candidate_weights import candidate_weights
from .ops.decode_step.api import decode_step, mixing_candidates
from .ops.decode_step.faults import raise_faults
from .ops.decode_step.outputs import DecodeStep, MixingCandidates
from .ops.gaussian_noise import gaussian_noise
from .ops.group_advantages.api import group_advantages
from .ops.group_advantages.presets import ADVANTAGE_PRESETS, Whitening
from .ops.mix_embeddings import mix_embeddings
from .ops.nearest_neighbors.api import NearestNeighbors, nearest_neighbors
from .ops.nearest_neighbors.table import NeighborTable, RefreshReport
from .ops.selective_log_softmax import selective_log_softmax
from .record import MixRecord
from .strategies import register_strategy

__version__ = "0.10.0"

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
    "register_strategy",
    "selective_log_softmax",
]
