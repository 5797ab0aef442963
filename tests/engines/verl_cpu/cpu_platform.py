"""verl's platform registry, given a CPU: named in VERL_USE_EXTERNAL_MODULES, chosen by VERL_PLATFORM=cpu.

What verl asks of an accelerator, as one on which there is nothing to synchronize and no memory of its own:

- The current device is the CPU. verl also writes its number after "cpu:", which is 0.
- Ray counts "GPU", of which its start is told a number: it only places the actors.
- Weights go to the engine through shared memory, as there is no IPC between devices.
- verl asks for the process group "cpu:gloo,<device>:<backend>", which would name the CPU twice.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


class Cpu(str):
    def __format__(self, spec: str) -> str:
        return "0"


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


_NOTHING = (
    "set_device", "synchronize", "empty_cache", "ipc_collect", "manual_seed", "manual_seed_all", "set_rng_state",
    "reset_peak_memory_stats", "current_stream",
)  # fmt: skip
_ZERO = ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved")


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    device_name = "cpu"
    vendor_name = "cpu"
    device_module = types.SimpleNamespace(
        is_available=lambda: True, current_device=lambda: Cpu("cpu"), device_count=lambda: 1,
        mem_get_info=lambda *args: (2**33, 2**34), get_rng_state=lambda *args: torch.get_rng_state(),
        get_device_name=lambda *args: "cpu", **dict.fromkeys(_NOTHING, _nothing),
        **dict.fromkeys(_ZERO, lambda *args, **kwargs: 0),
    )  # fmt: skip

    def is_available(self) -> bool:
        return True

    def current_device(self) -> Cpu:
        return Cpu("cpu")

    def device_count(self) -> int:
        return 1

    set_device = synchronize = manual_seed = manual_seed_all = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = _nothing

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        return False


_init = torch.distributed.init_process_group


def _init_process_group(backend: str | None = None, *args: Any, **kwargs: Any) -> Any:
    return _init("gloo" if backend and backend.startswith("cpu:gloo") else backend, *args, **kwargs)


torch.distributed.init_process_group = _init_process_group
