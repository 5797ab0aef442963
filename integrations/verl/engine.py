"""verl's FSDP engine, whose forwards replay the records of their micro-batch. Runs in the training workers."""

from __future__ import annotations

from typing import Any

import torch
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.padding import response_from_nested

from ..transformers import EmbeddingMixer
from .checks import check_parameters
from .samples import BatchRecords

check_parameters("engine")


class ReplayingFSDPEngine(FSDPEngineWithLMHead):
    """Policy, old policy and reference pass here, and each is shown the mixes of the rollout.

    The candidates are looked up by the model's own input embedding in the same call as the ids: it works whatever FSDP,
    LoRA or gradient checkpointing does there, and gradients reach every candidate's row.
    """

    _mixer: EmbeddingMixer | None = None

    def forward_step(self, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        """verl's, which replays.

        Raises:
            RuntimeError: a sample has no record, or one of other tokens; the forward has not embedded the mixes.
        """
        records = BatchRecords.of(micro_batch)
        mixer = self._current_mixer()
        with mixer.replaying_with(records.overlay):
            loss, output = super().forward_step(micro_batch, loss_function, forward_only)
        if not forward_only:
            output["metrics"] |= records.metrics(_rollout_policys(micro_batch, output), mixer.cosines)
        return loss, output

    def _current_mixer(self) -> EmbeddingMixer:
        module: Any = getattr(self.module, "_fsdp_wrapped_module", self.module)  # FSDP1 wraps it
        embedding = module.get_input_embeddings()
        if self._mixer is None or self._mixer.module is not embedding:  # verl builds the model again on a reset
            self._mixer = EmbeddingMixer(embedding)
        return self._mixer


def _rollout_policys(micro_batch: Any, output: Any) -> torch.Tensor:
    """The training engine's log-probabilities of a micro-batch by the policy that rolled out, jagged [B, T].

    These are the old ones. Where verl takes the rollout's own for old (`rollout_correction.bypass_mode`), it computes
    none, and they are the current ones: after the first update of a step the policy has moved.
    """
    old = micro_batch["old_log_probs"]
    if "rollout_log_probs" in micro_batch.keys():  # noqa: SIM118  (a TensorDict iterates over its rows)
        rollout = micro_batch["rollout_log_probs"]
        if torch.equal(old.values(), rollout.values().to(old.device)):
            return response_from_nested(output["model_output"]["log_probs"], micro_batch["response_mask"])
    return old
