"""Rollouts in a terminal: with rich where it is installed, else as plain text. Both say the same."""

from __future__ import annotations

import sys
from typing import TextIO

from .shown import Arm, Rollouts, Token, quoted, visible

_LEGEND = "[n] after a token: it was mixed, see n in the list; the first candidate is the emitted one"
_NARROWEST = 36  # columns that an arm must have to stand beside others


def print_rollouts(shown: Rollouts, file: TextIO | None = None) -> None:
    """Prints rollouts: each sample in all arms, then the next. A mixed token has a number; below is what was mixed.

    Args:
        shown: what to print.
        file: None: the standard output.
    """
    file = sys.stdout if file is None else file
    reconfigure = getattr(file, "reconfigure", None)
    if reconfigure is not None:  # a terminal of ASCII alone prints escapes
        reconfigure(errors="backslashreplace")
    try:
        import rich  # noqa: F401
    except ImportError:
        _print_plain(shown, file)
    else:
        _print_rich(shown, file)


def _heading(shown: Rollouts) -> list[str]:
    settings = ", ".join(f"{name} {value}" for name, value in shown.settings.items())
    return [visible(f"{shown.model}: {settings}"), *(f"note: {visible(note)}" for note in shown.notes)]


def _mixes(sample: tuple[Token, ...]) -> list[tuple[int, list[str], str]]:
    """Number, candidates with their weights, and cosine of each mixed token."""
    mixed = [token for token in sample if token.candidates]
    return [
        (
            number,
            [f"{c.weight:.3f} {quoted(c.text)}" for c in token.candidates],
            "" if token.cosine is None else f"{token.cosine:.4f}",
        )
        for number, token in enumerate(mixed, 1)
    ]


def _title(arm: Arm, index: int) -> str:
    return f"{arm.name}, sample {index + 1}" if len(arm.samples) > 1 else arm.name


def _count(shown: Rollouts) -> int:
    return max(len(arm.samples) for arm in shown.arms)


def _print_plain(shown: Rollouts, file: TextIO) -> None:
    for line in [*_heading(shown), "", "prompt", _indented(visible(shown.prompt))]:
        print(line, file=file)
    for index in range(_count(shown)):
        for arm in shown.arms:
            number, text = 0, ""
            for token in arm.samples[index]:
                text += visible(token.text)
                if token.candidates:
                    number += 1
                    text += f"[{number}]"
            print(f"\n{_title(arm, index)}\n{_indented(text)}", file=file)
            for place, candidates, cosine in _mixes(arm.samples[index]):
                suffix = f"  cosine {cosine}" if cosine else ""
                print(f"    [{place}] {'  '.join(candidates)}{suffix}", file=file)
    print("", file=file)
    for arm in shown.arms:
        print(f"{arm.name}: {arm.summary()}", file=file)
    print(_LEGEND, file=file)


def _indented(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.split("\n"))


def _print_rich(shown: Rollouts, file: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file, highlight=False, markup=False, emoji=False)
    for line in _heading(shown):
        console.print(line, style="bold" if not line.startswith("note: ") else "yellow")
    console.print(Panel(Text(visible(shown.prompt)), title="prompt", title_align="left", box=box.ROUNDED))
    beside = console.width // len(shown.arms) >= _NARROWEST
    for index in range(_count(shown)):
        panels, tables = [], []
        for arm in shown.arms:
            title = Text(_title(arm, index))
            text, number = Text(), 0
            for token in arm.samples[index]:
                text.append(visible(token.text), style=_style(token))
                if token.candidates:
                    number += 1
                    text.append(f"[{number}]", style="dim")
            panels.append(Panel(text, title=title, title_align="left", box=box.ROUNDED))
            mixes = _mixes(arm.samples[index])
            if mixes:
                table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0), header_style="dim")
                for name in ("", "read as a mix, by weight", "cosine"):
                    table.add_column(name, overflow="fold")
                for place, candidates, cosine in mixes:
                    table.add_row(Text(f"[{place}]"), Text("  ".join(candidates)), Text(cosine))
                tables.append(table)
        if beside:
            grid = Table.grid(expand=True)
            for _ in panels:
                grid.add_column(ratio=1)
            grid.add_row(*panels)
            console.print(grid)
        else:
            console.print(*panels, sep="\n")
        for table in tables:
            console.print(table)
            console.print()
    for arm in shown.arms:
        console.print(Text.assemble((arm.name, "bold"), f": {arm.summary()}"))
    console.print(_LEGEND, style="dim")


def _style(token: Token) -> str:
    """Of a token, by what was mixed into it."""
    if not token.candidates:
        return ""
    for least, style in ((0.25, "bold black on red"), (0.05, "black on yellow"), (0.005, "black on cyan")):
        if token.mixed_in >= least:
            return style
    return "underline"
