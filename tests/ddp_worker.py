"""One rank of a data-parallel run, started by torchrun: trains two steps and writes what it saw."""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from models import tiny_model, tokenizer

from ngrpo_ops.integrations.trl import NGRPOConfig, NGRPOTrainer

torch.set_num_threads(1)
folder = Path(sys.argv[1])
gates: list[list[list[bool]]] = []


class Watched(NGRPOTrainer):
    def _log_rollout(self, record, lengths):  # type: ignore[no-untyped-def]
        gates.append(record.gate.tolist())
        super()._log_rollout(record, lengths)


trainer = Watched(
    model=tiny_model(),
    reward_funcs=lambda completions, **kwargs: [float(len(set(text.split()))) for text in completions],
    args=NGRPOConfig(
        str(folder),
        use_cpu=True,
        bf16=False,
        report_to="none",
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=8,
        generation_kwargs={"min_new_tokens": 8},
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        mixing_rate=0.5,
        mixing_seed=9,
    ),
    train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(3, 19)]}),
    processing_class=tokenizer(),
)
trainer.train()
rank = trainer.accelerator.process_index
logs = [row for row in trainer.state.log_history if "reward" in row]
weights = [parameter.detach().sum().item() for parameter in trainer.model.parameters()]
(folder / f"rank{rank}.json").write_text(json.dumps({"gates": gates, "logs": logs, "weights": weights}))
torch.distributed.destroy_process_group()
os._exit(0)  # what is to be tested is on disk; at the interpreter's exit gloo's threads abort one run in many
