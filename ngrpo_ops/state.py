"""What a checkpoint keeps so that a run goes on where it was: files that are whole or not there, and what is in them.

State is compared and never executed: a strategy that a file names is not imported.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .config import MixingConfig

FORMAT = 1
"""The version of a state. One of ngrpo-ops 0.6 and earlier has none."""


def write_json(path: str | Path, content: Any) -> None:
    """Writes a JSON file that is whole whenever it is there: under a temporary name first, then in its place.

    Example:
        >>> import tempfile
        >>> from ngrpo_ops.state import read_json, write_json
        >>> path = tempfile.mkdtemp() + "/state.json"
        >>> write_json(path, {"next_row": 4})
        >>> read_json(path)
        {'next_row': 4}
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def read_json(path: str | Path, kind: type = dict) -> Any:
    """What a JSON file holds.

    Args:
        path: the file.
        kind: of the outermost value.

    Raises:
        FileNotFoundError: there is no such file. ValueError: no file, not JSON, or another kind of value. The message
            names the file.

    Example:
        >>> import pathlib, tempfile
        >>> from ngrpo_ops.state import read_json
        >>> path = pathlib.Path(tempfile.mkdtemp(), "empty.json")
        >>> path.touch()
        >>> read_json(path)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: ...empty.json is empty
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as text: {error}") from error
    if not text.strip():
        raise ValueError(f"{path} is empty")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON, or only the beginning of it: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} must hold a JSON {kind.__name__}, got {type(content).__name__}")
    return content


def make_state(config: MixingConfig, next_row: int) -> dict[str, Any]:
    """The state of a run: the id of the next generated row, and the configuration that the rows before it had."""
    return {"format": FORMAT, "next_row": next_row, "config": _plain(asdict(config))}


def next_row_of(state: Any, config: MixingConfig, source: str) -> int:
    """The id of the next row of a run that goes on from `state` with `config`.

    A run may go on with another configuration, as a rate that is lowered half way. Nothing is repeated then, as the
    rows go on; but every field that differs is warned of, with both values.

    Args:
        state: what `make_state` returned, or what ngrpo-ops 0.6 saved.
        config: of the run that goes on.
        source: where the state is from, for the messages.

    Raises:
        ValueError: not a state, one of a later version, or a next_row that is no row id. The message names the source.

    Example:
        >>> from ngrpo_ops import MixingConfig
        >>> from ngrpo_ops.state import make_state, next_row_of
        >>> next_row_of(make_state(MixingConfig(), 12), MixingConfig(), "state.json")
        12
        >>> next_row_of({"format": 1, "next_row": -1, "config": {}}, MixingConfig(), "state.json")
        Traceback (most recent call last):
        ValueError: state.json: next_row must be an integer of at least 0, got -1
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"{source} must hold a mapping, got {type(state).__name__}")
    version = state.get("format", 0)
    if isinstance(version, bool) or not isinstance(version, int) or not 0 <= version <= FORMAT:
        raise ValueError(f"{source}: format {version!r} is not known to this version of ngrpo-ops, it knows {FORMAT}")
    missing = ({"next_row", "config"} if version else {"next_row"}) - set(state)
    if missing:
        raise ValueError(f"{source}: {' and '.join(sorted(missing))} missing: the file is damaged")
    next_row = state["next_row"]
    if isinstance(next_row, bool) or not isinstance(next_row, int) or not 0 <= next_row < 2**63:
        raise ValueError(f"{source}: next_row must be an integer of at least 0, got {next_row!r}")
    if not version:
        warnings.warn(
            f"{source} was saved by ngrpo-ops 0.6 or earlier, which kept no settings: whether the run goes on with "
            "those it had cannot be said",
            stacklevel=3,
        )
        return next_row
    if not isinstance(state["config"], Mapping):
        raise ValueError(f"{source}: config must be a mapping of MixingConfig's fields, got {state['config']!r}")
    saved, now = dict(state["config"]), _plain(asdict(config))
    differ = [
        f"{name} was {saved.get(name, 'not there')!r} and is {now.get(name, 'not there')!r}"
        for name in {**now, **saved}
        if name not in saved or name not in now or saved[name] != now[name]
    ]
    if differ:
        warnings.warn(f"the run goes on with other settings than those in {source}: {'; '.join(differ)}", stacklevel=3)
    return next_row


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields as they come back from JSON: tuples are lists there."""
    return json.loads(json.dumps(fields))
