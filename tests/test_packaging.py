"""What an installation brings, and what an import costs."""

from __future__ import annotations

import re
import subprocess
import sys
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
    assert f"pip install 'ngrpo-ops[{adapter}]'" in run(code)


def test_each_layer_imports_only_those_below() -> None:
    def imported(path: Path) -> set[str]:
        return set(re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), flags=re.M))

    for path in (ROOT / "ngrpo_ops").glob("*.py"):
        assert not any("integrations" in name or name.startswith("transformers") for name in imported(path)), path
    for path in (ROOT / "kernels").glob("*.py"):
        assert not any(name.startswith("ngrpo_ops") and "kernels" not in name for name in imported(path)), path


def test_every_public_name_is_there_and_documented() -> None:
    for name in ngrpo_ops.__all__:
        assert name.isupper() or getattr(ngrpo_ops, name).__doc__, name


def test_the_changelog_has_this_version() -> None:
    assert f"## {ngrpo_ops.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_readme_names_what_exists() -> None:
    readme = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([a-z-]+)`", readme):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    for name in ngrpo_ops.__all__:
        assert name in readme or name in ("DecodeStep", "MixingCandidates", "NearestNeighbors", "RefreshReport"), name


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
    assert {"ngrpo_ops/integrations/trl.py", "ngrpo_ops/functional.py", "ngrpo_ops/py.typed"} <= set(names)
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
