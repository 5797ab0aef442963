"""Every kernel, pinned configuration and dtype compiled for GPUs that are not here; the width of their offsets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import compiled
import resources

from ngrpo_ops.kernels import primitives
from ngrpo_ops.kernels.primitives import forced_int64, needs_int64

ROW = {
    "kernel": "k", "target": "cuda:90", "config": "BLOCK=64", "dtype": "fp32", "registers": 32, "stack": 0, "spills": 0,
    "shared": 0, "wgmma": False, "blocks": 16, "instructions": 400, "loop": 0, "barriers": 2, "shuffles": 10,
    "digest": "d", "triton": triton.__version__,
}  # fmt: skip


def _resources(*arguments: str) -> str:
    """What `benchmarks/resources.py` prints, in a process whose kernels are not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, resources.__file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == bool(done.stdout.strip()), done.stderr
    return done.stdout.strip()


# The table --------------------------------------------------------------------------------------------------------


def test_the_table_is_of_these_kernels_and_all_of_them_pass():
    """`make resources` was run after the last change of kernels or configurations: the table has a digest of all that
    is compiled. Nothing spills, and what multiplies does so on the tensor cores."""
    assert _resources("--stale") == ""
    assert resources.RESULTS.read_text().splitlines()[0] == ",".join(resources.COLUMNS)


@pytest.mark.slow
@pytest.mark.parametrize("target", resources.GPUS)
def test_a_sample_of_every_kernel_compiles_to_what_the_table_says(target):
    """The digests vouch for the rest; with another version of triton than the table's, everything is compiled."""
    assert _resources("--check", "--target", target) == ""


def test_a_row_that_would_not_pass_is_named():
    assert resources.faults(ROW) == []
    assert resources.faults({**ROW, "stack": 8, "spills": 16}) == ["stack 8", "spills 16"]
    assert resources.faults({**ROW, "target": "cuda:89", "spills": 1, "shared": 98_304}) == ["spills 1"]
    assert resources.faults({**ROW, "shared": 300_000}) == ["shared 300000 above 232448"]
    assert resources.faults({"kernel": "k", "target": "cuda:90", "error": "assertion"}) == ["assertion"]


@pytest.mark.parametrize(("target", "instruction"), [("cuda:90", "wgmma"), ("cuda:100", "tcgen05")])
def test_a_matrix_product_without_the_tensor_cores_is_named(target, instruction, monkeypatch):
    monkeypatch.setattr(resources, "MULTIPLIES", {"k"})
    row = {**ROW, "target": target}
    assert resources.faults(row) == [f"no {instruction}"]
    assert resources.faults({**row, "wgmma": True}) == resources.faults({**row, "target": "cuda:80"}) == []
    assert resources.faults({**row, "config": "BLOCK_M=16"}) == resources.faults({**row, "config": "L1=True"}) == []


@pytest.mark.parametrize("name", resources.BUDGETED)
def test_more_than_the_budget_is_named(name):
    worse, better = (ROW[name] - 1, ROW[name] + 1) if name == "blocks" else (ROW[name] + 1, ROW[name] - 1)
    assert resources.exceeded([ROW, {**ROW, name: better}], [ROW]) == {}
    line = f"k for cuda:90, fp32, BLOCK=64: {worse} {name}, {ROW[name]} allowed"
    assert resources.exceeded([{**ROW, name: worse}], [ROW]) == {"k": [line]}


def test_a_row_without_a_predecessor_has_the_most_generous_budget_of_its_kernel():
    table = [ROW, {**ROW, "dtype": "bf16", "instructions": 500, "blocks": 8}]
    new = {**ROW, "config": "BLOCK=128", "instructions": 500, "blocks": 8}
    assert resources.exceeded([new], table) == {}
    assert resources.exceeded([{**new, "instructions": 501}], table) == {
        "k": ["k for cuda:90, fp32, BLOCK=128: 501 instructions, 500 allowed"]
    }
    assert resources.exceeded([{**new, "kernel": "new"}, {**new, "target": "cuda:80"}], table) == {}


class _Case(SimpleNamespace):
    """What `resources` reads of a case."""

    @property
    def key(self) -> dict[str, Any]:
        return {"kernel": self.kernel, "target": self.target, "config": self.config, "dtype": self.dtype}


def _case(**changes: Any) -> _Case:
    row = {**ROW, **changes}
    return _Case(**{name: row[name] for name in ("kernel", "target", "config", "dtype", "digest")})


@pytest.fixture
def compiles(monkeypatch):
    """What is compiled, and the figures that come of it."""
    asked: list[_Case] = []
    figures: dict[str, Any] = {}

    def compile_cases(cases: list[_Case], jobs: int | None = None) -> list[dict[str, Any]]:
        asked.extend(cases)
        return [{**ROW, **case.key, "digest": case.digest, **figures} for case in cases]

    monkeypatch.setattr(resources, "compile_cases", compile_cases)
    return asked, figures


def test_only_what_has_changed_is_compiled_and_more_must_be_accepted(compiles):
    asked, figures = compiles
    cases = [_case(), _case(dtype="bf16", digest="new")]
    table = [ROW, {**ROW, "dtype": "bf16"}]
    rows, wrong = resources.update(cases, table, set())
    assert asked == cases[1:] and wrong == [] and rows == [ROW, {**ROW, "dtype": "bf16", "digest": "new"}]
    figures["instructions"] = 401
    rows, wrong = resources.update(cases, table, set())
    assert rows == table  # what was allowed stays what is allowed
    assert wrong == [
        "k for cuda:90, bf16, BLOCK=64: 401 instructions, 400 allowed",
        "to accept this: python benchmarks/resources.py --accept k",
    ]
    assert resources.update(cases, table, {"k"})[1] == []
    figures["spills"] = 4  # a fault is not accepted
    assert resources.update(cases, table, {"k"})[1] == ["k cuda:90 BLOCK=64 bf16: spills 4"]


def test_a_table_of_other_cases_is_stale():
    assert resources.stale([_case()], [ROW]) == []
    assert resources.stale([_case(digest="e")], [ROW]) == ["changed: k cuda:90 BLOCK=64 fp32"]
    assert resources.stale([_case(dtype="bf16")], [ROW]) == [
        "no row: k cuda:90 BLOCK=64 bf16", "no case: k cuda:90 BLOCK=64 fp32",
    ]  # fmt: skip


def test_a_sample_that_the_table_contradicts_is_named(compiles):
    asked, figures = compiles
    cases, table = [_case(digest="b"), _case(dtype="bf16", digest="a")], [ROW, {**ROW, "dtype": "bf16", "digest": "a"}]
    assert resources.check(cases, table) == [] and asked == cases[1:]
    figures["registers"] = 30
    assert resources.check(cases, table) == ["k cuda:90 BLOCK=64 bf16: registers 30, the table has 32"]
    asked.clear()
    other = [{**row, "triton": "0.0"} for row in table]
    assert resources.check(cases, other) == [] and asked == cases  # whose figures may differ
    figures["stack"] = 8
    assert len(resources.check(cases, other)) == 2


# Compiling --------------------------------------------------------------------------------------------------------


def test_a_case_that_kills_the_compiler_is_named_and_the_others_are_compiled(monkeypatch):
    def compile_launch(launch: str, target: str) -> tuple[dict[str, Any], bytes]:
        if launch == "dies":
            os._exit(139)
        if launch == "raises":
            raise ValueError("two\nlines")
        return {"registers": len(launch)}, b""

    monkeypatch.setattr(compiled, "compile_launch", compile_launch)
    monkeypatch.setattr(compiled, "instructions", lambda codes, target: [{"instructions": 1} for _ in codes])
    launches = ["a", "dies", "bb", "raises", "ccc"]
    cases = [
        _Case(launch=launch, kernel="k", target="cuda:90", config=launch, dtype="", digest="") for launch in launches
    ]
    rows = resources.compile_cases(cases, jobs=2)
    assert [row["config"] for row in rows] == launches
    assert [row.get("registers") for row in rows] == [1, None, 2, None, 3]
    assert rows[1]["error"] == "the compiler ended with 139" and rows[3]["error"] == "ValueError: lines"


@triton.jit
def _helper(x):
    return x + 1


LIMIT = tl.constexpr(3)


@triton.jit
def digested_kernel(x, n, BLOCK: tl.constexpr):
    """A docstring."""
    i = tl.arange(0, BLOCK)  # a comment
    tl.store(x + i, _helper(i) * LIMIT, mask=i < n)


def test_the_digest_changes_with_what_is_compiled(monkeypatch):
    def parts() -> str:
        compiled._whole_code.cache_clear()
        return compiled._whole_code(digested_kernel.fn)

    first = parts()
    monkeypatch.setitem(globals(), "LIMIT", tl.constexpr(4))
    assert parts() != first
    monkeypatch.undo()
    assert parts() == first
    sources = {digested_kernel.fn: '''
def digested_kernel(x, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, _helper(i) * LIMIT, mask=i < n)
''', _helper.fn: "def _helper(x):\n    return x + 1\n"}  # fmt: skip
    monkeypatch.setattr(compiled.inspect, "getsource", sources.__getitem__)
    for function in sources:
        sources[function] = "@triton.jit" + ("" if sources[function].startswith("\n") else "\n") + sources[function]
    assert parts() == first  # without docstring and comment
    sources[_helper.fn] = sources[_helper.fn].replace("1", "2")
    assert parts() != first


def test_instructions_are_counted_between_the_padding():
    listing = """\
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   SHFL.BFLY PT, R3, R2, 0x1, 0x1f ;
        /*0020*/                   STL [R1], R2 ;
        /*0030*/               @P0 BRA 0x10 ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/              @!P1 BRA 0x70 ;
        /*0060*/                   EXIT ;
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x80;
        /*0090*/                   NOP;
"""
    lines = [line.split("*/")[1].strip(" ;\n") for line in listing.splitlines()]
    found = compiled._nvidia(lines, 0)
    assert found == {"instructions": 8, "loop": 3, "barriers": 1, "shuffles": 1, "spills": 1}


def test_instructions_of_amd_are_counted():
    text = """\
kernel:
	s_load_dword s0, s[2:3], 0x0
.LBB0_1:                                ; %loop
	v_add_f32_dpp v1, v2, v2 row_shr:1 row_mask:0xf
	ds_bpermute_b32 v1, v2, v3
	s_cbranch_scc1 .LBB0_1
	s_barrier
	s_endpgm
.Lfunc_end0:
	.size kernel, 8
"""
    assert next(compiled.instructions([text.encode()], "hip:gfx942")) == {
        "instructions": 6, "loop": 3, "barriers": 1, "shuffles": 2, "spills": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "blocks"),
    [
        # As CUDA's table of occupancy has them.
        ("cuda:90", 32, 0, 4, 16),
        ("cuda:90", 128, 0, 8, 2),
        ("cuda:90", 168, 0, 4, 3),
        ("cuda:90", 255, 0, 8, 1),
        ("cuda:90", 16, 98_304, 8, 2),
        ("cuda:90", 16, 0, 1, 32),
        ("cuda:89", 40, 0, 4, 12),
        ("cuda:80", 64, 65_536, 8, 2),
        ("hip:gfx942", 128, 0, 4, 4),
    ],
)
def test_blocks_a_multiprocessor(target, registers, shared, warps, blocks):
    assert compiled.blocks(target, registers, shared, warps) == blocks


# Offsets of 64 bits -----------------------------------------------------------------------------------------------


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
