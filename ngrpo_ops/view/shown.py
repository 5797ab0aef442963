"""What is shown of some rollouts of one prompt, as plain data."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Controls, formats (which turn the direction of what follows), surrogates, private and unassigned characters, and the
# separators that break a line. Zero-width joiner and non-joiner shape letters and emoji, and stay.
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
_KEPT = "\n\u200c\u200d"


class Candidate(NamedTuple):
    """A token of a mix: its text, its id and its weight."""

    text: str
    token_id: int
    weight: float


@dataclass(frozen=True)
class Token:
    """An emitted token, and what the model was fed in its place.

    Attributes:
        text: what it adds to the text of its row.
        candidates: of a mixed step, the emitted one first; else empty.
        cosine: cos(mix, anchor) of a mixed step.
    """

    text: str
    candidates: tuple[Candidate, ...] = ()
    cosine: float | None = None

    @property
    def mixed_in(self) -> float:
        """The weight of the other tokens in the mix; 0 of a step that was not mixed."""
        if not self.candidates:
            return 0.0
        anchor = self.candidates[0].token_id
        return sum(c.weight for c in self.candidates if c.token_id != anchor)


@dataclass(frozen=True)
class Arm:
    """Rollouts of one setting.

    Attributes:
        name: "N-GRPO", say.
        samples: the tokens of each, the end token counted.
        replay_error: the largest |difference| of a rollout's log-probability and its replay's, NaN of nothing.
        plain_error: the same where the emitted tokens are read and not the mixes; None: not computed.
        noise: the noise on every mix, over the size of the mix; None: none.
    """

    name: str
    samples: tuple[tuple[Token, ...], ...]
    replay_error: float
    plain_error: float | None = None
    noise: float | None = None

    @property
    def mixed(self) -> list[Token]:
        """The tokens of mixed steps, of all samples."""
        return [token for sample in self.samples for token in sample if token.candidates]

    def summary(self) -> str:
        """Its figures in a line.

        Examples:
            >>> from ngrpo_ops.view import Arm, Candidate, Token
            >>> mixed = Token("7", (Candidate("7", 9, 0.75), Candidate("6", 8, 0.25)), 0.98)
            >>> Arm("N-GRPO", ((Token("="), mixed),), replay_error=2e-6).summary()
            '1 of 2 tokens mixed; cosine with the anchor: mean 0.9800, least 0.9800; replay error 2.0e-06'
        """
        count, mixed = sum(map(len, self.samples)), self.mixed
        parts = [f"{len(mixed)} of {count} tokens mixed" if mixed else f"{count} tokens, none mixed"]
        cosines = [token.cosine for token in mixed if token.cosine is not None]
        if cosines:
            parts.append(f"cosine with the anchor: mean {sum(cosines) / len(cosines):.4f}, least {min(cosines):.4f}")
        plain = "" if self.plain_error is None else f" ({self.plain_error:.2g} with plain ids)"
        parts.append(f"replay error {self.replay_error:.1e}{plain}")
        return "; ".join(parts)


@dataclass(frozen=True)
class Rollouts:
    """Rollouts of one prompt in several settings, each with as many samples.

    Attributes:
        model: its path or name.
        prompt: as the user gave it.
        settings: what all arms share, by name.
        arms: in the order they are shown.
        notes: what a reader must know beside the figures, a sentence each.
    """

    model: str
    prompt: str
    settings: dict[str, str]
    arms: tuple[Arm, ...]
    notes: Sequence[str] = ()


def visible(text: str) -> str:
    r"""A text in which every character is seen: controls, and what would turn or hide other text, as escapes.

    A line feed stays. A terminal does nothing else than print the result, and it can be encoded.

    Examples:
        >>> from ngrpo_ops.view import visible
        >>> print(visible("a\x1b[31m\t\u202eb"))
        a\x1b[31m\t\u202eb
    """
    return "".join(
        c if c in _KEPT or unicodedata.category(c) not in _HIDDEN else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def quoted(text: str) -> str:
    r"""The text of a token on one line, in quotes that show its spaces.

    Examples:
        >>> from ngrpo_ops.view.shown import quoted
        >>> print(quoted(" the"), quoted("\n"))
        ' the' '\n'
    """
    return "'" + visible(text).replace("\n", "\\n") + "'"
