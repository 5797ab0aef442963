"""How kernels are launched: the device guard, strides and contiguity, pinned configurations, opt-in tuning."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from ngrpo_ops.kernels import configs, primitives
from ngrpo_ops.testing import poisoned_empty

MODULES = [
    importlib.import_module(f"ngrpo_ops.kernels.{path.stem}")
    for path in (Path(__file__).parent.parent / "kernels").glob("*.py")
]
KERNELS = {name: getattr(module, name) for module in MODULES for name in dir(module) if name.endswith("_kernel")}


def test_every_kernel_has_a_pinned_configuration_and_a_tile():
    assert set(KERNELS) == set(configs.PINNED) == set(configs._INTERPRETED) >= set(configs.TUNING_KEYS)
    for name, kernel in KERNELS.items():
        arguments = set(kernel.arg_names)
        assert set(configs.TUNING_KEYS.get(name, [])) <= arguments
        assert set(configs.ACCUMULATED.get(name, [])) <= arguments
        others = [pinned for (kernel, _), pinned in configs.PINNED_FOR.items() if kernel == name]
        for pinned in (configs.PINNED[name], *others):
            limits = [limit for limit, _ in pinned]
            assert limits == sorted(limits) and limits[-1] == 2**31
        every = [config for pinned in others for _, config in pinned]
        assert {frozenset(config.kwargs) for config in every} <= {frozenset(configs.PINNED[name][0][1].kwargs)}
        for config in (*every, *configs.candidates(name), configs.pinned(name, 100, interpreted=True)):
            assert set(config.kwargs) <= arguments
            assert all(block == triton.next_power_of_2(block) for block in config.kwargs.values())


def test_a_row_takes_the_narrowest_configuration_that_holds_it():
    assert configs.pinned("mix_forward_kernel", 256).kwargs["BLOCK_D"] == 256
    assert configs.pinned("mix_forward_kernel", 257).kwargs["BLOCK_D"] == 1024
    assert configs.pinned("mix_forward_kernel", 10**6).kwargs["BLOCK_N"] == 1


def test_an_architecture_may_have_configurations_of_its_own(monkeypatch):
    assert {kernel for kernel, _ in configs.PINNED_FOR} <= set(configs.PINNED)
    usual, other = configs.PINNED["mix_forward_kernel"], ((2**31, triton.Config({"BLOCK_N": 4, "BLOCK_D": 64})),)
    monkeypatch.setitem(configs.PINNED_FOR, ("mix_forward_kernel", "cuda:100"), other)
    assert configs.pinned_for("mix_forward_kernel") == usual
    with configs.for_architecture("cuda:100"):
        assert configs.pinned("mix_forward_kernel", 7) == other[0][1]
    with configs.for_architecture("cuda:90"):
        assert configs.pinned_for("mix_forward_kernel") == usual


def test_the_architecture_is_that_of_the_current_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    capabilities = [(9, 0), (10, 0), (10, 3), (12, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
    monkeypatch.setattr(torch.version, "hip", None)
    configs._of_device.cache_clear()
    found = []
    for device in range(4):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        found.append(configs._architecture())
    configs._of_device.cache_clear()
    assert found == ["cuda:90", "cuda:100", "cuda:100", "cuda:120"]


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
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    x = torch.ones(2).as_subclass(OnGpu)
    assert primitives.launcher()(lambda scale, x: list(entered))(1.0, x) == [torch.device("cuda", 1)]
    assert entered == [torch.device("cuda", 1), None]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert primitives.launcher()(lambda scale, x: len(entered))(1.0, x=x) == 2  # it is the current one


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


@pytest.mark.slow
def test_a_bound_launch_is_what_triton_would_have_launched(tmp_path):
    """Whatever the arguments: types, alignment, integers that are 1, multiples of 16 or wide, and missing tensors. Each
    launch is made twice, which binds it and then calls it directly, and once by triton."""
    program = """
import itertools, sys
import torch, triton, triton.language as tl
from triton import Config
from fake_driver import fake_gpu, launches
from ngrpo_ops.kernels import configs, primitives

@triton.jit(do_not_specialize=["free"])
def bound_kernel(x, y, n, free, scale, flag, K: tl.constexpr, INT64: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n) * scale + K
    if y is not None:
        value += tl.load(y + i) * flag
    tl.store(x + i + free, value)

small, large = Config({"BLOCK": 16}, num_warps=1), Config({"BLOCK": 32}, num_warps=2)
configs.PINNED["bound_kernel"] = ((100, small), (2**31, large))
memory = torch.zeros(64)
xs = (memory, memory[1:], memory[4:], memory.half(), torch.nn.Parameter(memory))
ints = (0, 1, 2, 16, 48, -1, -16, 2**31 - 1, 2**31, -2**31, 2**40, 2**63 - 1, 2**63)
variants = [dict(x=x, y=y) for x in xs for y in (None, memory, memory[1:])]
variants += [dict(n=n) for n in ints] + [dict(free=n) for n in ints]
variants += [dict(flag=f) for f in (True, False, 1, 1.5)] + [dict(scale=1.0), dict(scale=2)]
variants += [dict(K=k) for k in (1, 2)] + [dict(width=w) for w in (5, 500)] + [dict(INT64=True)]
usual = dict(x=memory, y=None, n=7, free=7, scale=0.5, flag=1.0, K=3, width=5)
direct = 0
with fake_gpu():
    for _ in range(2):
        for variant in variants:
            given = usual | variant
            wide, width = given.pop("INT64", False), given.pop("width")
            primitives._force_int64 = wide
            before = sum(len(b.compiled) for b in primitives._bound.values())
            with launches() as ours:
                primitives.launch(bound_kernel, lambda meta: (3, meta["BLOCK"]), width=width, int64_for=(), **given)
            direct += before == sum(len(b.compiled) for b in primitives._bound.values())
            config = small if width == 5 else large
            with launches() as tritons:
                grid, options = (3, config.kwargs["BLOCK"]), config.all_kwargs() | primitives.OPTIONS
                bound_kernel[grid](**given, INT64=wide, **options)
            (mine, my_arguments), (its, its_arguments) = *ours, *tritons
            assert mine is its, variant
            assert my_arguments[:3] == its_arguments[:3] == (*grid, 1)
            assert len(my_arguments) == len(its_arguments)
            for a, b in zip(my_arguments[9:], its_arguments[9:]):
                assert a is b or a == b, variant
print(len(variants), direct >= len(variants), len(bound_kernel.device_caches[0][0]) > 12)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parent.parent
    environment["PYTHONPATH"] = os.pathsep.join([str(root / "benchmarks"), environment.get("PYTHONPATH", "")])
    script = tmp_path / "bound.py"  # triton reads a kernel's source from its file
    script.write_text(program)
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    variants, all_direct, many_kernels = done.stdout.split()
    assert int(variants) > 40 and all_direct == many_kernels == "True"
