"""Settings of the tests that run a real engine."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # models

import cpu_engine  # noqa: F401
import pytest


@pytest.fixture(autouse=True)
def _poisoned():
    """Uninitialised memory stays what it is: vLLM's own kernels read some, under masks."""


@pytest.fixture
def difference(request: pytest.FixtureRequest):
    """Called with a path and its largest log-probability difference; `make test-engines` reports them."""

    def note(path: str, value: float) -> None:
        found = request.config.stash.setdefault(DIFFERENCES, {})
        found[path] = max(value, found.get(path, 0.0))

    return note


DIFFERENCES = pytest.StashKey[dict]()
