"""What an installation brings, and what an import costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import ngrpo_ops

ROOT = Path(__file__).parent.parent


def run(code: str, folder: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_imports_no_trainer() -> None:
    heavy = "{'transformers', 'trl', 'peft', 'accelerate', 'datasets', 'triton'}"
    assert run(f"import sys, ngrpo_ops; print({heavy} & set(sys.modules))").strip() == "set()"


@pytest.mark.parametrize(("adapter", "needs"), [("transformers", "transformers"), ("trl", "trl"), ("vllm", "vllm")])
def test_an_adapter_without_its_trainer_says_what_to_install(adapter: str, needs: str) -> None:
    code = f"""
import sys
sys.modules[{needs!r}] = None
try:
    import ngrpo_ops.integrations.{adapter}
except ImportError as error:
    print(error)
"""
    assert f"pip install '.[{adapter}]'" in run(code)


def imported(path: Path, package: str) -> set[str]:
    """The modules that a file imports, with their whole names, wherever in the file the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


ABOVE_THE_OPERATIONS = (
    "rollout", "record", "metrics", "parity", "checkpoint", "environment", "files", "state", "testing", "view",
    "__main__",
)  # fmt: skip


def test_each_layer_imports_only_those_below() -> None:
    of_folders = {"ngrpo_ops": ("ngrpo_ops.integrations", "transformers", "trl", "vllm", "openrlhf", "verl")}
    of_folders["ngrpo_ops/ops"] = tuple(f"ngrpo_ops.{name}" for name in ABOVE_THE_OPERATIONS)
    of_folders["kernels"] = ("ngrpo_ops",)
    for folder, refused in of_folders.items():
        for path in (ROOT / folder).rglob("*.py"):  # follows no links
            package = ".".join(path.parent.relative_to(ROOT).parts)
            if package == "kernels":
                package = "ngrpo_ops.kernels"
            names = {name for name in imported(path, package) if not name.startswith("ngrpo_ops.kernels")}
            assert not any(f"{name}.".startswith(f"{layer}.") for name in names for layer in refused), (path, names)


def test_every_public_name_is_there_and_documented() -> None:
    for name in ngrpo_ops.__all__:
        assert name.isupper() or getattr(ngrpo_ops, name).__doc__, name


def test_the_changelog_keeps_its_form() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    unreleased, latest, *_ = re.findall(r"^## (.*)$", changelog, flags=re.M)
    assert unreleased == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(ngrpo_ops.__version__)}\] - \d{{4}}-\d\d-\d\d", latest), latest
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}  # of Keep a Changelog
    assert {*re.findall(r"^### (.*)$", changelog, flags=re.M)} <= kinds


def test_the_citation_and_the_addresses_are_of_this_version_and_repository() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    (released,) = re.findall(
        rf"^## \[{re.escape(ngrpo_ops.__version__)}\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    for line in (f"version: {ngrpo_ops.__version__}", f"date-released: {released}", f"repository-code: {repository}"):
        assert f"\n{line}\n" in citation, line
    assert f"repo_url: &repository {repository}\n" in (ROOT / "mkdocs.yml").read_text()


def test_the_page_of_the_operations_names_them_all() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    for name in ngrpo_ops.__all__:
        assert name in page or name in ("DecodeStep", "MixingCandidates", "NearestNeighbors", "RefreshReport"), name


@pytest.mark.slow
def test_wheel_and_sdist_bring_the_package_and_no_top_level_kernels(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    assert list(tmp_path.glob("*.tar.gz"))
    (wheel,) = tmp_path.glob("*.whl")  # built from the sdist
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"ngrpo_ops"}
    bases = {"integrations": ROOT, "kernels": ROOT, ".": ROOT / "ngrpo_ops"}  # rglob follows no links
    wanted = {
        f"ngrpo_ops/{path.relative_to(base)}" for name, base in bases.items() for path in (base / name).rglob("*.py")
    }
    assert {"ngrpo_ops/ops/decode_step/api.py", "ngrpo_ops/integrations/trl/trainer.py"} <= wanted <= set(names)
    assert "ngrpo_ops/py.typed" in names
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(tmp_path / "site"),
            str(wheel),
        ],
        check=True,
    )
    site = str(tmp_path / "site")
    code = f"import sys; sys.path.insert(0, {site!r}); import ngrpo_ops.integrations.trl as t; print(t.__file__)"
    assert site in run(code, tmp_path)


_SMOKE = """
import importlib.util
import torch
import ngrpo_ops as ops

assert not any(map(importlib.util.find_spec, ("transformers", "trl", "peft", "vllm", "openrlhf", "verl", "ray")))
embedding = torch.randn(500, 32, requires_grad=True)
table = ops.NeighborTable(k=3)
table.refresh(embedding.detach())
step = ops.decode_step(torch.randn(4, 500), embedding, table.ids, mixing_rate=0.5, seed=1, step=2)
ops.raise_faults(step.fault)
ops.mix_embeddings(embedding, step.ids, step.weights).sum().backward()
assert embedding.grad.isfinite().all() and embedding.grad.any()
assert ops.group_advantages(torch.rand(8), group_size=4).shape == (8,)
logprobs = ops.selective_log_softmax(torch.randn(2, 3, 500), torch.zeros(2, 3, dtype=torch.int64))
assert (logprobs < 0).all()
for adapter in ("transformers", "trl", "vllm", "openrlhf", "verl"):
    try:
        __import__(f"ngrpo_ops.integrations.{adapter}")
    except ImportError as error:
        assert "pip install" in str(error), error
    else:
        assert adapter == "openrlhf"  # looks for it when it is started
print(ops.__version__, ops.__file__)
"""


@pytest.mark.slow
def test_the_wheel_in_an_environment_of_its_own(tmp_path: Path) -> None:
    """Nothing but what the wheel asks for, and nothing of this checkout."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = str(tmp_path / "venv" / "bin" / "python")
    pinned = ["--quiet", "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([python, "-m", "pip", "install", *pinned, "torch"], check=True)
    subprocess.run([python, "-m", "pip", "install", *pinned, str(wheel)], check=True)

    def run_there(*command: str) -> str:
        done = subprocess.run([python, *command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert f"{ngrpo_ops.__version__} {tmp_path}" in run_there("-c", _SMOKE)
    assert "not installed" in run_there("-m", "ngrpo_ops", "env")
