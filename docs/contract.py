"""Writes docs/contract.md from the docstrings of what ngrpo_ops exports: `make docs`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ngrpo_ops

PAGE = Path(__file__).with_name("contract.md")
_SECTIONS = ("Args:", "Attributes:", "Returns:", "Raises:")
_EXAMPLE = "Example:"
_METHODS = {"NeighborTable": ("refresh", "state_dict", "load_state_dict"), "MixRecord": ("to", "fit", "cat")}


def _signature(name: str, thing: Any) -> str:
    try:
        text = str(inspect.signature(thing))
    except (TypeError, ValueError):
        return name
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)  # annotations, which are strings
    text = re.sub(r"ForwardRef\('([^']*)'[^)]*\)", r"\1", text).replace("torch.Tensor", "Tensor")
    if len(name + text) <= 100:
        return name + text
    inner, _, result = text[1:].rpartition(") -> ") if ") -> " in text else (text[1:-1], "", "")
    arguments = re.split(r", (?![^\[(]*[\])])", inner)
    listed = "".join(f"    {argument},\n" for argument in arguments)
    return f"{name}(\n{listed})" + (f" -> {result}" if result else "")


def _docstring(text: str) -> list[str]:
    """Sections become bold lines, their entries lists, the example a block of code."""
    text, _, example = inspect.cleandoc(text).partition(f"\n{_EXAMPLE}\n")
    lines: list[str] = []
    inside = False
    for line in text.splitlines():
        if line in _SECTIONS:
            inside = True
            lines += ["", f"**{line.rstrip(':')}**", ""]
        elif inside and re.match(r"    \S", line):
            entry = re.match(r"    ([\w, *]+): (.*)", line)
            if entry:
                lines.append(f"- `{entry[1]}`: {entry[2]}")
            else:
                lines.append(f"- {line.strip()}" if lines[-1] == "" else f"  {line.strip()}")
        elif inside and line.startswith("        "):
            lines.append(f"  {line.strip()}")
        else:
            inside = inside and not line
            lines.append(line)
    if example:
        lines += ["", "```pycon", *inspect.cleandoc(example).splitlines(), "```"]
    return lines


def _entry(name: str, thing: Any, level: int = 2) -> list[str]:
    lines = [f"{'#' * level} {name.rpartition('.')[2]}", ""]
    if isinstance(thing, Mapping):
        return [*lines, "Settings of `group_advantages` that reproduce a trainer's mode:", "", *_presets(thing), ""]
    lines += ["```python", _signature(name, thing), "```", "", *_docstring(thing.__doc__ or ""), ""]
    return lines


def _presets(presets: Mapping[str, Any]) -> list[str]:
    return [
        "| name | settings |",
        "|---|---|",
        *(f"| `{key}` | {', '.join(f'`{k}={v!r}`' for k, v in values.items())} |" for key, values in presets.items()),
    ]


def page() -> str:
    lines = [
        "# The contract",
        "",
        "Generated from the docstrings by `make docs`; the same is in `help(ngrpo_ops.decode_step)` and the like.",
        "",
        " · ".join(f"[{name}](#{name.lower()})" for name in ngrpo_ops.__all__),
        "",
    ]
    for name in ngrpo_ops.__all__:
        thing = getattr(ngrpo_ops, name)
        lines += _entry(name, thing)
        for method in _METHODS.get(name, ()):
            lines += _entry(f"{name}.{method}", getattr(thing, method), level=3)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
