"""How a value is written in a message."""

from __future__ import annotations

from typing import Any

_LONGEST = 200  # characters


def shown(value: Any) -> str:
    """A value as a message has it: cut where it is long, and never an error of its own."""
    try:
        text = repr(value)
    except Exception:  # an integer of more digits than Python prints, or whatever a class of the user's raises
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
