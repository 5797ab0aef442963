"""The solution path of a text: the arithmetic that stands in it, so that two wordings of one solution are the same."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from ..countdown.task import Tree, normal_form

_TOKEN = re.compile(r"\d[\d,]*(?:\.\d+)?|\\?[A-Za-z]+|\S")
_OPERATORS = {
    **dict.fromkeys(("+", "plus", "\\plus"), "+"),
    **dict.fromkeys(("-", "−", "–", "minus"), "-"),
    **dict.fromkeys(("*", "×", "·", "x", "X", "times", "\\times", "\\cdot", "multiplied"), "*"),
    **dict.fromkeys(("/", "÷", "divided", "\\div"), "/"),
}
_NODES = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}
_FILLERS = 2  # words that may stand between a number and an operator: 3 red apples + 5 red apples
_EMPTY = {"$", "\\", "by"}  # nothing in an expression


def path_of(text: str) -> tuple[str, ...]:
    """The arithmetic expressions of a text in their order, each in normal form, without a repetition of the last one.

    An expression has two numbers at least. Sums and products are the same in any order and grouping: 3 + 5 and 5 + 3.
    Results are no part of it. A text without arithmetic has the empty path.

    Examples:
        >>> from examples.real_model.paths import path_of
        >>> path_of("5 apples + 3 apples = 8 apples. So 3 plus 5 is 8.") == path_of("$3 + $5 = 9")
        True
        >>> path_of("He has 8."), len(path_of("3 x 4 = 12, and 12 - 2 = 10"))
        ((), 2)
    """
    path: list[str] = []
    for expression in _expressions(text):
        form = _normal(expression)
        if not path or path[-1] != form:
            path.append(form)
    return tuple(path)


def _expressions(text: str) -> list[list[str]]:
    """The tokens of each expression: numbers, operators and parentheses."""
    found: list[list[str]] = []
    current: list[str] = []
    words = 0  # since the last number

    def close() -> None:
        nonlocal current, words
        while current and not current[-1][0].isdigit() and current[-1] != ")":
            current.pop()
        if sum(token[0].isdigit() for token in current) > 1:
            found.append(current)
        current, words = [], 0

    for token in _TOKEN.findall(text):
        operator = _OPERATORS.get(token)
        after_number = bool(current) and (current[-1][0].isdigit() or current[-1] == ")")
        unclosed = current.count("(") > current.count(")")
        parenthesis = (token == ")" and unclosed) if after_number else token == "("
        if token in _EMPTY:
            continue
        if token[0].isdigit():
            if after_number:
                close()
            current.append(token.replace(",", ""))
            words = 0
        elif operator is not None and after_number:
            current.append(operator)
            words = 0
        elif parenthesis:
            current.append(token)
        elif token.isalpha() and after_number and words < _FILLERS:
            words += 1
        else:
            close()
    close()
    return found


def _normal(tokens: Sequence[str]) -> str:
    try:
        return normal_form(_tree(ast.parse(" ".join(tokens), mode="eval").body))
    except (SyntaxError, ValueError):  # parentheses that do not match, a leading zero
        return " ".join(tokens)


def _tree(node: ast.AST) -> Tree:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return f"{node.value:.12g}"
    if isinstance(node, ast.BinOp):
        left, right = _tree(node.left), _tree(node.right)
        if isinstance(node.op, ast.Div):
            return "*", left, f"1/({normal_form(right)})"
        return _NODES[type(node.op)], left, right
    raise ValueError("no arithmetic")
