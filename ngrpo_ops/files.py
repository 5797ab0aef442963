"""Files that may be damaged: JSON is read with a message that names the file, and written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import uuid
from pathlib import Path
from typing import Any


class FileError(ValueError):
    """A file that cannot be read as what it should be. The message begins with its path."""


def require_file(path: str | os.PathLike[str]) -> Path:
    """Checks that a path is of a file, and not of a folder, a device or a pipe: those would block or never end.

    Returns:
        The path.

    Raises:
        FileError: nothing there, or something else than a file.

    Examples:
        >>> from ngrpo_ops.files import require_file
        >>> require_file("/dev/zero")
        Traceback (most recent call last):
        ngrpo_ops.files.FileError: /dev/zero: must be a file, got a device
    """
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe"}
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise FileError(f"{os.fspath(path)}: {getattr(error, 'strerror', None) or error}") from error
    if not stat.S_ISREG(mode):
        raise FileError(f"{os.fspath(path)}: must be a file, got {kinds.get(stat.S_IFMT(mode), 'something else')}")
    return Path(path)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a JSON object.

    Returns:
        The object. Its keys and values are the caller's to check.

    Raises:
        FileError: no such file, no JSON (empty, cut off), or JSON of another type than an object.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ngrpo_ops.files import read_json, write_json
        >>> path = Path(tempfile.mkdtemp()) / "state.json"
        >>> write_json(path, {"next_row": 7})
        >>> read_json(path)
        {'next_row': 7}
    """
    require_file(path)
    name = os.fspath(path)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
        if not text.strip():
            raise FileError(f"{name}: is empty")
        content = json.loads(text)
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{name}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested without end
        raise FileError(f"{name}: is no JSON, or cut off: {error}") from error
    if not isinstance(content, dict):
        raise FileError(f"{name}: must hold a JSON object, got {type(content).__name__}")
    return content


def write_json(path: str | os.PathLike[str], content: Any, indent: int | None = None) -> None:
    """Writes JSON as `write_text` writes a text.

    Args:
        path: in a folder that is there.
        content: what `json.dumps` takes.
        indent: as in `json.dumps`.

    Raises:
        OSError: the folder is not there, not writable or full; what was at `path` is still there.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ngrpo_ops.files import write_json
        >>> path = Path(tempfile.mkdtemp()) / "state.json"
        >>> write_json(path, [1, 2])
        >>> [file.name for file in path.parent.iterdir()], path.read_text()
        (['state.json'], '[1, 2]')
    """
    write_text(path, json.dumps(content, indent=indent))


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text, as UTF-8, to a new file in the same folder, which then takes the place of `path`.

    A process that is killed in here, or a machine that goes down, leaves the old file or the new one, and at most a
    file ``.NAME.*.partial`` beside it.

    Args:
        path: in a folder that is there.
        text: what the file will hold.

    Raises:
        OSError: the folder is not there, not writable or full; what was at `path` is still there.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from ngrpo_ops.files import write_text
        >>> path = Path(tempfile.mkdtemp()) / "page.html"
        >>> write_text(path, "<p>")
        >>> path.read_text()
        '<p>'
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    with contextlib.suppress(OSError):  # a file system that cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
