"""The arms: what differs between runs that share checkpoint, prompts, seeds and steps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from .model import build_tokenizer
from .task import Task


@dataclass(frozen=True)
class Arm:
    """One way to roll out.

    Args:
        label: in tables and pictures.
        mixing: fields of NGRPOConfig; None: TRL's GRPOTrainer.
        matched: the temperature of the rollouts is set so that the entropy of what is emitted is N-GRPO's.
        words_only: numbers are no neighbors.
    """

    label: str
    mixing: dict[str, Any] | None = field(default_factory=dict)
    matched: bool = False
    words_only: bool = False

    def fields(self, task: Task) -> dict[str, Any] | None:
        """What NGRPOConfig is given; None: GRPO."""
        if self.mixing is None or not self.words_only:
            return self.mixing
        ids = build_tokenizer(task).convert_tokens_to_ids(list(task.words))
        return self.mixing | {"mixing_allowed_token_ids": ids}


def _arm(label: str, **fields: Any) -> Arm:
    return Arm(label, {f"mixing_{name}": value for name, value in ({"k": 3, "rate": 0.1} | fields).items()})


ARMS = {
    "grpo": Arm("GRPO", None),
    "anchor": _arm("anchor only (k = 1)", k=1),
    "ngrpo": _arm("N-GRPO"),
    "grpo_matched": Arm("GRPO, N-GRPO's entropy", None, matched=True),
    "released": _arm("N-GRPO, released weights", variant="released"),
    "words_only": replace(_arm("N-GRPO, numbers no neighbors"), words_only=True),
    "rate_0.05": _arm("N-GRPO, rate 0.05", rate=0.05),
    "rate_0.3": _arm("N-GRPO, rate 0.3", rate=0.3),
    "rate_1": _arm("N-GRPO, rate 1", rate=1.0),
    "l2": _arm("N-GRPO, L2", metric="l2"),
    "l1": _arm("N-GRPO, L1", metric="l1"),
    "topk": _arm("top-k (Soft Thinking)", strategy="topk"),
    "gumbel": _arm("Gumbel (SofT-GRPO)", strategy="gumbel"),
    "gaussian": _arm("Gaussian (STHT)", strategy="gaussian"),
    "moi": _arm("Mixture of Inputs", strategy="moi"),
    "multiplex": _arm("Multiplex Thinking", strategy="multiplex"),
}
