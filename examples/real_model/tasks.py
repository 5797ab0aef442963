"""What the model is asked: one-digit problems in words, made here, or a task of reasoning-gym by name.

The word problems need no package, and SmolLM2 solves some of them. reasoning-gym has a hundred tasks, each with a
scorer of its own: `pip install reasoning-gym`, which builds some of its dependencies and so is needed for it alone.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any, Protocol

WORD_PROBLEMS = "word_problems"

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_NAMES = ("Tom", "Anna", "Ben", "Maria", "Sam", "Julia", "Omar", "Lucy", "Kenji", "Ravi", "Elena", "Noah")
_ITEMS = ("apples", "pencils", "marbles", "stickers", "cookies", "shells", "coins", "books", "cards", "flowers")
_GAINS = (
    "{name} has {a} {items} and buys {b} more.",
    "{name} has {a} {items} and finds {b} more.",
    "{name} had {a} {items} and was given {b} more.",
    "{name} picked {a} {items} in the morning and {b} in the evening.",
)
_HOLDERS = (
    "{name} has {a} bags with {b} {items} in each.",
    "{name} has {a} boxes of {b} {items} each.",
    "{name} fills {a} jars with {b} {items} each.",
    "{name} gets {b} {items} from each of {a} friends.",
)


@dataclass(frozen=True)
class Problem:
    """A prompt, the right answer as a text, and what the task's scorer needs beside it."""

    prompt: str
    answer: str
    entry: Any = None


class Task(Protocol):
    """What a study needs of a task."""

    name: str

    def problems(self, count: int, seed: int) -> list[Problem]:
        """`count` problems, the same ones for the same seed."""
        ...

    def answer(self, text: str) -> str | None:
        """What a completion answers; None: nothing."""
        ...

    def is_right(self, answer: str | None, problem: Problem) -> bool:
        """Whether the answer solves the problem."""
        ...


def last_number(text: str) -> str | None:
    """The last number of a text in one form: 1,200.0 is 1200. None: there is none.

    Examples:
        >>> last_number("3 + 5 = 8.0 apples.")
        '8'
    """
    found = _NUMBER.findall(text)
    return f"{float(found[-1].replace(',', '')):.12g}" if found else None


class WordProblems:
    """Sums and products of two one-digit numbers, in turn, in words. The last number of a completion is its answer."""

    name = WORD_PROBLEMS

    def problems(self, count: int, seed: int) -> list[Problem]:
        """No two are the same.

        Raises:
            ValueError: more than there are.
        """
        most = 2 * len(_NAMES) * len(_ITEMS) * len(_GAINS) * 64 // 4
        if count > most:
            raise ValueError(f"count must be at most {most} word problems, got {count}")
        draw = random.Random(f"{WORD_PROBLEMS} {seed}")
        made: dict[str, Problem] = {}
        while len(made) < count:
            sum_of_two = len(made) % 2 == 0
            a, b = draw.randint(2, 9), draw.randint(2, 9)
            words = {"name": draw.choice(_NAMES), "items": draw.choice(_ITEMS), "a": a, "b": b}
            story = draw.choice(_GAINS if sum_of_two else _HOLDERS).format(**words)
            prompt = f"{story} How many {words['items']} does {words['name']} have? Answer in one short sentence."
            made.setdefault(prompt, Problem(prompt, str(a + b if sum_of_two else a * b)))
        return list(made.values())

    def answer(self, text: str) -> str | None:
        return last_number(text)

    def is_right(self, answer: str | None, problem: Problem) -> bool:
        return answer == problem.answer


class ReasoningGym:
    """A task of reasoning-gym, by the name that it has there.

    A completion answers with its last number where the right answer is one, else with its last line.

    Raises:
        ValueError: reasoning-gym is not installed, or has no task of this name.
    """

    def __init__(self, name: str) -> None:
        try:
            import reasoning_gym
        except ImportError as error:
            raise ValueError(
                f"task {name!r} must be {WORD_PROBLEMS!r} or a task of reasoning-gym, which is not installed: "
                "pip install reasoning-gym"
            ) from error
        known = sorted(reasoning_gym.factory.DATASETS)
        if name not in known:
            raise ValueError(f"task must be {WORD_PROBLEMS!r} or one of {', '.join(known)}, got {name!r}")
        self.name, self._gym = name, reasoning_gym
        self._dataset: Any = None
        self._numbers = False

    def problems(self, count: int, seed: int) -> list[Problem]:
        self._dataset = self._gym.create_dataset(self.name, size=count, seed=seed)
        made = [Problem(entry["question"], str(entry["answer"]), entry) for entry in self._dataset]
        self._numbers = all(_NUMBER.fullmatch(problem.answer) for problem in made)
        return made

    def answer(self, text: str) -> str | None:
        if self._numbers:
            return last_number(text)
        lines = text.strip().splitlines()
        return lines[-1].rpartition(":")[2].strip() if lines else None

    def is_right(self, answer: str | None, problem: Problem) -> bool:
        return float(self._dataset.score_answer(answer=answer, entry=problem.entry)) >= 1.0


def task_named(name: str) -> Task:
    """The task of this name.

    Raises:
        ValueError: see `ReasoningGym`.
    """
    return WordProblems() if name == WORD_PROBLEMS else ReasoningGym(name)
