"""What a user chooses: one frozen configuration, read by every adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Metric = Literal["cosine", "dot", "l2", "l1"]
Strategy = Literal["neighbor", "topk", "gumbel", "gaussian", "moi", "multiplex", "anchor"]
Variant = Literal["paper", "released"]
Sampler = Literal["native", "ngrpo"]

NOISE_SCALE = 0.33  # of STHT
MOI_BETA = 1.0  # of MoI
DRAWING = ("moi", "multiplex")  # emit the row's sample, as the cuts of the rollout leave it
OWN_WEIGHTS = ("gumbel", *DRAWING)  # not those of a softmax over logits, and so without a variant


@dataclass(frozen=True)
class MixingConfig:
    """How a rollout mixes (paper: arXiv 2606.10768, table 6 for the defaults).

    Args:
        k: candidates a mixed step combines, the anchor counted (the paper's k). ``k=1`` only emits the anchor: the
            control that separates "argmax on a fraction of the steps" from mixing; it needs no neighbour table. None:
            3, or 1 for strategy "anchor".
        mixing_rate: probability rho in [0, 1] that a step is mixed, drawn for every sequence and step (section 3.3).
        temperature: tau of the mixing weights (equations 2 and 9); ``None`` takes the rollout's own temperature
            (1.0 for a greedy rollout). For "gumbel" it divides the noised log-probabilities, which themselves are those
            of the rollout's temperature.
        metric: similarity by which the neighbours are chosen: "cosine" (the paper), "dot", "l2", "l1".
        strategy: what is mixed, and what a mixed step emits. "neighbor": the anchor and its nearest neighbours in the
            input embedding table (the paper). "topk": the k most likely tokens (Soft Thinking, arXiv 2505.15778).
            "gumbel": the same, their weights softmax((log p + Gumbel noise) / tau) (SofT-GRPO, arXiv 2511.06411); the
            heaviest is emitted, which is a draw from the policy's top k. "gaussian": "topk" and Gaussian noise on the
            mix (STHT, arXiv 2509.19170). "moi": the sampled token and the k - 1 most likely others, weighted by
            (H p + (beta + 1 - H) [sampled]) / (beta + 1), H the policy's entropy over its largest, log V (Mixture of
            Inputs, arXiv 2505.14827, which mixes the whole vocabulary); the sampled token is emitted. "multiplex": k
            independent draws, those that differ weighted by their probabilities; the first is emitted (Multiplex
            Thinking, arXiv 2601.08808). "anchor": k = 1, the control. The others emit the argmax.
        variant: "paper", or "released": the weights the published code really applies, a softmax over the candidates'
            *probabilities* where the paper takes their logits. Only the weights follow it; the rest is the paper's.
        entropy_threshold: a step is mixed only where the entropy of the policy, at the rollout's temperature and in
            nats, is at least this; with ``mixing_rate=1`` it is the whole gate. None: the rate alone.
        noise_scale: of "gaussian": the noise's size over the mix's (root mean square); None: 0.33, STHT's.
        moi_beta: of "moi": beta, at least 0, the weight of the sample over that of the distribution; None: 1.
        sampler: who draws the tokens of steps that are not mixed: "native", the trainer's or engine's own sampler, so
            that a rate of 0 is stock GRPO bit for bit, or "ngrpo", `decode_step`'s, keyed (seed, row, step) too.
        stop_token_ids: once one of these has been emitted (``</think>``, say) a sequence is no longer mixed.
        allowed_token_ids: tokens that may be returned as neighbours; ``None`` allows the whole table.
        loss_on_mixed_steps: ``False`` leaves the gated steps out of the loss: a forced anchor is not a draw from the
            policy. The paper keeps them.
        seed: key of the counter-based generator that draws the gates, the noise, and the tokens of sampler "ngrpo".

    Raises:
        ValueError: a value outside what is stated above; the message names the field.
    """

    k: int = None  # type: ignore[assignment]  # an int from __post_init__ on
    mixing_rate: float = 0.1
    temperature: float | None = None
    metric: Metric = "cosine"
    strategy: Strategy = "neighbor"
    variant: Variant = "paper"
    entropy_threshold: float | None = None
    noise_scale: float | None = None
    moi_beta: float | None = None
    sampler: Sampler = "native"
    stop_token_ids: Sequence[int] = ()
    allowed_token_ids: Sequence[int] | None = None
    loss_on_mixed_steps: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.k is None:
            object.__setattr__(self, "k", 1 if self.strategy == "anchor" else 3)
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k must be an integer of at least 1 (the anchor counts), got {self.k!r}")
        if not 0.0 <= self.mixing_rate <= 1.0:
            raise ValueError(f"mixing_rate must be within [0, 1], got {self.mixing_rate!r}")
        if self.temperature is not None and not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be positive and finite, or None, got {self.temperature!r}")
        choices = {"metric": Metric, "strategy": Strategy, "variant": Variant, "sampler": Sampler}
        for name, allowed in choices.items():
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {get_args(allowed)}, got {getattr(self, name)!r}")
        if self.strategy == "anchor" and self.k != 1:
            raise ValueError(f"k must be 1 for strategy 'anchor', or left out, got {self.k!r}")
        if self.strategy in OWN_WEIGHTS and self.variant == "released":
            raise ValueError(f"variant must be 'paper' for strategy {self.strategy!r}, got 'released'")
        for name in ("entropy_threshold", "noise_scale", "moi_beta"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ValueError(f"{name} must be a finite number of at least 0, or None, got {value!r}")
        if self.noise_scale is not None and self.strategy != "gaussian":
            raise ValueError(f"noise_scale is read by strategy 'gaussian' alone, got {self.noise_scale!r}")
        if self.moi_beta is not None and self.strategy != "moi":
            raise ValueError(f"moi_beta is read by strategy 'moi' alone, got {self.moi_beta!r}")
        for name in ("stop_token_ids", "allowed_token_ids"):
            tokens = getattr(self, name)
            if tokens is None and name == "allowed_token_ids":
                continue
            if not isinstance(tokens, Sequence) or any(not isinstance(t, int) or t < 0 for t in tokens):
                raise ValueError(f"{name} must be a list of token ids, none negative, got {tokens!r}")
            object.__setattr__(self, name, tuple(tokens))
        if self.allowed_token_ids is not None and self.strategy != "neighbor":
            raise ValueError(f"allowed_token_ids is read by strategy 'neighbor' alone, got strategy {self.strategy!r}")
        if self.allowed_token_ids is not None and len(set(self.allowed_token_ids)) < self.k:
            raise ValueError(
                f"allowed_token_ids must name at least k = {self.k} tokens, got {self.allowed_token_ids!r}"
            )
        if not isinstance(self.seed, int) or not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be an integer of 64 bits, got {self.seed!r}")
        if not isinstance(self.loss_on_mixed_steps, bool):
            raise ValueError(f"loss_on_mixed_steps must be True or False, got {self.loss_on_mixed_steps!r}")
        always = self.mixing_rate == 1 and self.entropy_threshold is None and not self.stop_token_ids
        if always and not self.loss_on_mixed_steps:
            raise ValueError("mixing_rate must be below 1 where loss_on_mixed_steps=False, or no token is in the loss")

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn here, and not by the trainer's or engine's own sampler alone."""
        return self.sampler == "ngrpo" or self.strategy in DRAWING

    def require_vocabulary(self, size: int) -> None:
        """
        Raises:
            ValueError: more candidates than a vocabulary of this size has, or token ids beyond it.
        """
        if self.k > size:
            raise ValueError(f"k must be at most the vocabulary size {size}, got {self.k}")
        for name in ("stop_token_ids", "allowed_token_ids"):
            beyond = [token for token in getattr(self, name) or () if token >= size]
            if beyond:
                raise ValueError(f"{name} must be below the vocabulary size {size}, got {beyond}")
