"""The task: given numbers and a target, write an equation that uses each number at most once and hits the target."""

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


def is_solution(text: str, problem: Problem) -> bool:
    """Whether an equation uses each number at most once and hits the target exactly."""
    tree = parse(text)
    return (
        tree is not None and not Counter(leaves(tree)) - Counter(problem.numbers) and evaluate(tree) == problem.target
    )


def normal_form(tree: Tree) -> str:
    """Equal for equations that differ only in the order or grouping of sums and of products: 1 + 2 and 2 + 1."""
    if isinstance(tree, int):
        return str(tree)
    if tree[0] == "*":
        return "*".join(sorted(f"({normal_form(factor)})" for factor in _factors(tree)))
    return "".join(sorted(f"{sign}({normal_form(term)})" for sign, term in _terms(tree, "+")))


def _factors(tree: Tree) -> Iterator[Tree]:
    if isinstance(tree, int) or tree[0] != "*":
        yield tree
    else:
        yield from _factors(tree[1])
        yield from _factors(tree[2])


def _terms(tree: Tree, sign: str) -> Iterator[tuple[str, Tree]]:
    if isinstance(tree, int) or tree[0] == "*":
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


def random_solved(rng: random.Random, count: int, largest: int) -> tuple[Problem, str]:
    """A problem, and an equation over all its numbers that solves it."""
    while True:
        numbers = [rng.randint(1, largest) for _ in range(count)]
        trees: list[Tree] = list(numbers)
        while len(trees) > 1:
            left = trees.pop(rng.randrange(len(trees)))
            right = trees.pop(rng.randrange(len(trees)))
            trees.append((rng.choice("+-*"), left, right))
        target = evaluate(trees[0])
        if 0 <= target <= LARGEST:
            rng.shuffle(numbers)
            return Problem(tuple(numbers), target), render(trees[0])


def held_out_problems(count: int, numbers: int, largest: int, seed: int) -> list[Problem]:
    """Problems for evaluation, no two the same."""
    rng = random.Random(f"held out {seed}")
    problems: dict[Any, Problem] = {}
    while len(problems) < count:
        problem, _ = random_solved(rng, numbers, largest)
        problems.setdefault(problem.key, problem)
    return list(problems.values())


def training_stream(
    held_out: Sequence[Problem], numbers: int, largest: int, seed: str
) -> Iterator[tuple[Problem, str]]:
    """Solved problems without end, none of them held out."""
    rng = random.Random(f"training {seed}")
    reserved = {problem.key for problem in held_out}
    while True:
        problem, equation = random_solved(rng, numbers, largest)
        if problem.key not in reserved:
            yield problem, equation
