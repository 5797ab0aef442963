"""From the files of a study to results.json."""

from __future__ import annotations

from pathlib import Path

from ngrpo_ops.files import write_json

from .results import collect


def write_report(out: Path, folder: Path) -> Path:
    """Writes results.json to `folder`; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", collect(out), indent=1)
    return folder / "results.json"
