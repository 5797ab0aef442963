"""Runs in the trainer's process. The configuration: TRL's fields, and those of `MixingConfig` with a prefix."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields

from trl import GRPOConfig

from ngrpo_ops import MixingConfig
from ngrpo_ops.config import TOKEN_ID_FIELDS, described
from ngrpo_ops.tokens import read_excluded

TRAINER_FIELDS = {
    f.name: f.name if f.name in ("mixing_rate", "loss_on_mixed_steps") else f"mixing_{f.name}"
    for f in fields(MixingConfig)
}
"""The fields of `MixingConfig`, each with its name in `NGRPOConfig`."""

_DEFAULTS = {f.name: f.default for f in fields(MixingConfig)}


@dataclass
class NGRPOConfig(GRPOConfig):
    """`GRPOConfig` with the fields of N-GRPO. The help of `MixingConfig` explains each of them.

    The other fields and their defaults are TRL's. The mixing fields that are not None hold the resolved values
    afterwards, as plain Python data: `mixing_k`, `mixing_sampler` and `mixing_excluded_token_ids`, which may also be
    "none", and its ids strings, as a command line has them.

    On a command line and in a YAML file of TrlParser a number may be written in every way that Python reads it, as in
    ``1e-3``, which is a text to YAML. From Python a text is refused where a number is meant.

    Raises:
        ValueError: a mixing field has a value that is not allowed; the message names the field.

    Examples:
        >>> from ngrpo_ops.integrations.trl import NGRPOConfig
        >>> args = NGRPOConfig("out", use_cpu=True, bf16=False, seed=11, mixing_rate=0.2, mixing_strategy="anchor")
        >>> args.mixing_k
        1
        >>> mixing = args.mixing()
        >>> mixing.strategy, mixing.mixing_rate, mixing.seed
        ('anchor', 0.2, 11)
        >>> NGRPOConfig("out", use_cpu=True, bf16=False, mixing_metric="hamming")
        Traceback (most recent call last):
        ValueError: mixing_metric must be one of ('cosine', 'dot', 'l2', 'l1'), got 'hamming'
    """

    # The types are those that HfArgumentParser reads from a command line.
    mixing_k: int | None = described("k")
    mixing_rate: float = described("mixing_rate")
    mixing_temperature: float | None = described("temperature")
    mixing_metric: str = described("metric")
    mixing_strategy: str = described("strategy")
    mixing_variant: str = described("variant")
    mixing_entropy_threshold: float | None = described("entropy_threshold")
    mixing_noise_scale: float | None = described("noise_scale")
    mixing_moi_beta: float | None = described("moi_beta")
    mixing_sampler: str = described("sampler")
    mixing_seed: int | None = described("seed", None, "None: the trainer's `seed`.")
    mixing_stop_token_ids: list[int] | None = described("stop_token_ids", None, "None: no token.")
    mixing_allowed_token_ids: list[int] | None = described("allowed_token_ids")
    mixing_excluded_token_ids: list[str] | None = field(
        default_factory=lambda: ["special"],  # HfArgumentParser overlooks the default of a list without a factory
        metadata=described("excluded_token_ids", note="Here 'special' by default; 'none' is None.").metadata,
    )
    loss_on_mixed_steps: bool = described("loss_on_mixed_steps")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mixing_excluded_token_ids = read_excluded(self.mixing_excluded_token_ids)
        mixing = self.mixing()
        for name, ours in TRAINER_FIELDS.items():
            if name == "k" or getattr(self, ours) is not None:  # None still means the trainer's seed, or no token
                value = getattr(mixing, name)
                setattr(self, ours, list(value) if isinstance(value, tuple) else value)

    def mixing(self) -> MixingConfig:
        """The fields as a `MixingConfig`.

        Raises:
            ValueError: see the class.

        Examples:
            >>> from ngrpo_ops.integrations.trl import NGRPOConfig
            >>> NGRPOConfig("out", use_cpu=True, bf16=False, mixing_k=5, mixing_seed=7).mixing().seed
            7
        """
        values = {name: getattr(self, ours) for name, ours in TRAINER_FIELDS.items()}
        named = dict(TRAINER_FIELDS)
        if values["seed"] is None:
            values["seed"], named["seed"] = self.seed, "seed"
        for name in TOKEN_ID_FIELDS:
            if values[name] is None:
                values[name] = _DEFAULTS[name]
        try:
            with warnings.catch_warnings():
                # Of the sampler's old name. Python hides the warning outside the main module.
                warnings.filterwarnings("default", "sampler", DeprecationWarning)
                return MixingConfig(**values)
        except ValueError as error:
            name, space, message = str(error).partition(" ")  # the first word is the name of the field
            raise ValueError(f"{named.get(name, name)}{space}{message}") from error
