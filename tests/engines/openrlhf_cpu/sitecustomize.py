"""OpenRLHF's training loop on the CPU: loaded by every Python process that has this folder on its path.

Ray's workers and vLLM's spawned engine inherit the path, so each patches what it imports, just after the import. No
file of an installed package is touched. What stands in for what a machine without CUDA lacks:

- torch: the current device is the CPU, and there is nothing to synchronize. OpenRLHF asks for CUDA's by name.
- flash_attn: the padding functions, which OpenRLHF imports at its start and packs samples with.
- Actor: eager attention, where packing asks for flash-attention's kernel. And transformers is newer than the 5.15 that
  OpenRLHF pins: what OpenRLHF puts around its loading under ZeRO-3 does not fit, and is needed for converted names
  alone.
- triton: its functions are interpreted from its import on. Ours go by the variable, and run as plain torch.
- vllm: see `cpu_engine`.
- pynccl: see `stand_ins`.
- ray.init: one GPU for each actor is counted, which only places them.

And what the tests look at:

- `OPENRLHF_FLOAT32`: OpenRLHF has no setting for float32; rounding in bfloat16 hides what these tests look for.
- `OPENRLHF_WITHOUT_REPLAY`: the policy is fed plain ids, as it would be without the adapter's other half.
- `OPENRLHF_SEEDS`: the n-th request of a prompt has the seed n, where OpenRLHF leaves it to the order of arrival.
- `OPENRLHF_DUMP`: a folder for the samples of every rollout and evaluation, as the trainer received them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import itertools
import os
import pickle
import sys
import types
from collections.abc import Callable
from typing import Any

from stand_ins import after_import, pynccl_over_gloo, seeds_by_prompt, vllm_on_cpu

FLOAT32 = "OPENRLHF_FLOAT32" in os.environ
os.environ["TRITON_INTERPRET"] = "1"


def _torch(torch: Any) -> None:
    class Cpu(str):
        """A device to move to, and the number that follows "cuda:"."""

        def __format__(self, spec: str) -> str:
            return "0"

    torch.cuda.current_device = lambda: Cpu("cpu")
    for name in ("set_device", "synchronize", "current_stream"):
        setattr(torch.cuda, name, lambda *args, **kwargs: None)
    empty = torch.empty

    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device")) == "cuda":  # the buffer that the engine receives a weight in
            kwargs["device"] = "cpu"
        return empty(*args, **kwargs)

    torch.empty = on_cpu


def _flash_attn(_: Any) -> None:
    import torch
    from einops import rearrange

    def index_first_axis(x: Any, indices: Any) -> Any:
        return x.index_select(0, indices)

    def unpad_input(hidden: Any, mask: Any) -> tuple:
        lengths = mask.sum(1, dtype=torch.int32)
        indices = mask.reshape(-1).nonzero()[:, 0]
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])
        return hidden.flatten(0, 1)[indices], indices, bounds, int(lengths.max()), lengths

    def pad_input(hidden: Any, indices: Any, batch: int, length: int) -> Any:
        padded = hidden.new_zeros(batch * length, *hidden.shape[1:])
        return padded.index_copy(0, indices, hidden).unflatten(0, (batch, length))

    members = {
        "flash_attn": {},
        "flash_attn.bert_padding": {
            "index_first_axis": index_first_axis, "pad_input": pad_input, "rearrange": rearrange,
            "unpad_input": unpad_input,
        },
        "flash_attn.utils": {},
        "flash_attn.utils.distributed": {"all_gather": None},
    }  # fmt: skip
    for name, content in members.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        vars(module).update(content)
        sys.modules[name] = module


def _actor(module: Any) -> None:
    init = module.Actor.__init__

    @functools.wraps(init)
    def eager(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs | {"attn_implementation": "eager"})

    module.Actor.__init__ = eager
    module._patch_zero3_weight_mapping = lambda: None


def _triton(triton: Any) -> None:
    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]


def _ray(ray: Any) -> None:
    init = ray.init

    @functools.wraps(init)
    def with_gpus(*args: Any, **kwargs: Any) -> Any:
        counted = {"num_cpus": 8, "num_gpus": 4, "include_dashboard": False, "object_store_memory": 2**28}
        return init(*args, **counted | kwargs)

    ray.init = with_gpus


def _float32(module: Any) -> None:
    import torch

    module.convert_to_torch_dtype = lambda param_dtype: torch.float32


def _deepspeed_float32(module: Any) -> None:
    for name in ("get_train_ds_config", "get_eval_ds_config"):
        original = getattr(module, name)

        @functools.wraps(original)
        def without_bf16(*args: Any, _original: Callable = original, **kwargs: Any) -> dict:
            return _original(*args, **kwargs) | {"bf16": {"enabled": False}}

        setattr(module, name, without_bf16)


def _engine_float32(module: Any) -> None:
    create = module.EngineArgs.create_engine_config

    @functools.wraps(create)
    def in_float32(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.dtype = "float32"
        return create(self, *args, **kwargs)

    module.EngineArgs.create_engine_config = in_float32


def _without_replay(module: Any) -> None:
    module.PATCHES["openrlhf.models.actor:Actor.forward"] = lambda original: original
    module.replaying = lambda actor, batches: contextlib.nullcontext()


def _dump(module: Any) -> None:
    number = itertools.count()
    for name in ("generate_samples", "generate_eval_samples"):
        original = getattr(module.SamplesGenerator, name)

        @functools.wraps(original)
        def dumped(self: Any, *args: Any, _name: str = name, _original: Callable = original, **kwargs: Any) -> Any:
            found = _original(self, *args, **kwargs)
            samples = found if _name == "generate_eval_samples" else found[0]
            path = os.path.join(os.environ["OPENRLHF_DUMP"], f"{next(number):03}_{_name}.pickle")
            with open(path, "wb") as file:
                pickle.dump([vars(sample) for sample in samples], file)
            return found

        setattr(module.SamplesGenerator, name, dumped)


AFTER_IMPORT: dict[str, Callable[[Any], None]] = {
    "torch": _torch,
    "openrlhf": _flash_attn,
    "openrlhf.models.actor": _actor,
    "triton": _triton,
    "vllm": vllm_on_cpu,
    "vllm.distributed.device_communicators.pynccl": pynccl_over_gloo,
    "ray": _ray,
}
if FLOAT32:
    AFTER_IMPORT |= {
        "openrlhf.utils.utils": _float32,
        "openrlhf.utils.deepspeed.deepspeed_utils": _deepspeed_float32,
        "vllm.engine.arg_utils": _engine_float32,
    }
if "OPENRLHF_WITHOUT_REPLAY" in os.environ:
    AFTER_IMPORT["ngrpo_ops.integrations.openrlhf.workers"] = _without_replay
if "OPENRLHF_SEEDS" in os.environ:
    AFTER_IMPORT["vllm.v1.engine.async_llm"] = seeds_by_prompt
if "OPENRLHF_DUMP" in os.environ:
    AFTER_IMPORT["openrlhf.trainer.ppo_utils.samples_generator"] = _dump


after_import(AFTER_IMPORT)
