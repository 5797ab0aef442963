"""One rank of a trainer with a server, started by torchrun: is refused, then trains two steps. Writes what it saw.

Arguments: a folder with the checkpoint "model", to which it writes; the server's address; a port for the weights.
"""

import json
import os
import sys
from pathlib import Path

import sitecustomize  # the stand-ins
import torch
from plain_ids import ScoresPlainIds
from trl_server_cpu.runs import make_trainer

from ngrpo_ops.integrations.trl import NGRPOConfig

assert sitecustomize.__file__ is not None
torch.set_num_threads(1)
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
settings = {
    "per_device_train_batch_size": 4, "max_steps": 2, "vllm_group_port": int(sys.argv[3]), "mixing_rate": 0.5,
}  # fmt: skip
seen: dict[str, list] = {"refused": [], "gates": [], "completions": []}


class Watched(ScoresPlainIds):
    def _log_rollout(self, record, lengths):  # type: ignore[no-untyped-def]
        seen["gates"].append(record.gate.tolist())
        super()._log_rollout(record, lengths)

    def _generate(self, prompts):  # type: ignore[no-untyped-def]
        result = super()._generate(prompts)
        seen["completions"].append(result[1])
        return result


for url, wrong in ((sys.argv[2], {"mixing_rate": 0.25}), ("http://127.0.0.1:1", {"vllm_server_timeout": 1.0})):
    try:
        make_trainer(Watched, NGRPOConfig, str(folder / "model"), url, folder / "out", **settings | wrong)
    except (ValueError, ConnectionError) as error:
        seen["refused"].append(f"{type(error).__name__}: {error}")
trainer = make_trainer(Watched, NGRPOConfig, str(folder / "model"), sys.argv[2], folder / "out", **settings)
trainer.train()
logs = [entry for entry in trainer.state.log_history if "reward" in entry]
# What fails on the main process stops both.
if trainer.accelerator.is_main_process:
    trainer.vllm_generation.vllm_client.generate = lambda **_: 1 / 0
try:
    trainer._generate(["w3"] * 4)
except RuntimeError as error:
    seen["refused"].append(str(error))
(folder / f"rank{rank}.json").write_text(json.dumps(seen | {"logs": logs, "plain": trainer.plain_difference}))
torch.distributed.destroy_process_group()
os._exit(0)
