"""One rank of a tensor-parallel engine, started by torchrun: rolls out, changes the weights, rolls out again.

Arguments: a folder with the models "model" and "changed", to which it writes what it saw.
"""

import os
import sys
from pathlib import Path

import cpu_engine  # before vllm
import torch
from transformers import AutoModelForCausalLM
from vllm import LLM, SamplingParams

from ngrpo_ops import MixingConfig
from ngrpo_ops.integrations.vllm import engine_kwargs, request_kwargs, take_records

torch.set_num_threads(1)
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
llm = LLM(
    str(folder / "model"),
    tensor_parallel_size=2,
    distributed_executor_backend="external_launcher",
    max_model_len=64,
    max_num_seqs=8,
    seed=0,
    **cpu_engine.SETTINGS,
    **engine_kwargs(MixingConfig(mixing_rate=0.5, seed=3)),
)
mixer = cpu_engine.mixer_of(llm)
seen = []
for generation, name in enumerate(("model", "changed")):
    if generation:
        changed = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        for parameter_name, parameter in changed.named_parameters():
            mixer.model.load_weights([(parameter_name, parameter.data)])
    rows = range(12 * generation, 12 * generation + 12)
    asked = [
        SamplingParams(
            max_tokens=20, logprobs=0, detokenize=False, ignore_eos=True, seed=row, extra_args=request_kwargs(row)
        )
        for row in rows
    ]
    prompts = [{"prompt_token_ids": [3 + (7 * i + j) % 60 for j in range(1 + i % 5)]} for i in range(12)]
    outputs = llm.generate(prompts, asked, use_tqdm=False)
    record = take_records(llm, rows, [20] * 12)
    rows_here = len(mixer.embedding.rows()[0])
    seen.append({"outputs": outputs, "record": record, "table": mixer.table.ids.clone(), "rows_here": rows_here})
torch.save(seen, folder / f"rank{rank}.pt")
torch.distributed.destroy_process_group()
os._exit(0)
