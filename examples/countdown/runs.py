"""The files of a study's runs, read. What is damaged is named: a run that was lost is made again, not guessed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ngrpo_ops.files import FileError, read_json

_RUN = {"samples": int, "correct": list, "usable_groups": (int, float), "unique": list, "divergence": list}
_MATCHED = dict.fromkeys(("temperature", "entropy", "ngrpo_entropy"), (int, float))


def read_run(path: Path) -> dict[str, Any]:
    """An arm's run, or the evaluation of the checkpoint.

    Raises:
        FileError: damaged, or not a run.
    """
    return _require(path, _RUN)


def read_matched(path: Path) -> dict[str, Any]:
    """The matched temperature and its entropies.

    Raises:
        FileError: damaged, or something else.
    """
    return _require(path, _MATCHED)


def _require(path: Path, kinds: dict[str, Any]) -> dict[str, Any]:
    content = read_json(path)
    for name, kind in kinds.items():
        if not isinstance(content.get(name), kind):
            raise FileError(f"{path}: {name} must be there, got {content.get(name)!r:.80}")
    return content
