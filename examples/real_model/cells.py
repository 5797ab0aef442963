"""The cells of the rollout study: how each samples. What Countdown's arms say already is taken from there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ngrpo_ops import MixingConfig
from ngrpo_ops.strategies import get_strategy
from ngrpo_ops.tokens import special_rows

from ..countdown.arms import ARMS

SEED = 0  # of gates, noise and tokens


@dataclass(frozen=True)
class Cell:
    """One way to sample.

    Args:
        label: in tables and pictures.
        fields: of MixingConfig; rate 0: plain sampling.
        matched: the temperature is set so that the entropy of what is emitted is N-GRPO's.
        no_digits: digits are no neighbors.
    """

    label: str
    fields: dict[str, Any]
    matched: bool = False
    no_digits: bool = False

    def config(self, excluded: dict[str, list[int]]) -> MixingConfig:
        """The configuration. Tokens are drawn by our sampler, so that a row is the same in any batch.

        Args:
            excluded: token ids by name, see `excluded_tokens`.
        """
        fields = {"mixing_rate": 0.1, "k": 3} | self.fields
        if get_strategy(fields.get("strategy", "neighbor")).reads_neighbors and fields["mixing_rate"] > 0:
            fields["excluded_token_ids"] = excluded[self.excludes]
        return MixingConfig(sampler="counter_based", seed=SEED, **fields)

    @property
    def excludes(self) -> str:
        """Which of `excluded_tokens` are no neighbors."""
        return "digits" if self.no_digits else "special"

    @property
    def forces(self) -> bool:
        """Whether a mixed step emits the argmax, so that nothing is drawn there."""
        return self.fields.get("strategy", "neighbor") in ("neighbor", "topk", "gaussian")


def _of_arm(name: str, **fields: Any) -> Cell:
    arm = ARMS[name]
    mixing = {key.removeprefix("mixing_"): value for key, value in (arm.mixing or {"mixing_rate": 0.0}).items()}
    return Cell(arm.label, {"mixing_rate": mixing.pop("rate", 0.0)} | mixing | fields, matched=arm.matched)


CELLS = {
    "grpo": _of_arm("grpo"),
    "grpo_matched": _of_arm("grpo_matched"),
    "anchor": _of_arm("anchor"),
    "ngrpo": _of_arm("ngrpo"),
    "rate_0.05": _of_arm("rate_0.05"),
    "rate_0.3": _of_arm("rate_0.3"),
    "k_2": Cell("N-GRPO, k = 2", {"k": 2}),
    "k_8": Cell("N-GRPO, k = 8", {"k": 8}),
    "temperature_2": Cell("N-GRPO, mixing temperature 2", {"temperature": 2.0}),
    "temperature_4": Cell("N-GRPO, mixing temperature 4", {"temperature": 4.0}),
    "no_digits": Cell("N-GRPO, digits no neighbors", {}, no_digits=True),
    "topk": _of_arm("topk"),
    "gumbel": _of_arm("gumbel"),
    "gaussian": _of_arm("gaussian"),
    "moi": _of_arm("moi"),
    "multiplex": _of_arm("multiplex"),
}


def excluded_tokens(tokenizer: Any, table: torch.Tensor) -> dict[str, list[int]]:
    """Token ids that may be no neighbors: "special" as the word means in MixingConfig, "digits" those and digits.

    Args:
        table: [V, d], the input embeddings.
    """
    rows = special_rows(tokenizer, len(table))
    _, where, count = torch.unique(table, dim=0, return_inverse=True, return_counts=True)
    special = rows.beyond | rows.special | (count[where] > 1).cpu()
    digits = torch.tensor([kind_of(tokenizer.decode([i])) == "digit" for i in range(len(table))], device="cpu")
    return {
        "special": special.nonzero().flatten().tolist(),
        "digits": (special | digits).nonzero().flatten().tolist(),
    }


KINDS = ("word", "digit", "punctuation", "other")


def kind_of(text: str) -> str:
    """What a token is: a word, which has a letter; a digit, which has one and no letter; punctuation; or blank."""
    if any(character.isalpha() for character in text):
        return "word"
    if any(character.isdecimal() for character in text):
        return "digit"
    return "punctuation" if text.strip() else "other"
