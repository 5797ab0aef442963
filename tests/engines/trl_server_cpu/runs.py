"""vLLM servers in processes of their own, and trainers that ask them: what the tests share with their processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import requests
import torch
from cpu_engine import SHAPE
from datasets import Dataset
from models import EOS, tiny_model, tokenizer

_FOLDER = Path(__file__).parent
_START = 240  # seconds that a server may take
PATH = os.pathsep.join(
    filter(None, [str(_FOLDER), str(_FOLDER.parent), str(_FOLDER.parent.parent), os.environ.get("PYTHONPATH")])
)
"""PYTHONPATH of a process with the stand-ins."""


def make_model(folder: Path) -> str:
    """A checkpoint whose completions have many lengths, with a tokenizer."""
    model = tiny_model(**SHAPE)
    with torch.no_grad():
        model.lm_head.weight[EOS] = model.lm_head.weight.mean(0) + 0.05
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """``vllm serve`` with TRL's flags, until it is stopped.

    Args:
        model: the checkpoint.
        log: the file of what it says.
        mixing: the fields of MixingConfig that its flags have; None: it does not mix.
        arguments: further ones.
        variables: of its environment.
    """

    def __init__(self, model: str, log: Path, mixing: dict | None, *arguments: str, **variables: str) -> None:
        self.model, self.log, self.mixing = model, log, mixing
        self.arguments, self.variables = arguments, variables
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> Server:
        """Starts it. `wait` waits until it is up."""
        flags = [] if self.mixing is None else ["--additional-config", json.dumps({"ngrpo_ops": self.mixing})]
        command = [
            sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", self.model, "--host", "127.0.0.1",
            "--port", str(self.port), "--dtype", "float32", "--max-model-len", "64", "--enforce-eager",
            "--max-num-seqs", "16", "--max-num-batched-tokens", "512", "--disable-uvicorn-access-log",
            "--weight-transfer-config", json.dumps({"backend": "nccl"}), "--logprobs-mode", "processed_logprobs",
            "--max-logprobs", "-1", *flags, *self.arguments,
        ]  # fmt: skip
        ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of a colocated engine before it
        environment = {name: value for name, value in os.environ.items() if name not in ranks} | {
            "PYTHONPATH": PATH, "VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            "VLLM_HOST_IP": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                command, env=environment | self.variables, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        return self

    def wait(self) -> Server:
        assert self.process is not None
        for _ in range(_START):
            if self.process.poll() is not None:
                break
            try:
                if requests.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return self
            except requests.RequestException:
                pass
            time.sleep(1)
        raise RuntimeError(f"the server has not started: {self.said()[-3000:]}")

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """Kills all of its processes, which are a group."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def make_trainer(trainer: type, config: type, model: str, url: str, folder: Path, **settings: Any) -> Any:
    """A trainer of two prompts with four completions each a step."""
    keywords = {name: settings.pop(name) for name in ("peft_config", "eval_dataset") if name in settings}
    defaults = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "use_vllm": True,
        "vllm_mode": "server", "vllm_server_base_url": url, "vllm_group_port": free_port(),
        "vllm_server_timeout": 10.0, "num_generations": 4, "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8, "max_completion_length": 10, "learning_rate": 1e-2, "max_steps": 3,
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    texts = [" ".join(f"w{3 + (7 * i + j) % 60}" for j in range(2 + i % 4)) for i in range(16)]
    return trainer(
        model=model,
        reward_funcs=lambda completions, **kwargs: [len(set(text.split())) / 10 for text in completions],
        train_dataset=Dataset.from_dict({"prompt": texts}),
        args=config(**defaults | settings),
        processing_class=tokenizer(),
        **keywords,
    )
