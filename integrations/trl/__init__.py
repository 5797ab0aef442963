"""Runs in the trainer's process. N-GRPO in TRL: `NGRPOConfig` and `NGRPOTrainer` for `GRPOConfig` and `GRPOTrainer`.

- config.py: the trainer's fields, and the `MixingConfig` that they make.
- trainer.py: the rollout that mixes, and the replay of its embeddings.
- checks.py: TRL's signatures, refused settings and models, the cause of a replay error.
- engine.py: TRL's colocated vLLM engine.
- server.py: a vLLM server, which TRL's client asks.
"""

try:
    from trl import GRPOConfig, GRPOTrainer  # noqa: F401
except ImportError as error:
    raise ImportError("this adapter needs TRL: pip install '.[trl]' in a checkout of ngrpo_ops") from error

from .config import NGRPOConfig
from .trainer import NGRPOTrainer

__all__ = ["NGRPOConfig", "NGRPOTrainer"]
