"""Countdown: given numbers and a target, use each number at most once and hit the target.

A solution is written as one equation, or as steps in words.
"""

from __future__ import annotations

import ast
import operator
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

OPERATORS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}
LARGEST = 99  # integers 0 .. 99 are single tokens
_NODES = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}

Tree = Any  # an int, or (operator, Tree, Tree)


@dataclass(frozen=True)
class Problem:
    """Numbers in the order they are shown, and the target."""

    numbers: tuple[int, ...]
    target: int

    @property
    def key(self) -> tuple[tuple[int, ...], int]:
        """What makes two problems the same: the multiset of numbers, and the target."""
        return tuple(sorted(self.numbers)), self.target

    @property
    def prompt(self) -> str:
        return f"{' '.join(map(str, self.numbers))} -> {self.target} :"


def parse(text: str) -> Tree | None:
    """The tree of an equation over the task's tokens, or None if it is not one."""
    tokens = text.split()
    if not tokens or not all(token in OPERATORS or token in "()" or token.isdecimal() for token in tokens):
        return None
    try:
        return _tree(ast.parse(" ".join(tokens), mode="eval").body)
    except (SyntaxError, ValueError):
        return None


def _tree(node: ast.AST) -> Tree:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _NODES:
        return _NODES[type(node.op)], _tree(node.left), _tree(node.right)
    raise ValueError("not an equation of this task")  # a sign, a call, a tuple


def evaluate(tree: Tree) -> int:
    return tree if isinstance(tree, int) else OPERATORS[tree[0]](evaluate(tree[1]), evaluate(tree[2]))


def leaves(tree: Tree) -> list[int]:
    return [tree] if isinstance(tree, int) else leaves(tree[1]) + leaves(tree[2])


def normal_form(tree: Tree) -> str:
    """Equal for equations that differ only in the order or grouping of sums and of products: 1 + 2 and 2 + 1."""
    if not isinstance(tree, tuple):
        return str(tree)
    if tree[0] == "*":
        return "*".join(sorted(f"({normal_form(factor)})" for factor in _factors(tree)))
    return "".join(sorted(f"{sign}({normal_form(term)})" for sign, term in _terms(tree, "+")))


def _factors(tree: Tree) -> Iterator[Tree]:
    if not isinstance(tree, tuple) or tree[0] != "*":
        yield tree
    else:
        yield from _factors(tree[1])
        yield from _factors(tree[2])


def _terms(tree: Tree, sign: str) -> Iterator[tuple[str, Tree]]:
    if not isinstance(tree, tuple) or tree[0] == "*":
        yield sign, tree
    else:
        yield from _terms(tree[1], sign)
        yield from _terms(tree[2], sign if tree[0] == "+" else {"+": "-", "-": "+"}[sign])


def render(tree: Tree) -> str:
    """The equation in tokens, with the parentheses it needs."""
    if isinstance(tree, int):
        return str(tree)
    symbol, left, right = tree
    loose = ("+", "-")
    left_text, right_text = render(left), render(right)
    if symbol == "*" and not isinstance(left, int) and left[0] in loose:
        left_text = f"( {left_text} )"
    if not isinstance(right, int) and ((symbol in "*-" and right[0] in loose) or symbol == "*"):
        right_text = f"( {right_text} )"
    return f"{left_text} {symbol} {right_text}"


def _within_tokens(tree: Tree) -> bool:
    """Whether every result on the way has a token of its own."""
    return isinstance(tree, int) or (
        0 <= evaluate(tree) <= LARGEST and _within_tokens(tree[1]) and _within_tokens(tree[2])
    )


# Steps in words ---------------------------------------------------------------------------------------------------

SYNONYMS = {
    "+": ("plus", "add", "and"),
    "-": ("minus", "less", "without"),
    "*": ("times", "by", "multiplied"),
    "=": ("makes", "gives", "equals"),
    "first": ("first", "start", "begin"),
    "then": ("then", "next", "now"),
}
_MEANING = {word: meaning for meaning, words in SYNONYMS.items() for word in words}


def render_steps(tree: Tree, rng: random.Random) -> str:
    """A step an operation, innermost first, every word one of its synonyms: "first 3 plus 4 makes 7 next 7 by ..."."""
    words: list[str] = []

    def walk(node: Tree) -> int:
        if isinstance(node, int):
            return node
        left, right = walk(node[1]), walk(node[2])
        opening = rng.choice(SYNONYMS["then" if words else "first"])
        result = evaluate(node)
        words.extend((opening, str(left), rng.choice(SYNONYMS[node[0]]), str(right)))
        words.extend((rng.choice(SYNONYMS["="]), str(result)))
        return result

    walk(tree)
    return " ".join(words)


def parse_steps(text: str) -> Tree | None:
    """The tree of the last step, or None where the form, a result or the use of an earlier result is wrong.

    A number that is an earlier step's unused result stands for it; every result but the last must be used.
    """
    words = text.split()
    if not words or len(words) % 6:
        return None
    results: list[Tree] = []

    def operand(word: str) -> Tree:
        found = [tree for tree in results if evaluate(tree) == int(word)]
        if found:
            results.remove(found[0])
            return found[0]
        return int(word)

    for start in range(0, len(words), 6):
        opening, left, symbol, right, equals, result = words[start : start + 6]
        meanings = [_MEANING.get(word) for word in (opening, symbol, equals)]
        if meanings[0] != ("then" if start else "first") or meanings[2] != "=" or meanings[1] not in OPERATORS:
            return None
        if not (left.isdecimal() and right.isdecimal() and result.isdecimal()):
            return None
        tree = (meanings[1], operand(left), operand(right))
        if evaluate(tree) != int(result):
            return None
        results.append(tree)
    return results[0] if len(results) == 1 else None


# Tasks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Which problems there are, and how a solution is written.

    Args:
        name: for files and tables.
        words: tokens of a solution that are not numbers.
        max_tokens: of a solution, its end included.
        write: the text of a tree.
        read: the tree of a text; None where it is not one.
        writable: whether a tree can be written.
    """

    name: str
    words: tuple[str, ...]
    max_tokens: int
    write: Callable[[Tree, random.Random], str]
    read: Callable[[str], Tree | None]
    writable: Callable[[Tree], bool]
    numbers: int = 4
    largest: int = 12

    def is_solution(self, text: str, problem: Problem) -> bool:
        """Whether a text uses each number at most once and hits the target exactly."""
        tree = self.read(text)
        if tree is None or Counter(leaves(tree)) - Counter(problem.numbers):
            return False
        return evaluate(tree) == problem.target

    def random_solved(self, rng: random.Random) -> tuple[Problem, str]:
        """A problem, and a solution of it that uses all its numbers."""
        while True:
            numbers = [rng.randint(1, self.largest) for _ in range(self.numbers)]
            trees: list[Tree] = list(numbers)
            while len(trees) > 1:
                left = trees.pop(rng.randrange(len(trees)))
                right = trees.pop(rng.randrange(len(trees)))
                trees.append((rng.choice("+-*"), left, right))
            target = evaluate(trees[0])
            if 0 <= target <= LARGEST and self.writable(trees[0]):
                rng.shuffle(numbers)
                return Problem(tuple(numbers), target), self.write(trees[0], rng)

    def held_out(self, count: int, seed: int) -> list[Problem]:
        """Problems for evaluation, no two the same."""
        rng = random.Random(f"held out {seed}")
        problems: dict[Any, Problem] = {}
        while len(problems) < count:
            problem, _ = self.random_solved(rng)
            problems.setdefault(problem.key, problem)
        return list(problems.values())

    def training(self, held_out: Sequence[Problem], seed: str) -> Iterator[tuple[Problem, str]]:
        """Solved problems without end, none of them held out."""
        rng = random.Random(f"training {seed}")
        reserved = {problem.key for problem in held_out}
        while True:
            problem, solution = self.random_solved(rng)
            if problem.key not in reserved:
                yield problem, solution


EQUATION = Task("equation", (*OPERATORS, "(", ")"), 14, lambda tree, _: render(tree), parse, lambda _: True)
"""One equation: 4 * ( 2 + 1 ). A number's nearest neighbors are numbers."""

STEPS = Task("steps", tuple(_MEANING), 19, render_steps, parse_steps, _within_tokens)
"""A short chain of thought in words that have synonyms: first 2 plus 1 makes 3 then 4 times 3 gives 12."""

TASKS = {task.name: task for task in (EQUATION, STEPS)}
