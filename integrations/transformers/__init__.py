"""N-GRPO in `transformers`: mixed rollouts with `generate`, and the replay of their embeddings in a forward.

Runs in the process of the model. One mechanism serves rollout and replay: a pair of hooks on the input-embedding
module (hooks.py). The module's weight is not read in a forward. So LoRA, scaled embeddings, gradient checkpointing and
separate reference models each use their own table, and gradients reach every candidate row.

    mixing.py    NeighborMixing: what users and trainers call
    rollout.py   the logits processor that watches one `generate`
    hooks.py     EmbeddingMixer: the hook pair
    table.py     the input table that the neighbors are of
    checks.py    what cannot be mixed
    view.py      rollouts as they are shown (python -m ngrpo_ops rollout)
"""

from __future__ import annotations

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        "this adapter needs transformers: pip install '.[transformers]' in a checkout of ngrpo_ops"
    ) from error

from .checks import refuse_generation, refuse_unsupported_filters
from .hooks import EmbeddingMixer
from .mixing import NeighborMixing

__all__ = ["EmbeddingMixer", "NeighborMixing", "refuse_generation", "refuse_unsupported_filters"]
