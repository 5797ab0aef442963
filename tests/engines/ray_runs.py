"""Runs of trainers that start Ray: in processes of their own, of which nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path


def run_to_end(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path,
    timeout: float,
    killed: Callable[[], None] = lambda: None,
) -> tuple[int, str]:
    """Runs a command, and ends every process that it has started, after `timeout` seconds at the latest.

    Args:
        environment: all of its variables.
        folder: its working directory, where its output is kept.
        killed: called where the command did not end by itself.

    Returns:
        The exit status, and what it has written.
    """
    name = f"NGRPO_RUN_{uuid.uuid4().hex}"
    output = folder / "output.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, env={**environment, name: "1"}, cwd=folder, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                process.kill()
                killed()
            _kill(name)
    return process.wait(), output.read_text(errors="replace")


def _kill(variable: str) -> None:
    """End every process with the variable in its environment: Ray's, which outlive a killed driver, and engines."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"{variable}=1".encode() in (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if ours:
            try:
                os.kill(int(folder.name), signal.SIGKILL)
            except ProcessLookupError:
                continue
