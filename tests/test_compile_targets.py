"""Every kernel, pinned configuration and dtype compiled for GPUs that are not here; the width of their offsets."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import resources

from ngrpo_ops.kernels import configs, primitives
from ngrpo_ops.kernels.primitives import forced_int64, needs_int64


@pytest.mark.slow
@pytest.mark.parametrize("target", resources.TARGETS)
def test_every_kernel_compiles_without_spills(target):
    # Of the GPUs with little shared memory those that fill it; the table has the others.
    kernels = resources.MULTIPLIES if target == "cuda:89" else set(configs.PINNED)
    rows = resources.compile_all((target,), jobs=1, only=kernels)
    found = {f"{row['kernel']} {row['config']} {row['dtype']}": resources.faults(row) for row in rows}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}
    assert {row["kernel"] for row in rows} == kernels


def test_a_row_that_would_not_pass_is_named():
    good = {"kernel": "k", "target": "cuda:90", "registers": 32, "stack": 0, "spills": 0, "shared": 0, "wgmma": False}
    assert resources.faults(good) == []
    assert resources.faults({**good, "stack": 8, "spills": 16}) == ["stack 8", "spills 16"]
    assert resources.faults({**good, "target": "cuda:89", "stack": 8, "spills": 16, "shared": 98_304}) == []
    assert resources.faults({**good, "target": "cuda:89", "spills": 20, "shared": 102_400}) != []
    assert resources.faults({**good, "shared": 300_000}) == ["shared 300000 above 232448"]
    assert resources.faults({"kernel": "k", "target": "cuda:90", "error": "assertion"}) == ["assertion"]


def test_a_matrix_product_without_wgmma_is_named(monkeypatch):
    monkeypatch.setattr(resources, "MULTIPLIES", {"k"})
    row = {"kernel": "k", "target": "cuda:90", "stack": 0, "spills": 0, "shared": 0, "wgmma": False}
    assert resources.faults(row) == ["no wgmma"]
    assert resources.faults({**row, "wgmma": True}) == resources.faults({**row, "target": "cuda:80"}) == []
    monkeypatch.setattr(resources, "MULTIPLIES_ON_BLACKWELL", {"k"})
    assert resources.faults({**row, "target": "cuda:100"}) == ["no tcgen05"]


def test_the_table_of_resources_is_of_these_kernels():
    """`make resources` was run after the last change of kernels or configurations."""
    kept = resources.RESULTS.read_text().splitlines()
    assert kept[0] == ",".join(resources.COLUMNS)
    configured = {(case.kernel, case.config, case.dtype) for case in _cases()}
    assert len(kept) - 1 == len(configured) * len(resources.TARGETS)
    for kernel, config, dtype in configured:
        assert any(line.startswith(f"{kernel},") and f",{config},{dtype}," in line for line in kept), (kernel, config)


def test_every_pinned_configuration_is_launched_by_a_case():
    assert resources.uncompiled_configs(_cases()) == set()


def _cases() -> tuple[resources.Case, ...]:
    # In this process the kernels are interpreted, and would be launched with the interpreter's tiles.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(primitives, "interpreted", lambda kernel: False)
        return resources.every_case.__wrapped__()


@pytest.mark.parametrize(
    ("shape", "stride", "wide"),
    [
        ((131_072, 151_936), None, True),  # 40 GB of bfloat16 logits
        ((2**31,), None, False),
        ((2**31 + 1,), None, True),
        ((2, 3), (2**31, 1), True),
        ((2, 3), (2**31 - 2, 1), True),
        ((2, 3), (2**31 - 3, 1), False),
        ((1, 3), (2**40, 1), False),
        ((0, 3), (2**40, 1), False),
    ],
)
def test_the_predicate_of_64_bit_offsets(shape, stride, wide):
    x = torch.empty(1, device="meta", dtype=torch.bfloat16).as_strided(shape, stride or _contiguous(shape))
    assert needs_int64(x) == wide
    assert needs_int64(None, torch.empty(3), x) == wide


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(torch.Size(shape[i + 1 :]).numel() for i in range(len(shape)))


def test_forced_64_bits_end_with_the_block():
    with forced_int64():
        assert primitives._force_int64
    assert not primitives._force_int64
