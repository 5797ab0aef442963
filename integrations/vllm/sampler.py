"""What each row's request asks of vLLM's sampler: penalties and filters. Runs in the engine's workers."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


def penalized_logits(sampler: Any, batch: Any, logits: Tensor, row: Tensor, slots: np.ndarray) -> Tensor:
    """The logits of some rows as vLLM has them before temperature and filters: [M, V].

    Args:
        sampler: vLLM's.
        batch: vLLM's, whose logits these are.
        logits: [B, V].
        row: int64 [M], on the device.
        slots: the rows' slots [M].
    """
    scores = logits[row]
    touched = (
        sampler.logit_bias_state.use_logit_bias[slots].any()
        or sampler.penalties_state.use_penalty[slots].any()
        or (sampler.bad_words_state.num_bad_words.np[slots] > 0).any()
        or sampler.thinking_budget_state.enabled
    )
    if not touched:
        return scores
    scores, at = scores.float(), batch.logits_indices[row]
    mapping, ids = batch.expanded_idx_mapping[row], batch.input_ids[at]
    local = batch.expanded_local_pos[row]
    sampler.logit_bias_state.apply_logit_bias(scores, mapping, slots, batch.positions[at])
    sampler.penalties_state.apply_penalties(scores, mapping, slots, ids, local)
    sampler.bad_words_state.apply_bad_words(scores, mapping, slots, ids, local)
    sampler.thinking_budget_state.apply(scores, mapping, mapping, slots, ids, local)
    return scores


def filters(states: Any, slots: np.ndarray, slot: Tensor) -> dict[str, Tensor]:
    """The filters of some rows as `decode_step` takes them. A filter that no row sets is left out.

    Args:
        states: vLLM's sampling states.
        slots, slot: the rows' slots [M], on the host and on the device.
    """
    found: dict[str, Tensor] = {}
    if (states.top_k.np[slots] != states.vocab_size).any():
        found["top_k"] = states.top_k.gpu[slot].long()
    if (states.top_p.np[slots] != 1.0).any():
        found["top_p"] = states.top_p.gpu[slot]
    if (states.min_p.np[slots] != 0.0).any():
        found["min_p"] = states.min_p.gpu[slot]
    return found
