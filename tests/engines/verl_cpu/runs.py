"""Runs of verl's training loop, or of our launcher, in processes of their own, and what they leave behind."""

from __future__ import annotations

import json
import os
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from models import byte_tokenizer, tiny_model
from ray_runs import run_to_end

STOCK, OURS = "verl.trainer.main_ppo", "ngrpo_ops.integrations.verl"
PROMPTS = ["hello", "abc", "2 + 2 =", "x y z w", "seven", "so", "a", "4 * 5 - 6 ="]  # four a step
TOKENS = 12  # of a sample
SAMPLES = 4  # of a prompt
TIMEOUT = 900  # seconds

PLATFORM = {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "cpu_platform", "VERL_ENGINE_DEVICE": "cuda"}
"""The environment in which verl takes the CPU for an accelerator."""

_FOLDER = Path(__file__).parent
PATH = os.pathsep.join(
    filter(None, [str(_FOLDER), str(_FOLDER.parent), str(_FOLDER.parent.parent), os.environ.get("PYTHONPATH")])
)
"""PYTHONPATH of a process with the stand-ins."""

_REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return len(set(solution_str)) / 10
"""
_FLOAT32 = "{param_dtype:fp32,reduce_dtype:fp32,buffer_dtype:fp32}"


def make_inputs(folder: Path, shape: dict[str, int]) -> None:
    """A model with a tokenizer of bytes, prompts of different lengths, and a reward."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tiny_model(**shape, vocab_size=len(tokenizer), scale=4.0).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {
            "data_source": "toy", "prompt": [{"role": "user", "content": prompt}], "ability": "toy",
            "reward_model": {"style": "rule", "ground_truth": str(i)}, "extra_info": {"index": i},
        }
        for i, prompt in enumerate(PROMPTS)
    ]  # fmt: skip
    pd.DataFrame(rows).to_parquet(folder / "train.parquet")
    pd.DataFrame(rows[:2]).to_parquet(folder / "validation.parquet")
    (folder / "reward.py").write_text(_REWARD)


@dataclass
class Run:
    folder: Path
    status: int
    output: str

    def logged(self, name: str) -> list[float]:
        """A value of verl's own log, step by step."""
        path = self.folder / "log.jsonl"
        lines = [json.loads(line)["data"] for line in path.read_text().splitlines()] if path.exists() else []
        return [line[name] for line in lines if name in line]

    def noted(self, kind: str) -> list[Any]:
        """What `sitecustomize` has noted: "forward", "update" or "table", a process's own in their order."""
        paths = sorted((self.folder / "dump").glob(f"{kind}_*.pickle"))
        return [pickle.loads(path.read_bytes()) for path in paths]

    def rollouts(self, folder: str = "rollouts") -> list[list[dict[str, Any]]]:
        """The samples of every step; of validations: "validations"."""
        paths = sorted((self.folder / folder).glob("*.jsonl"), key=lambda path: int(path.stem))
        return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]


def arguments(inputs: Path, folder: Path, ranks: int = 1) -> list[str]:
    """verl's, of two steps of training in float32 with a reference."""
    ours = "actor_rollout_ref"
    return f"""
        trainer.device=cpu trainer.n_gpus_per_node={ranks} trainer.nnodes=1 trainer.total_training_steps=2
        trainer.logger=[console,file] trainer.val_before_train=False trainer.test_freq=2 trainer.resume_mode=disable
        trainer.rollout_data_dir={folder}/rollouts trainer.validation_data_dir={folder}/validations
        trainer.default_local_dir={folder}/checkpoints trainer.save_freq=-1
        data.train_files={inputs}/train.parquet data.val_files={inputs}/validation.parquet data.train_batch_size=4
        data.max_prompt_length=24 data.max_response_length={TOKENS} data.dataloader_num_workers=0 data.seed=1
        algorithm.adv_estimator=grpo
        {ours}.model.path={inputs}/model +{ours}.model.override_config.attn_implementation=sdpa
        {ours}.model.enable_gradient_checkpointing=False
        {ours}.actor.strategy=fsdp2 {ours}.actor.ppo_mini_batch_size=4 {ours}.actor.ppo_micro_batch_size_per_gpu=4
        {ours}.actor.use_kl_loss=True {ours}.actor.use_torch_compile=False {ours}.actor.optim.lr=1e-3
        +{ours}.actor.fsdp_config.mixed_precision={_FLOAT32} +{ours}.ref.fsdp_config.mixed_precision={_FLOAT32}
        {ours}.ref.fsdp_config.model_dtype=fp32 {ours}.ref.log_prob_micro_batch_size_per_gpu=4
        {ours}.rollout.log_prob_micro_batch_size_per_gpu=4
        {ours}.rollout.name=vllm {ours}.rollout.dtype=float32 {ours}.rollout.enforce_eager=True
        {ours}.rollout.tensor_model_parallel_size=1 {ours}.rollout.n={SAMPLES}
        {ours}.rollout.gpu_memory_utilization=0.1 +{ours}.rollout.enable_sleep_mode=False
        {ours}.rollout.free_cache_engine=False {ours}.rollout.max_model_len=64
        {ours}.rollout.max_num_batched_tokens=256 {ours}.rollout.max_num_seqs=16 {ours}.rollout.agent.num_workers=1
        {ours}.rollout.checkpoint_engine.update_weights_bucket_megabytes=64
        reward.custom_reward_function.path={inputs}/reward.py reward.num_workers=1
        transfer_queue.backend.SimpleStorage.num_data_storage_units=1
        ray_kwargs.ray_init.num_cpus=8 +ray_kwargs.ray_init.num_gpus={ranks}
        +ray_kwargs.ray_init.include_dashboard=False +ray_kwargs.ray_init.object_store_memory=268435456
    """.split()


def run(module: str, inputs: Path, folder: Path, *given: str, ranks: int = 1, **variables: str) -> Run:
    """A training; nothing of it is left running.

    Args:
        inputs: what `make_inputs` has made.
        folder: an empty one.
        given: arguments in the place of those of `arguments`, or in addition to them.
        ranks: of the policy; each has an engine.
        variables: environment variables.
    """
    (folder / "dump").mkdir()
    ranks_of_this_process = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in ranks_of_this_process}
    environment = inherited | PLATFORM | {
        "PYTHONPATH": PATH, "VERL_DUMP": str(folder / "dump"), "VERL_FILE_LOGGER_PATH": str(folder / "log.jsonl"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "RAY_DEDUP_LOGS": "0",
    }  # fmt: skip
    named = {argument.lstrip("+").partition("=")[0] for argument in given}
    kept = [x for x in arguments(inputs, folder, ranks) if x.lstrip("+").partition("=")[0] not in named]
    command = [sys.executable, "-m", module, *kept, *given]
    return Run(folder, *run_to_end(command, environment | variables, folder, TIMEOUT))
