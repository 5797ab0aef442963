"""Which implementation an operation runs: the Triton kernels where they can run, plain torch elsewhere."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("eager", "triton")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose(backend: str | None, tensor: Tensor, unsupported: str | None = None) -> str:
    """ "eager" or "triton" for an operation on `tensor`.

    None is "triton" on a GPU, and on the CPU where TRITON_INTERPRET=1 asks for the kernels to be interpreted; "eager"
    elsewhere, in float64 and where the kernel cannot do what is asked (`unsupported` says why, or is None).

    Raises:
        ValueError: an unknown backend, or "triton" where it cannot run, with the reason.
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend must be one of {BACKENDS}, or None to choose, got {backend!r}")
    if backend == "eager" or (backend is None and tensor.device.type == "cpu" and not _interpreting()):
        return "eager"
    reason = _unavailable(tensor) or unsupported
    if reason is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend='triton' cannot be used here: {reason}")
    return "eager"


def _unavailable(tensor: Tensor) -> str | None:
    if tensor.dtype not in _KERNEL_DTYPES:
        return f"the kernels take float32, bfloat16 and float16, got {tensor.dtype}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if tensor.device.type == "cpu" and not _kernels_are_interpreted():
        return "on the CPU the kernels run only under TRITON_INTERPRET=1, set before triton is imported"
    if tensor.device.type not in ("cpu", "cuda"):
        return f"no kernels for device {tensor.device}"
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _kernels_are_interpreted() -> bool:
    from .kernels import mix_embeddings, primitives

    return primitives.interpreted(mix_embeddings.mix_forward_kernel)


def kernels(operation: str) -> ModuleType:
    """The module of an operation's kernels; triton is imported with the first."""
    return importlib.import_module(f".kernels.{operation}", __package__)
