"""A GPU that is not there: triton compiles for it and binds arguments as for any other, and no launch does anything.

Tensors are on the CPU, and hold what they held before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver


class _Launcher:
    """Of one compiled kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source = source

    def __call__(self, *arguments: Any) -> None:
        if _launches is not None:
            _launches.append((self.source, arguments))


_launches: list[tuple[Any, tuple[Any, ...]]] | None = None


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "max_num_regs": 65_536, "warpSize": 32}

    def load_binary(self, *arguments: Any) -> tuple[int, ...]:
        return 1, 2, 32, 0, 1024


class _Driver:
    launcher_cls = _Launcher
    utils = _Utils()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_interface(self) -> Any:
        return torch.cuda


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Every operation launches its kernels, which must not be interpreted, on a GPU that is not there.

    As on a GPU, no check looks at a tensor's values.
    """
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", _Driver()))
        for name, module in list(sys.modules.items()):
            for function, there in (("choose_backend", "triton"), ("values_are_readable", False)):
                if name.startswith("ngrpo_ops.ops.") and hasattr(module, function):
                    stack.enter_context(mock.patch.object(module, function, lambda *arguments, there=there: there))
        yield


@contextmanager
def launches() -> Iterator[list[tuple[Any, tuple[Any, ...]]]]:
    """The launches of the block: what was compiled, and what it was called with."""
    global _launches
    _launches = found = []
    try:
        yield found
    finally:
        _launches = None
