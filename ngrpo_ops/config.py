"""What a user chooses: one frozen configuration, read by every adapter. A field says everything about itself once."""

from __future__ import annotations

import inspect
import math
import numbers
import operator
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from ._messages import shown
from .ops._checks import LEAST_POSITIVE
from .random import drawn_words
from .strategies import Strategy, get_strategy, load_strategy

Metric = Literal["cosine", "dot", "l2", "l1"]
Variant = Literal["paper", "released"]
Sampler = Literal["native", "counter_based"]

_OLD_SAMPLERS = {"ngrpo": "counter_based"}  # called so until 0.6

_LARGEST = 1e30  # what float32 divides logits by without underflow
_SURE = 1e-6  # nats: a policy of less entropy has one token, whose gradient is nothing
_HIGHEST = math.log(2**31)  # the entropy that no policy exceeds, as token ids are below 2^31
_ALL_SAMPLE = 1e6  # a larger moi_beta leaves the rest of the mix no weight that bfloat16 or float32 would see


@dataclass(frozen=True)
class Range:
    """The numbers that a field may have."""

    least: float
    most: float

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most

    def __str__(self) -> str:
        return f"within [{self.least:g}, {self.most:g}]"


def plain_number(value: Any) -> float | None:
    """A real number, numpy's too, as a float, infinite where it is too large; None for anything else, True too."""
    if isinstance(value, (bool, str)) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an int, of either sign: no range takes it
        return math.inf


def plain_integer(value: Any) -> int | None:
    """An integer, numpy's too, as an int; None for anything else, True and 3.0 too."""
    return None if isinstance(value, bool) or not isinstance(value, numbers.Integral) else operator.index(value)


def plain_ids(value: Any) -> tuple[int, ...] | None:
    """Token ids as a tuple: of a list, a tuple, a range, or a numpy array or tensor of integers in one dimension.

    None for anything else: for a text, whose characters would be taken apart, for a set, which has no order, and for
    a generator, which would be empty when it is read again.
    """
    if isinstance(value, (np.ndarray, Tensor)):
        value = value.tolist()
    if isinstance(value, (str, bytes, bytearray)) or not isinstance(value, Sequence):
        return None
    ids = [plain_integer(one) for one in value]
    return None if any(one is None or not 0 <= one < 2**31 for one in ids) else tuple(ids)  # type: ignore[arg-type]


def _advice(value: Any) -> str:
    """What to write in the place of a number that is a text. Command lines are parsed: it comes from Python or YAML."""
    try:
        number = float(value) if isinstance(value, str) else math.nan
    except ValueError:
        number = math.nan
    return "" if math.isnan(number) else ", a text: write numbers without quotes, in YAML with a point (1.0e-3)"


def _field(default: Any, help: str, **metadata: Any) -> Any:
    """A field with its help and what it may hold: range, choices, integers (in words, and as a range), or token_ids
    and words that stand for a list of them."""
    return field(default=default, metadata={"help": help, **metadata})


def _option_help(strategy: str, option: str) -> str:
    found = get_strategy(strategy).options[option]
    return f"Of strategy '{strategy}': {found.help}. None: {found.default:g}."


def _documented(cls: type) -> type:
    """The class with the help of its fields in its docstring."""
    lines = [
        textwrap.fill(f"{f.name}: {f.metadata['help']}", 116, initial_indent=" " * 4, subsequent_indent=" " * 8)
        for f in fields(cls)
    ]
    doc = inspect.cleandoc(cls.__doc__ or "")  # from Python 3.13 on it is dedented already
    cls.__doc__ = doc.replace("Raises:", "\n".join(["Args:", *lines, "", "Raises:"]), 1)
    return cls


@_documented
@dataclass(frozen=True)
class MixingConfig:
    """How a rollout mixes. The defaults are those of the paper (arXiv 2606.10768, table 6).

    numpy's numbers, arrays of token ids and tensors of them are taken, and kept as plain Python data. Texts of numbers
    are not.

    Raises:
        ValueError: a value that its field does not allow, or fields with which nothing would be mixed or trained; the
            message names the field.

    Examples:
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
        integers=("an integer of at least 1 (the anchor counts)", range(1, 2**31)),
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
        range=Range(LEAST_POSITIVE, _LARGEST),
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
        "least this. With a mixing rate of 1 it is the whole gate. None: the rate alone. It must be below log(V), "
        "which no policy over V tokens exceeds.",
        range=Range(0, _HIGHEST),
    )
    noise_scale: float | None = _field(None, _option_help("gaussian", "noise_scale"), range=Range(0, _LARGEST))
    moi_beta: float | None = _field(None, _option_help("moi", "moi_beta"), range=Range(0, _ALL_SAMPLE))
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
        token_ids=True,
    )
    allowed_token_ids: Sequence[int] | None = _field(
        None,
        "Tokens that may be neighbors. None: the whole table.",
        token_ids=True,
    )
    excluded_token_ids: Sequence[int] | Literal["special"] | None = _field(
        None,
        "Tokens that may not be neighbors, also where they are allowed. 'special': what stands for no text: rows "
        "beyond the tokenizer, special and reserved tokens, and rows equal to another row, which were never trained. "
        "None: no token.",
        token_ids=True,
        words=("special",),
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
        integers=("an integer of 64 bits", range(-(2**63), 2**63)),
    )

    def __post_init__(self) -> None:
        strategy = load_strategy(self.strategy)
        self._set("strategy", str.__str__(self.strategy))  # numpy's and an enum's, too, are texts
        if self.k is None:
            self._set("k", 3 if strategy.fixed_k is None else strategy.fixed_k)
        self._rename_sampler(stacklevel=4)
        for one in fields(self):
            self._set(one.name, self._checked(one, getattr(self, one.name)))
        if strategy.fixed_k not in (None, self.k):
            raise ValueError(
                f"k must be {strategy.fixed_k} for strategy {self.strategy!r}, or left out, got {self.k!r}"
            )
        if self.variant == "released" and not strategy.softmax_of_logits:
            raise ValueError(f"variant must be 'paper' for strategy {self.strategy!r}, got 'released'")
        strategy.option_values(self.options)
        self._check_allowed(strategy)
        self._check_effect()

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

    def _checked(self, one: Field, value: Any) -> Any:
        """The value of a field as plain Python data, so that a configuration is hashed, compared and written as JSON.

        Raises:
            ValueError: another type, or out of range. A text that is a number is refused too: parsers of command lines
                have read theirs, and whoever else passes a text should know of it.
        """
        if value is None and one.default is None:
            return None
        words = one.metadata.get("words", ())
        if isinstance(value, str) and value in words:
            return str.__str__(value)
        choices, allowed = one.metadata.get("choices"), one.metadata.get("range")
        found: Any = None
        if choices is not None:
            expected = f"one of {choices}"
            found = str.__str__(value) if isinstance(value, str) and value in choices else None
        elif allowed is not None:
            expected, number = str(allowed), plain_number(value)
            found = number if number is not None and number in allowed else None
        elif one.metadata.get("token_ids"):
            expected = "".join(f"{word!r} or " for word in words) + "a list of token ids, integers in [0, 2^31)"
            found = plain_ids(value)
        elif isinstance(one.default, bool):
            expected, found = "True or False", bool(value) if isinstance(value, (bool, np.bool_)) else None
        elif one.metadata.get("integers"):
            (expected, integers), whole = one.metadata["integers"], plain_integer(value)
            found = whole if whole is not None and whole in integers else None
        else:
            return value
        if found is None:
            optional = ", or None" if one.default is None else ""
            raise ValueError(f"{one.name} must be {expected}{optional}, got {shown(value)}{_advice(value)}")
        return found

    def _check_allowed(self, strategy: Strategy) -> None:
        for name in ("allowed_token_ids", "excluded_token_ids"):
            if isinstance(getattr(self, name), tuple) and not strategy.reads_neighbors:
                raise ValueError(f"{name} is read by strategies with neighbors alone, got strategy {self.strategy!r}")
        if self.allowed_token_ids is None:
            return
        if len(set(self.allowed_token_ids)) < self.k:
            raise ValueError(
                f"allowed_token_ids must name at least k = {self.k} tokens, got {shown(self.allowed_token_ids)}"
            )
        if isinstance(self.excluded_token_ids, tuple):
            require_candidates(self, len(set(self.allowed_token_ids) - set(self.excluded_token_ids)))

    def _check_effect(self) -> None:
        """Refuses settings under which nothing would be mixed, or nothing trained. A rate of 0 is meant: it is GRPO.

        What depends on the vocabulary is in `require_vocabulary`.
        """
        drawn = drawn_words(self.mixing_rate)
        if drawn == 0 and self.mixing_rate != 0:
            raise ValueError(
                "mixing_rate must be 0 or more than 2^-33, the resolution of the gates, got "
                f"{self.mixing_rate!r}, which never mixes"
            )
        every = drawn == 2**32 and (self.entropy_threshold or 0.0) < _SURE and not self.stop_token_ids
        if every and not self.loss_on_mixed_steps:
            threshold = "" if self.entropy_threshold is None else f" and entropy_threshold={self.entropy_threshold!r}"
            raise ValueError(
                f"mixing_rate must be below 1 where loss_on_mixed_steps=False{threshold}, or no token is in the loss, "
                f"got {self.mixing_rate!r}"
            )

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
            ValueError: more candidates than a vocabulary of this size has, token ids beyond it, or an entropy threshold
                that no policy over it reaches.
        """
        if self.k > size:
            raise ValueError(f"k must be at most the vocabulary size {size}, got {self.k}")
        for name in TOKEN_ID_FIELDS:
            tokens = getattr(self, name)
            beyond = [token for token in tokens if token >= size] if isinstance(tokens, tuple) else []
            if beyond:
                raise ValueError(f"{name} must be below the vocabulary size {size}, got {shown(beyond)}")
        threshold = self.entropy_threshold
        # At log(V) itself only a policy of equal logits is mixed. At a rate of 0 the threshold is not read.
        if threshold is not None and self.mixing_rate > 0 and threshold >= math.log(size) > 0:
            raise ValueError(
                f"entropy_threshold must be below log({size}) = {math.log(size):.4g}, the largest entropy of a policy "
                f"over {size} tokens, got {threshold!r}: nothing would be mixed"
            )


TOKEN_ID_FIELDS = tuple(one.name for one in fields(MixingConfig) if one.metadata.get("token_ids"))
"""The fields of `MixingConfig` that hold lists of token ids."""


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
