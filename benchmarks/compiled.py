"""What a launch compiles to for a GPU that need not be here: registers, memory, instructions, blocks a multiprocessor.

Everything is read from what triton itself builds, so it is right whichever assembler and options a version of triton
uses: registers and stack from the cubin by cuobjdump, instructions by nvdisasm. nvdisasm takes half a second to start.
It is therefore started once for the code of many kernels.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import re
import struct
import subprocess
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ngrpo_ops.kernels import configs
from ngrpo_ops.kernels.primitives import OPTIONS, Launch


class Gpu(NamedTuple):
    """What a target has: bytes of shared memory for a block and for all, warps and blocks at a time, registers."""

    target: GPUTarget
    shared_block: int
    shared: int
    warps: int
    blocks: int
    registers: int = 65_536


# Of NVIDIA's a multiprocessor, of AMD's a compute unit, whose registers are those of one lane of its four units.
GPUS = {
    "cuda:80": Gpu(GPUTarget("cuda", 80, 32), 166_912, 167_936, 64, 32),
    "cuda:90": Gpu(GPUTarget("cuda", 90, 32), 232_448, 233_472, 64, 32),
    "cuda:100": Gpu(GPUTarget("cuda", 100, 32), 232_448, 233_472, 64, 32),
    "hip:gfx942": Gpu(GPUTarget("hip", "gfx942", 64), 65_536, 65_536, 32, 32, 4 * 512),
    "cuda:89": Gpu(GPUTarget("cuda", 89, 32), 101_376, 102_400, 48, 24),
}

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
NAMES |= {torch.int64: "i64", torch.int32: "i32", torch.bool: "i1", torch.uint8: "u8"}


# Source -----------------------------------------------------------------------------------------------------------


def constants(launch: Launch) -> dict[str, Any]:
    every = {**launch.arguments, **launch.config.kwargs}
    annotations = launch.kernel.fn.__annotations__
    return {name: every[name] for name in launch.kernel.arg_names if "constexpr" in str(annotations.get(name))}


def _signature(launch: Launch) -> tuple[dict[str, str], dict[Any, Any], dict[Any, Any]]:
    """What triton's own launch would specialise on: element types, 16-byte alignment, integers that are 1."""
    every = {**launch.arguments, **launch.config.kwargs}
    signature: dict[str, str] = {}
    fixed: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = every[parameter.name]
        specialise = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and specialise):
            signature[parameter.name] = "constexpr"
            fixed[(index,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + NAMES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and specialise:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return signature, fixed, attributes


def source(launch: Launch) -> ASTSource:
    return ASTSource(launch.kernel, *_signature(launch))


def _options(launch: Launch, target: str) -> dict[str, Any]:
    config = launch.config
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, **OPTIONS}
    if target.startswith("hip"):
        options["num_stages"] = min(config.num_stages, configs.HIP_STAGES)
    elif config.maxnreg is not None:
        options["maxnreg"] = config.maxnreg
    return options


def _code(function: Any, seen: dict[str, str]) -> None:
    """The text of a kernel, of what it calls and of the constants it reads, without comments and docstrings."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            del node.body[0]
    seen[function.__qualname__] = ast.unparse(tree)  # the same by every version of Python, as a dump is not
    for name in {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - set(seen):
        value = function.__globals__.get(name)
        if hasattr(value, "fn") and hasattr(value, "arg_names"):
            if value.fn.__qualname__ not in seen:
                _code(value.fn, seen)
        elif isinstance(value, (int, float, str, triton.language.constexpr)):
            seen[name] = repr(value)


@functools.cache
def _whole_code(function: Any) -> str:
    code: dict[str, str] = {}
    _code(function, code)
    return hashlib.sha256(repr(sorted(code.items())).encode()).hexdigest()


def digest(launch: Launch, target: str) -> str:
    """Changes with anything that changes what is compiled, except the version of triton."""
    parts = (_whole_code(launch.kernel.fn), *_signature(launch), sorted(_options(launch, target).items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


# Compiling --------------------------------------------------------------------------------------------------------


def compile_launch(launch: Launch, target: str) -> tuple[dict[str, Any], bytes]:
    """The columns of the table but those of `instructions`, and the machine code, of AMD's as text."""
    gpu = GPUS[target]
    compiled = triton.compile(source(launch), target=gpu.target, options=_options(launch, target))
    warps, shared = launch.config.num_warps, compiled.metadata.shared
    if target.startswith("hip"):
        text = compiled.asm["amdgcn"]

        def count(name: str) -> int:
            return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]

        registers, stack, code, tensor = (
            count("vgpr_count"), count("private_segment_fixed_size"), text.encode(), "mfma" in text,
        )  # fmt: skip
    else:
        ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
        registers, stack = _usage(cubin)
        code, tensor = _text(cubin), "tcgen05.mma" in ptx if gpu.target.arch >= 100 else "wgmma" in ptx
    row = {"registers": registers, "stack": stack, "shared": shared, "wgmma": tensor}
    return {**row, "blocks": blocks(target, registers, shared, warps)}, code


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    return int(found[1]), int(found[2])  # type: ignore[index]


def _text(cubin: bytes) -> bytes:
    """The machine code of a cubin, an ELF file with one kernel."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    for name, _, _, _, start, length in sections:
        begin = sections[names][4] + name
        if cubin[begin : cubin.index(b"\0", begin)].startswith(b".text."):
            return cubin[start : start + length]
    raise ValueError("a cubin without code")


def blocks(target: str, registers: int, shared: int, warps: int) -> int:
    """Blocks that a multiprocessor has room for, by registers, shared memory and warps."""
    gpu = GPUS[target]
    if target.startswith("hip"):  # registers in eights of a lane, 8 waves a unit at most
        waves = 4 * min(8, gpu.registers // 4 // (-(-max(registers, 1) // 8) * 8))
        by_registers, reserved = waves // warps, 0
    else:  # by the warp, in units of 256; 1 KiB of shared memory a block is the system's
        a_warp = -(-registers * 32 // 256) * 256
        # Each of the four parts of a multiprocessor has a quarter of the registers.
        by_registers, reserved = gpu.registers // 4 // a_warp * 4 // warps, 1024
    by_shared = gpu.shared // (shared + reserved) if shared + reserved else gpu.blocks
    return min(gpu.blocks, gpu.warps // warps, by_registers, by_shared)


# Instructions -----------------------------------------------------------------------------------------------------


def instructions(codes: Sequence[bytes], target: str) -> Iterator[dict[str, int]]:
    """Of each code, what a warp's program has: instructions, those of them within a loop, barriers, shuffles, and
    spills, which are accesses of the stack."""
    if target.startswith("hip"):
        yield from (_count(*_read_amd(code.decode()), _AMD) for code in codes)
        return
    if not codes:
        return
    arch = GPUS[target].target.arch
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "--binary", f"SM{arch}{'a' * (arch >= 90)}", file.name]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    every = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", listing)
    lines = {int(address, 16): text for address, text in every}
    if len(lines) != sum(map(len, codes)) // 16:
        raise ValueError("nvdisasm left instructions out")
    start = 0
    for code in codes:
        yield _nvidia([lines[address] for address in range(start, start + len(code), 16)], start)
        start += len(code)


def _nvidia(lines: list[str], start: int) -> dict[str, int]:
    """Of the instructions of a kernel whose code starts at an address."""
    while lines and (lines[-1] == "NOP" or _target(lines[-1], start) == len(lines) - 1):  # padding, an endless jump
        lines = lines[:-1]
    jumps = [(at, to) for at, line in enumerate(lines) if (to := _target(line, start)) is not None]
    return _count(lines, jumps, _NVIDIA)


def _target(line: str, start: int) -> int | None:
    found = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)$", line)
    return (int(found[1], 16) - start) // 16 if found else None


def _read_amd(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        line = line.split(";")[0].strip()
        if found := re.fullmatch(r"(\.L\w+):", line):
            labels[found[1]] = len(lines)
        elif re.match(r"(s|v|ds|global|buffer|flat|scratch)_\w+", line):
            lines.append(line)
    jumps = [(i, labels[name]) for i, line in enumerate(lines) if (name := line.split()[-1]) in labels]
    return lines, jumps


_NVIDIA = {"barriers": r"\bBAR\b", "shuffles": r"\b(SHFL|REDUX)\b", "spills": r"\b(LDL|STL)\b"}
_AMD = {"barriers": r"^s_barrier", "shuffles": r"ds_bpermute|ds_swizzle|permlane|_dpp\b", "spills": r"^scratch_"}


def _count(lines: list[str], jumps: list[tuple[int, int]], kinds: dict[str, str]) -> dict[str, int]:
    looped = {i for at, to in jumps if to <= at for i in range(to, at + 1)}
    found = {kind: sum(bool(re.search(pattern, line)) for line in lines) for kind, pattern in kinds.items()}
    return {"instructions": len(lines), "loop": len(looped), **found}
