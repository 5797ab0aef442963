"""One rank of NGRPOTrainer with colocated engines on two ranks, started by torchrun: two steps, and what it saw.

Arguments: a folder with the checkpoint "model", to which it writes; the number of ranks that share an engine.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import cpu_engine  # before vllm
import torch
from datasets import Dataset
from models import tokenizer
from plain_ids import ScoresPlainIds
from trl.generation import vllm_generation

from ngrpo_ops.integrations.trl import NGRPOConfig

torch.set_num_threads(1)
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
start = vllm_generation.LLM.__init__


def init(self: Any, *args: Any, **kwargs: Any) -> None:
    start(self, *args, **kwargs | {name: cpu_engine.SETTINGS[name] for name in ("enforce_eager", "dtype")})


vllm_generation.LLM.__init__ = init
gates: list[list[list[bool]]] = []


class Watched(ScoresPlainIds):
    def _log_rollout(self, record, lengths):  # type: ignore[no-untyped-def]
        gates.append(record.gate.tolist())
        super()._log_rollout(record, lengths)


trainer = Watched(
    model=str(folder / "model"),
    reward_funcs=lambda completions, **kwargs: [len(set(text.split())) / 10 for text in completions],
    train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(3, 19)]}),
    args=NGRPOConfig(
        str(folder / f"out{rank}"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        use_vllm=True,
        vllm_tensor_parallel_size=int(sys.argv[2]),
        vllm_max_model_length=64,
        vllm_gpu_memory_utilization=0.1,
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=8,
        generation_kwargs={"ignore_eos": True},
        learning_rate=1e-2,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        mixing_rate=0.5,
        mixing_seed=9,
    ),
    processing_class=tokenizer(),
)
trainer.train()
logs = [row for row in trainer.state.log_history if "reward" in row]
(folder / f"trainer{rank}.json").write_text(
    json.dumps({"gates": gates, "logs": logs, "plain": trainer.plain_difference})
)
torch.distributed.destroy_process_group()
os._exit(0)
