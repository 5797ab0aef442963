"""Runs of OpenRLHF's training loop, or of our launcher, in processes of their own, and what they leave behind."""

from __future__ import annotations

import json
import os
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from models import EOS, byte_tokenizer, tiny_model
from ray_runs import run_to_end

STOCK, OURS = "openrlhf.cli.train_ppo_ray", "ngrpo_ops.integrations.openrlhf"
PROMPTS = ["hello", "abc", "2 + 2 =", "x y z w", "seven", "so", "a", "4 * 5 - 6 ="]  # four a step
TOKENS = 12  # of a sample
SAMPLES = 4  # of a prompt
TIMEOUT = 600  # seconds; the first run of an environment also compiles DeepSpeed's parts

_FOLDER = Path(__file__).parent
_EXTENSIONS = Path(sys.prefix) / "torch_extensions"
_REWARD = """
import torch

def reward_func(queries, prompts, labels, **kwargs):
    rewards = torch.tensor([len(set(query[len(prompt):])) / 10 for query, prompt in zip(queries, prompts)])
    return {"rewards": rewards, "scores": rewards, "extra_logs": {}}
"""


def make_inputs(folder: Path, shape: dict[str, int]) -> None:
    """A model with a tokenizer of bytes, prompts of different lengths, and a reward."""
    tokenizer = byte_tokenizer()
    model = tiny_model(**shape, vocab_size=len(tokenizer), scale=1.5)
    with torch.no_grad():
        # OpenRLHF asks the engine for at least one token, which takes the end token's share of the first, and shows in
        # `vllm_kl`. Here that token has none: one channel is the same for all inputs, and speaks against it.
        model.model.embed_tokens.weight[:, 0] = 0.1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[EOS, 0] = -100
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = [json.dumps({"input": prompt, "label": str(i)}) for i, prompt in enumerate(PROMPTS)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "reward.py").write_text(_REWARD)


@dataclass
class Run:
    folder: Path
    status: int
    output: str

    def logged(self, name: str) -> list[float]:
        """A value of OpenRLHF's own log, step by step."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (path,) = (self.folder / "log").iterdir()
        events = EventAccumulator(str(path)).Reload()
        return [event.value for event in events.Scalars(f"train/{name}")]

    def rollouts(self, kind: str = "generate_samples") -> list[list[dict[str, Any]]]:
        """The samples of every rollout, one experience each; of evaluations: "generate_eval_samples"."""
        paths = sorted((self.folder / "dump").glob(f"*_{kind}.pickle"))
        found = [pickle.loads(path.read_bytes()) for path in paths]
        return [samples for samples in found if samples]  # the last call may find no more prompts


def run(module: str, inputs: Path, folder: Path, *arguments: str, float32: bool = True, **variables: str) -> Run:
    """Two steps of training; nothing of it is left running.

    Args:
        inputs: what `make_inputs` has made.
        folder: an empty one.
        arguments: in addition to those below, and after them.
        variables: environment variables.
    """
    (folder / "dump").mkdir()
    path = os.pathsep.join(filter(None, [str(_FOLDER), str(_FOLDER.parent), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {
        "PYTHONPATH": path, "OPENRLHF_DUMP": str(folder / "dump"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "HF_DATASETS_CACHE": str(inputs / "cache"), "RAY_DEDUP_LOGS": "0",
        "TORCH_EXTENSIONS_DIR": str(_EXTENSIONS),
    }  # fmt: skip
    environment |= {"OPENRLHF_FLOAT32": "1"} if float32 else {}
    given = f"""
        --actor.model_name_or_path {inputs}/model --reward.remote_url {inputs}/reward.py
        --data.prompt_dataset {inputs}/prompts.jsonl --data.input_key input --data.label_key label --data.max_len 64
        --actor.num_nodes 1 --actor.num_gpus_per_node 1 --ref.num_nodes 1 --ref.num_gpus_per_node 1 --train.colocate_all
        --vllm.num_engines 1 --vllm.sync_backend gloo --vllm.enforce_eager --vllm.gpu_memory_utilization 0.1
        --ds.attn_implementation eager --ds.zero_stage 2 --algo.advantage.estimator group_norm
        --algo.kl.use_loss --algo.kl.estimator k3 --algo.advantage.is_correction_level token
        --rollout.batch_size 4 --rollout.n_samples_per_prompt {SAMPLES} --rollout.max_new_tokens {TOKENS}
        --rollout.micro_batch_size 4 --train.batch_size 16 --train.micro_batch_size 4
        --actor.adam.lr 1e-3 --actor.lr_warmup_ratio 0.0 --logger.tensorboard_dir {folder}/log
        --ckpt.output_dir {folder}/out --ckpt.path {folder}/checkpoints
    """.split()
    command = [sys.executable, "-m", module, *given, *arguments]
    status, output = run_to_end(command, environment | variables, folder, TIMEOUT, _unlock)
    return Run(folder, status, output)


def _unlock() -> None:
    """What was killed has perhaps compiled: the lock that it leaves would hold up every later run."""
    for lock in _EXTENSIONS.glob("*/lock"):
        lock.unlink(missing_ok=True)
