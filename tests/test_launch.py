"""How kernels are launched: the device guard, strides and contiguity, pinned configurations, opt-in tuning."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import triton

from ngrpo_ops.kernels import (
    configs,
    decode_step,
    gaussian_noise,
    group_advantages,
    mix_embeddings,
    nearest_neighbors,
    primitives,
    selective_log_softmax,
)
from ngrpo_ops.testing import poisoned_empty

MODULES = (decode_step, gaussian_noise, group_advantages, mix_embeddings, nearest_neighbors, selective_log_softmax)
KERNELS = {name: getattr(module, name) for module in MODULES for name in dir(module) if name.endswith("_kernel")}


def test_every_kernel_has_a_pinned_configuration_and_a_tile():
    assert set(KERNELS) == set(configs.PINNED) == set(configs._INTERPRETED) >= set(configs.TUNING_KEYS)
    for name, kernel in KERNELS.items():
        arguments = set(kernel.arg_names)
        assert set(configs.TUNING_KEYS.get(name, [])) <= arguments
        assert set(configs.ACCUMULATED.get(name, [])) <= arguments
        limits = [limit for limit, _ in configs.PINNED[name]]
        assert limits == sorted(limits) and limits[-1] == 2**31
        for config in (*configs.candidates(name), configs.pinned(name, 100, interpreted=True)):
            assert set(config.kwargs) <= arguments
            assert all(block == triton.next_power_of_2(block) for block in config.kwargs.values())


def test_a_row_takes_the_narrowest_configuration_that_holds_it():
    assert configs.pinned("mix_forward_kernel", 256).kwargs["BLOCK_D"] == 256
    assert configs.pinned("mix_forward_kernel", 257).kwargs["BLOCK_D"] == 1024
    assert configs.pinned("mix_forward_kernel", 10**6).kwargs["BLOCK_N"] == 1


def test_arguments_are_made_contiguous_only_where_named():
    seen = {}

    @primitives.launcher("ids")
    def function(x, ids, scale=2.0, other=None):
        seen.update(x=x.is_contiguous(), ids=ids.is_contiguous(), scale=scale, other=other)
        return x

    x = torch.ones(3, 4).T
    assert function(x, ids=x) is x
    assert seen == {"x": False, "ids": True, "scale": 2.0, "other": None}


def test_the_launch_runs_on_the_device_of_its_tensors(monkeypatch):
    """Whatever the current device is: a tensor that says it is on the second GPU sets that one for the launch."""
    entered = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append(None)

    class OnGpu(torch.Tensor):
        is_cuda = True
        device = torch.device("cuda", 1)

    monkeypatch.setattr(torch.cuda, "device", Guard)
    x = torch.ones(2).as_subclass(OnGpu)
    assert primitives.launcher()(lambda scale, x: list(entered))(1.0, x) == [torch.device("cuda", 1)]
    assert entered == [torch.device("cuda", 1), None]


@pytest.fixture
def tuned(monkeypatch):
    """The kernels that are handed to the tuner, with NGRPO_OPS_AUTOTUNE=1 and without an interpreter."""
    names = []

    def tune(kernel):
        names.append(kernel.__name__)
        return {grid: lambda **arguments: None for grid in [GRID]}

    monkeypatch.setenv("NGRPO_OPS_AUTOTUNE", "1")
    monkeypatch.setattr(primitives, "interpreted", lambda kernel: False)
    monkeypatch.setattr(primitives, "_tuned", tune)
    return names


def GRID(meta):
    return (1,)


def test_tuning_is_opt_in_and_never_deterministic(tuned, monkeypatch):
    launched = []

    class Kernel:
        def __init__(self, name):
            self.__name__ = name

        def __getitem__(self, grid):
            return lambda **arguments: launched.append(arguments)

    def launch(name="mix_forward_kernel", **options):
        primitives.launch(Kernel(name), GRID, width=896, int64_for=(), **options)

    launch()
    assert (len(tuned), len(launched)) == (1, 0)
    launch(tunable=False)
    launch("mix_grad_merge_kernel")  # has no tuning keys
    assert (len(tuned), len(launched)) == (1, 2)
    torch.use_deterministic_algorithms(True)
    try:
        launch()
    finally:
        torch.use_deterministic_algorithms(False)
    assert (len(tuned), len(launched)) == (1, 3)
    monkeypatch.delenv("NGRPO_OPS_AUTOTUNE")
    launch()
    assert (len(tuned), len(launched)) == (1, 4) and launched[-1]["BLOCK_D"] == 1024


@pytest.mark.slow
def test_a_tuned_configuration_is_found_again_on_disk(tmp_path):
    """triton's tuner and cache with a stopwatch that prefers 8 warps; the second process measures nothing."""
    program = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from ngrpo_ops.kernels import mix_embeddings, primitives

measured, run = [], []

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_benchmarker(self): return stopwatch

def stopwatch(call, quantiles):
    measured.append(1)
    cells = [cell.cell_contents for cell in call.__closure__]
    config = next(content for content in cells if isinstance(content, triton.Config))
    return [1.0 / config.num_warps] * 3

driver.set_active(Driver())
JITFunction.run = lambda self, *a, **k: run.append(k["num_warps"])
n, table = 5, torch.empty(100, 896, device="meta")
for n in (5, 9):  # the number of positions is no part of the key
    mix_embeddings.forward(table, torch.empty(n, 3, device="meta").long(), torch.empty(n, 3, device="meta"), None)
print(len(measured), run)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"NGRPO_OPS_AUTOTUNE": "1", "TRITON_CACHE_DIR": str(tmp_path)}
    outputs = [
        subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert [out.returncode for out in outputs] == [0, 0], outputs[0].stderr + outputs[1].stderr
    tried = len(configs.candidates("mix_forward_kernel"))
    assert outputs[0].stdout.split(" ", 1) == [str(tried), "[8, 8]\n"]
    assert outputs[1].stdout == "0 [8, 8]\n"


def test_what_is_not_written_is_seen():
    with poisoned_empty():
        assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
        assert torch.ones(2).new_empty(2, dtype=torch.int32).tolist() == [-(2**31)] * 2
        assert torch.empty(2, dtype=torch.bool).all() and torch.empty(2, device="meta").shape == (2,)
