"""What a user chooses: one frozen configuration, read by every adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Metric = Literal["cosine", "dot", "l2", "l1"]
Strategy = Literal["neighbor", "topk"]
Variant = Literal["paper", "released"]


@dataclass(frozen=True)
class MixingConfig:
    """How a rollout mixes (paper: arXiv 2606.10768, table 6 for the defaults).

    Args:
        k: candidates a mixed step combines, the anchor counted (the paper's k). ``k=1`` only emits the anchor: the
            control that separates "argmax on a fraction of the steps" from mixing; it needs no neighbour table.
        mixing_rate: probability rho in [0, 1] that a step is mixed, drawn for every sequence and step (section 3.3).
        temperature: tau of the mixing weights (equations 2 and 9); ``None`` takes the rollout's own temperature
            (1.0 for a greedy rollout).
        metric: similarity by which the neighbours are chosen: "cosine" (the paper), "dot", "l2", "l1".
        strategy: where the candidates come from: "neighbor", the anchor and its nearest neighbours in the input
            embedding table (the paper), or "topk", the k most likely tokens (Soft Thinking, arXiv 2505.15778).
        variant: "paper", or "released": the weights the published code really applies, a softmax over the candidates'
            *probabilities* where the paper takes their logits. Only the weights follow it; the rest is the paper's.
        stop_token_ids: once one of these has been emitted (``</think>``, say) a sequence is no longer mixed.
        allowed_token_ids: tokens that may be returned as neighbours; ``None`` allows the whole table.
        loss_on_mixed_steps: ``False`` leaves the gated steps out of the loss: a forced anchor is not a draw from the
            policy. The paper keeps them.
        seed: key of the counter-based generator that draws the gates.

    Raises:
        ValueError: a value outside what is stated above; the message names the field.
    """

    k: int = 3
    mixing_rate: float = 0.1
    temperature: float | None = None
    metric: Metric = "cosine"
    strategy: Strategy = "neighbor"
    variant: Variant = "paper"
    stop_token_ids: Sequence[int] = ()
    allowed_token_ids: Sequence[int] | None = None
    loss_on_mixed_steps: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k must be an integer of at least 1 (the anchor counts), got {self.k!r}")
        if not 0.0 <= self.mixing_rate <= 1.0:
            raise ValueError(f"mixing_rate must be within [0, 1], got {self.mixing_rate!r}")
        if self.temperature is not None and not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be positive and finite, or None, got {self.temperature!r}")
        for name, allowed in (("metric", Metric), ("strategy", Strategy), ("variant", Variant)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {get_args(allowed)}, got {getattr(self, name)!r}")
        for name in ("stop_token_ids", "allowed_token_ids"):
            tokens = getattr(self, name)
            if tokens is None and name == "allowed_token_ids":
                continue
            if not isinstance(tokens, Sequence) or any(not isinstance(t, int) or t < 0 for t in tokens):
                raise ValueError(f"{name} must be a list of token ids, none negative, got {tokens!r}")
            object.__setattr__(self, name, tuple(tokens))
        if self.allowed_token_ids is not None and len(set(self.allowed_token_ids)) < self.k:
            raise ValueError(
                f"allowed_token_ids must name at least k = {self.k} tokens, got {self.allowed_token_ids!r}"
            )
        if not isinstance(self.seed, int) or not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be an integer of 64 bits, got {self.seed!r}")
        if not isinstance(self.loss_on_mixed_steps, bool):
            raise ValueError(f"loss_on_mixed_steps must be True or False, got {self.loss_on_mixed_steps!r}")
