"""One rank of a training run over several processes, started by torchrun: trains two steps and writes what it saw.

Arguments: a folder; "ddp", "fsdp2", "zero2" or "zero3" (DeepSpeed); "full", "lora" or "alone" (no reference model).
"""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
folder, parallelism, training = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if parallelism == "fsdp2":
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2DecoderLayer",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
    }

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from models import tiny_model, tokenizer
from peft import LoraConfig
from plain_ids import ScoresPlainIds
from torch.distributed.tensor import DTensor

from ngrpo_ops.integrations.trl import NGRPOConfig

torch.set_num_threads(1)

if parallelism == "fsdp2":
    # accelerate takes FSDP for granted on accelerators alone: gloo's ranks on the CPU pass for theirs.
    start = PartialState.__init__

    def init(self: PartialState, *args: object, **kwargs: object) -> None:
        start(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init

seen: dict[str, list] = {"gates": [], "tables": [], "sharded": []}


class Watched(ScoresPlainIds):
    def _log_rollout(self, record, lengths):  # type: ignore[no-untyped-def]
        seen["gates"].append(record.gate.tolist())
        seen["tables"].append(self.mixing.table.ids.tolist())
        parameters = list(self.model.parameters())
        seen["sharded"].append(any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in parameters))
        super()._log_rollout(record, lengths)


deepspeed = None
if parallelism.startswith("zero"):
    os.environ["DS_ACCELERATOR"] = "cpu"
    deepspeed = {
        "zero_optimization": {"stage": int(parallelism[-1]), "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }

lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "embed_tokens"])
model = tiny_model()
checkpoint = str(folder / f"model{os.environ['RANK']}")
model.save_pretrained(checkpoint)
# Under ZeRO-3 from_pretrained loads some weights wrongly on a CPU, whoever trains: it is given the model, and has no
# second one for reference.
given = parallelism == "zero3"
assert not given or training != "full"
trainer = Watched(
    model=model if given else checkpoint,
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
        learning_rate=1e-2,
        max_steps=2,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        mixing_rate=0.5,
        mixing_seed=9,
        beta=0.0 if training == "alone" else 0.04,
        deepspeed=deepspeed,
    ),
    train_dataset=Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(3, 19)]}),
    processing_class=tokenizer(),
    peft_config=lora if training == "lora" else None,
)
trainer.train()
rank = trainer.accelerator.process_index
logs = [row for row in trainer.state.log_history if "reward" in row]
parameters = list(trainer.model.parameters())
if parallelism == "zero3":
    import deepspeed

    gathered = deepspeed.zero.GatheredParameters(parameters)
else:
    gathered = nullcontext()
with gathered:
    whole = [p.detach().full_tensor() if isinstance(p, DTensor) else p.detach() for p in parameters]
    weights = [parameter.sum().item() for parameter in whole]
(folder / f"rank{rank}.json").write_text(
    json.dumps(seen | {"logs": logs, "weights": weights, "plain": trainer.plain_difference})
)
torch.distributed.destroy_process_group()
os._exit(0)  # what is to be tested is on disk; at the interpreter's exit gloo's threads abort one run in many
