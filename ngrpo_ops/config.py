"""What a user chooses: one frozen configuration, read by every adapter. A field says everything about itself once."""

from __future__ import annotations

import math
import numbers
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, get_args

from .strategies import Strategy, get_strategy, load_strategy

Metric = Literal["cosine", "dot", "l2", "l1"]
Variant = Literal["paper", "released"]
Sampler = Literal["native", "counter_based"]

_OLD_SAMPLERS = {"ngrpo": "counter_based"}  # called so until 0.6


@dataclass(frozen=True)
class Range:
    """The numbers that a field may have."""

    least: float = -math.inf
    most: float = math.inf
    includes_least: bool = True

    def __contains__(self, value: Any) -> bool:
        above = self.least <= value if self.includes_least else self.least < value
        return above and value <= self.most and math.isfinite(value)

    def __str__(self) -> str:
        if self.most != math.inf:
            return f"within {'[' if self.includes_least else '('}{self.least:g}, {self.most:g}]"
        return "positive and finite" if not self.includes_least else f"a finite number of at least {self.least:g}"


def _field(default: Any, help: str, **metadata: Any) -> Any:
    """A field with its help and, where it has one, its range or its choices."""
    return field(default=default, metadata={"help": help, **metadata})


def _option_help(strategy: str, option: str) -> str:
    found = get_strategy(strategy).options[option]
    return f"Of strategy '{strategy}': {found.help}. None: {found.default:g}."


def _documented(cls: type) -> type:
    """The class with the help of its fields in its docstring."""
    lines = [
        textwrap.fill(f"{f.name}: {f.metadata['help']}", 120, initial_indent=" " * 8, subsequent_indent=" " * 12)
        for f in fields(cls)
    ]
    cls.__doc__ = (cls.__doc__ or "").replace("    Raises:", "\n".join(["    Args:", *lines, "", "    Raises:"]), 1)
    return cls


@_documented
@dataclass(frozen=True)
class MixingConfig:
    """How a rollout mixes. The defaults are those of the paper (arXiv 2606.10768, table 6).

    Raises:
        ValueError: a value that its field does not allow; the message names the field.

    Example:
        >>> from ngrpo_ops import MixingConfig
        >>> MixingConfig(strategy="anchor").k
        1
        >>> MixingConfig(mixing_rate=2.0)
        Traceback (most recent call last):
        ValueError: mixing_rate must be within [0, 1], got 2.0
    """

    k: int = _field(
        None,
        "Candidates that a mixed step combines, the anchor counted (the paper's k). 1 emits the anchor alone: the "
        "control that separates 'argmax on a fraction of the steps' from mixing; it needs no neighbor table. None: "
        "3, or 1 for strategy 'anchor'.",
    )
    mixing_rate: float = _field(
        0.1,
        "Probability rho that a step is mixed, drawn for every sequence and step (section 3.3). 0 is GRPO.",
        range=Range(0, 1),
    )
    temperature: float | None = _field(
        None,
        "Temperature tau of the mixing weights (equations 2 and 9). None: the rollout's own temperature, 1 for a "
        "greedy rollout. For 'gumbel' it divides the noised log-probabilities, which are those of the rollout's "
        "temperature.",
        range=Range(0, includes_least=False),
    )
    metric: Metric = _field(
        "cosine",
        "Similarity by which the neighbors are chosen: 'cosine' (the paper), 'dot', 'l2' or 'l1'.",
        choices=get_args(Metric),
    )
    strategy: str = _field(
        "neighbor",
        "What is mixed, and what a mixed step emits: 'neighbor' (N-GRPO: the anchor and its nearest "
        "neighbors in the input embedding table), 'topk' (Soft Thinking), 'gumbel' (SofT-GRPO), 'gaussian' (STHT), "
        "'moi' (Mixture of Inputs), 'multiplex' (Multiplex Thinking), 'anchor' (nothing: the control), or "
        "'package.module:function', a strategy of your own. 'gumbel' emits its heaviest candidate, 'moi' and "
        "'multiplex' the sample, the others of ours the argmax.",
    )
    variant: Variant = _field(
        "paper",
        "Weights: 'paper', or 'released', those that the published code really applies: a softmax over the "
        "candidates' probabilities where the paper takes their logits. The rest is the paper's.",
        choices=get_args(Variant),
    )
    entropy_threshold: float | None = _field(
        None,
        "A step is mixed only where the entropy of the policy, at the rollout's temperature and in nats, is at "
        "least this. With a mixing rate of 1 it is the whole gate. None: the rate alone.",
        range=Range(0),
    )
    noise_scale: float | None = _field(None, _option_help("gaussian", "noise_scale"), range=Range(0))
    moi_beta: float | None = _field(None, _option_help("moi", "moi_beta"), range=Range(0))
    sampler: Sampler = _field(
        "native",
        "Who draws the tokens of steps that are not mixed: 'native', the trainer's or engine's own sampler, "
        "so that a rate of 0 is stock GRPO bit for bit, or 'counter_based', the sampler of decode_step, keyed by "
        "seed, row and step.",
        choices=get_args(Sampler),
    )
    stop_token_ids: Sequence[int] = _field(
        (),
        "Once a sequence has emitted one of these tokens (</think>, say) it is no longer mixed.",
    )
    allowed_token_ids: Sequence[int] | None = _field(
        None,
        "Tokens that may be neighbors. None: the whole table.",
    )
    excluded_token_ids: Sequence[int] | Literal["special"] | None = _field(
        None,
        "Tokens that may not be neighbors, also where they are allowed. 'special': what stands for no text: rows "
        "beyond the tokenizer, special and reserved tokens, and rows equal to another row, which were never trained. "
        "None: no token.",
    )
    loss_on_mixed_steps: bool = _field(
        True,
        "Whether the tokens of mixed steps enter the loss. A forced anchor is not a draw from the policy. The paper "
        "keeps them.",
    )
    seed: int = _field(
        0,
        "Key of the counter-based generator that draws the gates, the noise, and the tokens of sampler "
        "'counter_based'.",
    )

    def __post_init__(self) -> None:
        strategy = load_strategy(self.strategy)
        if self.k is None:
            self._set("k", 3 if strategy.fixed_k is None else strategy.fixed_k)
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k must be an integer of at least 1 (the anchor counts), got {self.k!r}")
        self._rename_sampler(stacklevel=4)
        for one in fields(self):
            self._check_range(one)
        if strategy.fixed_k not in (None, self.k):
            raise ValueError(
                f"k must be {strategy.fixed_k} for strategy {self.strategy!r}, or left out, got {self.k!r}"
            )
        if self.variant == "released" and not strategy.softmax_of_logits:
            raise ValueError(f"variant must be 'paper' for strategy {self.strategy!r}, got 'released'")
        strategy.option_values(self.options)
        self._check_tokens(strategy)
        if not isinstance(self.seed, int) or not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be an integer of 64 bits, got {self.seed!r}")
        if not isinstance(self.loss_on_mixed_steps, bool):
            raise ValueError(f"loss_on_mixed_steps must be True or False, got {self.loss_on_mixed_steps!r}")
        always = self.mixing_rate == 1 and self.entropy_threshold is None and not self.stop_token_ids
        if always and not self.loss_on_mixed_steps:
            raise ValueError("mixing_rate must be below 1 where loss_on_mixed_steps=False, or no token is in the loss")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A configuration that comes from another process imports its strategy here too."""
        self.__dict__.update(state)
        self._rename_sampler(stacklevel=3)
        load_strategy(self.strategy)

    def _rename_sampler(self, stacklevel: int) -> None:
        if isinstance(self.sampler, str) and self.sampler in _OLD_SAMPLERS:
            new = _OLD_SAMPLERS[self.sampler]
            warnings.warn(f"sampler {self.sampler!r} is called {new!r} now", DeprecationWarning, stacklevel=stacklevel)
            self._set("sampler", new)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen

    def _check_range(self, one: Field) -> None:
        value, choices, allowed = getattr(self, one.name), one.metadata.get("choices"), one.metadata.get("range")
        if choices is not None and value not in choices:
            raise ValueError(f"{one.name} must be one of {choices}, got {value!r}")
        if allowed is None or (value is None and one.default is None):
            return
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or value not in allowed:
            optional = ", or None" if one.default is None else ""
            raise ValueError(f"{one.name} must be {allowed}{optional}, got {value!r}")

    def _check_tokens(self, strategy: Strategy) -> None:
        words: dict[str, tuple] = {"allowed_token_ids": (None,), "excluded_token_ids": (None, "special")}
        for name in ("stop_token_ids", "allowed_token_ids", "excluded_token_ids"):
            tokens = getattr(self, name)
            if (tokens is None or isinstance(tokens, str)) and tokens in words.get(name, ()):
                continue
            if not isinstance(tokens, Sequence) or any(not isinstance(t, int) or t < 0 for t in tokens):
                special = "'special', None or " if name == "excluded_token_ids" else ""
                raise ValueError(f"{name} must be {special}a list of token ids, none negative, got {tokens!r}")
            self._set(name, tuple(tokens))
            if name in words and not strategy.reads_neighbors:
                raise ValueError(f"{name} is read by strategies with neighbors alone, got strategy {self.strategy!r}")
        if self.allowed_token_ids is None:
            return
        if len(set(self.allowed_token_ids)) < self.k:
            raise ValueError(
                f"allowed_token_ids must name at least k = {self.k} tokens, got {self.allowed_token_ids!r}"
            )
        if isinstance(self.excluded_token_ids, tuple):
            require_candidates(self, len(set(self.allowed_token_ids) - set(self.excluded_token_ids)))

    @property
    def options(self) -> dict[str, float | None]:
        """The options of the strategies, None where they are not given."""
        return {"noise_scale": self.noise_scale, "moi_beta": self.moi_beta}

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn here, and not by the trainer's or engine's own sampler alone."""
        return self.sampler == "counter_based" or get_strategy(self.strategy).reads_filters

    def require_vocabulary(self, size: int) -> None:
        """
        Raises:
            ValueError: more candidates than a vocabulary of this size has, or token ids beyond it.
        """
        if self.k > size:
            raise ValueError(f"k must be at most the vocabulary size {size}, got {self.k}")
        for name in ("stop_token_ids", "allowed_token_ids", "excluded_token_ids"):
            tokens = getattr(self, name)
            beyond = [token for token in tokens or () if tokens != "special" and token >= size]
            if beyond:
                raise ValueError(f"{name} must be below the vocabulary size {size}, got {beyond}")


def require_candidates(config: MixingConfig, count: int) -> None:
    """
    Args:
        count: the tokens that allowed_token_ids and excluded_token_ids leave.

    Raises:
        ValueError: fewer than the candidates of a mix.
    """
    if count < config.k:
        raise ValueError(
            f"allowed_token_ids without excluded_token_ids must leave at least k = {config.k} tokens, got {count}"
        )


def described(name: str, default: Any = MISSING, note: str = "") -> Any:
    """A dataclass field with the default and the help of `MixingConfig`'s field `name`, for a trainer's own config.

    Args:
        name: the field of `MixingConfig`.
        default: the default where the trainer's differs.
        note: a sentence after the help, which explains that default.
    """
    one = {f.name: f for f in fields(MixingConfig)}[name]
    text = f"{one.metadata['help']} {note}".rstrip()
    return field(default=one.default if default is MISSING else default, metadata={"help": text})
