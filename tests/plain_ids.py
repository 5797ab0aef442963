"""What a replay is compared with: the differences of log-probabilities that plain ids make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from ngrpo_ops import MixRecord
from ngrpo_ops.integrations.trl import NGRPOTrainer


class ScoresPlainIds(NGRPOTrainer):
    """Scores each rollout a second time, without its record, and otherwise trains as `NGRPOTrainer` does.

    Attributes:
        plain_difference: the largest difference between a rollout's log-probability and that of plain ids.
    """

    plain_difference = 0.0

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> Any:
        self._scored = input_ids, attention_mask, logits_to_keep
        return super()._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
        )

    def _log_replay_error(self, logps: Tensor, record: MixRecord, completion_mask: Tensor) -> None:
        super()._log_replay_error(logps, record, completion_mask)
        with torch.no_grad():
            plain = GRPOTrainer._get_per_token_logps_and_entropies(self, self.model, *self._scored)[0]
        difference = ((plain - record.logprobs) * completion_mask).abs().max()
        self.plain_difference = max(self.plain_difference, float(difference))
