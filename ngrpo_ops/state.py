"""What a checkpoint keeps of mixing: the next row's number, and the configuration that it was drawn with.

Gates and noise go by seed, row and step. A run that is resumed must go on with the next row, or it draws again what it
has drawn; and with the same configuration, or it should say so. The file is JSON::

    {"version": 1, "next_row": 4096, "config": {"k": 3, "mixing_rate": 0.1, ...}}

**A damaged file is an error**, and so is one that is not there: whether rows may start at 0 is for the caller to know.

**Another configuration is a warning**, which names each field that differs with both values, and the run goes on. No
field makes the next row wrong: rows that were drawn are never drawn again, whatever the rest is. And a change between
save and resume may be meant, as of a rate that is lowered by hand. It is never silent.

The configuration in the file is compared and not used. In particular no strategy that it names is imported.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

from ._messages import shown
from .config import MixingConfig, plain_integer
from .files import FileError, read_json, write_json

VERSION = 1

_ABSENT = object()


def make_state(next_row: int, config: MixingConfig) -> dict[str, Any]:
    """The state as plain data, for a file or a `state_dict`.

    Args:
        next_row: the number of the row that is generated next, 0 at the start of a run.
        config: the configuration of the rollouts.

    Returns:
        What `next_row_of` reads: dicts, lists, numbers and texts.

    Raises:
        ValueError: a next_row that is no integer in [0, 2^63).

    Examples:
        >>> from ngrpo_ops import MixingConfig
        >>> from ngrpo_ops.state import make_state
        >>> state = make_state(16, MixingConfig(mixing_rate=0.2))
        >>> state["version"], state["next_row"], state["config"]["mixing_rate"]
        (1, 16, 0.2)
    """
    return {"version": VERSION, "next_row": _require_row(next_row), "config": _plain(config)}


def next_row_of(
    state: Any,
    config: MixingConfig,
    source: str = "state",
    warn: Callable[[str], object] | None = None,
) -> int:
    """The row that a resumed run goes on with.

    Args:
        state: from `make_state`. ``{"next_row": 16}`` alone, as written up to 0.6.1, is taken with a warning.
        config: the configuration of the run that goes on.
        source: where the state comes from, the first word of every message.
        warn: called with the message where the configuration differs, or is unknown; None: `warnings.warn`.

    Returns:
        The number of the next row.

    Raises:
        ValueError: not a state, of a newer version, or with parts missing; a next_row that is no integer in [0, 2^63).

    Examples:
        >>> from ngrpo_ops import MixingConfig
        >>> from ngrpo_ops.state import make_state, next_row_of
        >>> state = make_state(16, MixingConfig(seed=1))
        >>> next_row_of(state, MixingConfig(seed=1))
        16
        >>> next_row_of(state, MixingConfig(seed=2), "state.json", warn=print)
        state.json: the run goes on at row 16 with other settings than were saved: seed 1, now 2
        16
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"{source}: must be a dict from make_state, got {type(state).__name__}")
    old = set(state) == {"next_row"}
    version = 0 if old else plain_integer(state.get("version"))
    if version is None or version < (0 if old else 1):
        raise ValueError(f"{source}: version must be an integer of at least 1, got {shown(state.get('version'))}")
    if version > VERSION:
        raise ValueError(
            f"{source}: is of version {version}, of a newer ngrpo_ops; this one reads versions up to {VERSION}"
        )
    missing = [] if old else [name for name in ("next_row", "config") if name not in state]
    if missing:
        raise ValueError(f"{source}: lacks {' and '.join(missing)}, got {shown(sorted(map(str, state)))}")
    next_row = _require_row(state["next_row"], f"{source}: ")
    say = (lambda message: warnings.warn(message, stacklevel=3)) if warn is None else warn
    if old:
        say(
            f"{source}: was written by ngrpo_ops 0.6.1 or older, without its settings: the run goes on at row "
            f"{next_row}, and whether it mixes as before is not known"
        )
        return next_row
    if not isinstance(state["config"], Mapping):
        raise ValueError(f"{source}: config must hold the fields of MixingConfig, got {shown(state['config'])}")
    changes = _changes(state["config"], config)
    if changes:
        say(f"{source}: the run goes on at row {next_row} with other settings than were saved: {'; '.join(changes)}")
    return next_row


def write_state(path: str | os.PathLike[str], next_row: int, config: MixingConfig) -> None:
    """Writes the state to a file, whole or not at all: see `write_json`.

    Args:
        path: of the file, in a folder that is there.
        next_row, config: as in `make_state`.

    Raises:
        ValueError: as in `make_state`. OSError: as in `write_json`.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ngrpo_ops import MixingConfig
        >>> from ngrpo_ops.state import read_state, write_state
        >>> path = Path(tempfile.mkdtemp()) / "mixing_state.json"
        >>> write_state(path, 16, MixingConfig())
        >>> read_state(path, MixingConfig())
        16
    """
    write_json(path, make_state(next_row, config))


def read_state(path: str | os.PathLike[str], config: MixingConfig, warn: Callable[[str], object] | None = None) -> int:
    """The row that a run goes on with, from a file of `write_state`.

    Args:
        path: of the file.
        config, warn: as in `next_row_of`.

    Returns:
        The number of the next row.

    Raises:
        FileError: a ValueError that names the file: not there, damaged, or none of the states that `next_row_of` takes.

    Examples:
        >>> from ngrpo_ops import MixingConfig
        >>> from ngrpo_ops.state import read_state
        >>> read_state("nowhere/mixing_state.json", MixingConfig())
        Traceback (most recent call last):
        ngrpo_ops.files.FileError: nowhere/mixing_state.json: No such file or directory
    """
    state = read_json(path)
    say = (lambda message: warnings.warn(message, stacklevel=4)) if warn is None else warn
    try:
        return next_row_of(state, config, os.fspath(path), say)
    except FileError:
        raise
    except ValueError as error:
        raise FileError(str(error)) from error


def _require_row(value: Any, source: str = "") -> int:
    row = plain_integer(value)
    if row is None or not 0 <= row < 2**63:
        raise ValueError(f"{source}next_row must be an integer in [0, 2^63), got {shown(value)}")
    return row


def _plain(config: MixingConfig) -> dict[str, Any]:
    """The fields as JSON has them: lists, and not tuples."""
    return json.loads(json.dumps(asdict(config)))


def _changes(saved: Mapping[str, Any], config: MixingConfig) -> list[str]:
    """Each field that differs, with both values. A field that the file's version did not have was at its default."""
    now = _plain(config)
    defaults = {f.name: f.default for f in fields(MixingConfig) if f.default is not MISSING}
    changes = []
    for name in [*now, *(name for name in saved if name not in now)]:
        before, after = saved.get(name, defaults.get(name)), now.get(name, _ABSENT)
        before = list(before) if isinstance(before, tuple) else before
        if after is _ABSENT:
            changes.append(f"{name} {shown(before)}, which this version does not have")
        elif before != after or isinstance(before, bool) != isinstance(after, bool):
            changes.append(f"{name} {shown(before)}, now {shown(after)}")
    return changes
