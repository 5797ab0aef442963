"""Rollouts in a terminal: with rich where it is installed, else as plain text. Both say the same."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from .shown import Arm, Rollouts, Token, quoted, visible


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


def _legend(shown: Rollouts) -> str:
    return "[n] after a token: it was mixed, see n below; the first candidate is the emitted one"


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


def _title(shown: Rollouts, arm: Arm, index: int) -> str:
    return f"{arm.name}, sample {index + 1}" if len(arm.samples) > 1 else arm.name


def _samples(shown: Rollouts) -> list[tuple[Arm, int]]:
    """Which arm and sample comes when: those of one number beside each other."""
    return [(arm, i) for i in range(max(len(arm.samples) for arm in shown.arms)) for arm in shown.arms]


def _print_plain(shown: Rollouts, file: TextIO) -> None:
    for line in [*_heading(shown), "", "prompt", _indented(visible(shown.prompt))]:
        print(line, file=file)
    for arm, index in _samples(shown):
        sample, number, text = arm.samples[index], 0, ""
        for token in sample:
            text += visible(token.text)
            if token.candidates:
                number += 1
                text += f"[{number}]"
        print(f"\n{_title(shown, arm, index)}\n{_indented(text)}", file=file)
        for place, candidates, cosine in _mixes(sample):
            suffix = f"  cosine {cosine}" if cosine else ""
            print(f"    [{place}] {'  '.join(candidates)}{suffix}", file=file)
    print("", file=file)
    for arm in shown.arms:
        print(f"{arm.name}: {arm.summary()}", file=file)
    print(_legend(shown), file=file)


def _indented(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.split("\n"))


def _print_rich(shown: Rollouts, file: TextIO) -> None:
    from rich import box
    from rich.console import Console, Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file, highlight=False, markup=False, emoji=False)
    for line in _heading(shown):
        console.print(line, style="bold" if not line.startswith("note: ") else "yellow")
    console.print(Panel(Text(visible(shown.prompt)), title="prompt", title_align="left", box=box.ROUNDED))
    for arm, index in _samples(shown):
        sample = arm.samples[index]
        text, number = Text(), 0
        for token in sample:
            text.append(visible(token.text), style=_style(token))
            if token.candidates:
                number += 1
                text.append(f"[{number}]", style="dim")
        parts: list[Any] = [text]
        mixes = _mixes(sample)
        if mixes:
            table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False, header_style="dim")
            for name in ("", "mixed, by weight", "cosine"):
                table.add_column(name, overflow="fold")
            for place, candidates, cosine in mixes:
                table.add_row(Text(f"[{place}]"), Text("  ".join(candidates)), Text(cosine))
            parts += [Text(), table]
        console.print(Panel(Group(*parts), title=Text(_title(shown, arm, index)), title_align="left", box=box.ROUNDED))
    for arm in shown.arms:
        console.print(Text.assemble((arm.name, "bold"), f": {arm.summary()}"))
    console.print(_legend(shown), style="dim")


def _style(token: Token) -> str:
    """Of a token, by what was mixed into it."""
    if not token.candidates:
        return ""
    for least, style in ((0.25, "bold black on red"), (0.05, "black on yellow"), (0.005, "black on cyan")):
        if token.mixed_in >= least:
            return style
    return "underline"
