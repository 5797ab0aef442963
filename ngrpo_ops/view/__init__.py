"""Rollouts as a person reads them: their text with what was mixed into it, in a terminal or as a page.

    shown.py      what is shown, as plain data
    terminal.py   as text, with rich where it is installed
    page.py       as one HTML page that loads nothing

Nothing here knows a framework: an adapter makes the data (integrations/transformers/view.py).
"""

from __future__ import annotations

from .page import page
from .shown import Arm, Candidate, Rollouts, Token, visible
from .terminal import print_rollouts

__all__ = ["Arm", "Candidate", "Rollouts", "Token", "page", "print_rollouts", "visible"]
