"""What the studies of the examples share: pass@k, intervals over problems, the temperature of an entropy, tables.

The benchmarks take the commit from here.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

TEMPERATURE_TOLERANCE = 0.002  # of matched entropies, relative


def commit() -> str:
    """The commit of this checkout, and whether something was changed since; "unknown" without git."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" and changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def pass_at_k(samples: int, correct: np.ndarray, k: int) -> np.ndarray:
    """The unbiased estimator 1 - C(n - c, k) / C(n, k) of each problem, as a product that cannot overflow.

    Args:
        samples: n, at least k.
        correct: int [problems], c of the n samples that are right.
        k: attempts.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must be within [1, {samples}], the samples of a problem, got {k}")
    miss = np.ones(len(correct))
    for i in range(k):
        miss *= np.clip(samples - correct - i, 0, None) / (samples - i)
    return 1.0 - miss


def usable_groups(right: np.ndarray, group: int) -> float:
    """The share of groups of `group` samples, of bool [problems, samples], in which some are right and some are not."""
    samples = right.shape[1]
    groups = right[:, : samples - samples % group].reshape(-1, group)
    return float((groups.any(-1) & ~groups.all(-1)).mean())


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean over problems."""
    draws = np.random.default_rng(seed).integers(len(values), size=(2000, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


class Estimate(NamedTuple):
    """A value and its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def estimate(value: float, draws: np.ndarray, level: float = 0.95) -> Estimate:
    """The value with the percentile interval of its bootstrap draws."""
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, float(low), float(high))


def temperature_of_entropy(
    entropy_at: Callable[[float], float],
    wanted: float,
    within: tuple[float, float] = (0.5, 1.5),
    tolerance: float = TEMPERATURE_TOLERANCE,
) -> tuple[float, float]:
    """The temperature at which sampling has an entropy, by bisection; and the entropy found there.

    Args:
        entropy_at: the entropy at a temperature, which it rises with.
        wanted: the entropy.
        within: the lowest and the highest temperature that are tried.
        tolerance: of the entropy, relative.

    Raises:
        RuntimeError: no temperature within the bounds has it.
    """
    low, high = within
    while True:
        middle = (low + high) / 2
        found = entropy_at(middle)
        inside = within[0] + 1e-3 < middle < within[1] - 1e-3
        if abs(found / wanted - 1) < tolerance or (high - low < 1e-4 and inside):  # few rollouts: it jumps
            return middle, found
        if high - low < 1e-4:
            raise RuntimeError(
                f"no temperature within [{within[0]:g}, {within[1]:g}] has the entropy of N-GRPO, {wanted:.3f} nats"
            )
        low, high = (middle, high) if found < wanted else (low, middle)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as Markdown has it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
