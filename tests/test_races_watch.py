"""The watch over reads and writes itself: it sees what is planted, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from races import watched

from ngrpo_ops.testing import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="the interpreter is what is watched")


@triton.jit
def row_kernel(x, out, columns, stride, past, BLOCK: tl.constexpr):
    """Copies rows of x, `past` elements too many of each."""
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    value = tl.load(x + row * stride + c, mask=c < columns, other=0.0)
    tl.store(out + row * columns + c, value, mask=c < columns + past)


@triton.jit
def sum_kernel(x, out, n, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    """Adds up x, every program a part, in one place."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.sum(tl.load(x + i, mask=i < n, other=0.0), axis=0)
    if ATOMIC:
        tl.atomic_add(out, part)
    else:
        tl.store(out, tl.load(out) + part)


@triton.jit
def shift_kernel(x, BLOCK: tl.constexpr):
    """Moves x by one place, in place: what one program writes another reads."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i + 1))


@triton.jit
def slot_kernel(out, BLOCK: tl.constexpr):
    """Lanes that write to one slot."""
    i = tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0) + i * 0, i.to(tl.float32))


@triton.jit
def back_kernel(out, BLOCK: tl.constexpr):
    """Reads back what other threads of the program have written."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, i.to(tl.float32))
    tl.store(out + i, tl.load(out + i) + 1.0)


def _seen(kernel: Any, programs: int, *args: Any, **constants: Any) -> list[str]:
    with watched() as watch:
        kernel[(programs,)](*args, **constants)
    assert watch.programs == {kernel.__name__: programs}
    return [fault.removeprefix(f"{kernel.__name__}: ") for fault in watch.faults]


def test_the_watch_sees_a_write_past_a_row_and_prevents_it():
    x, whole = torch.randn(3, 10, dtype=torch.float32), torch.zeros(40)
    out = whole[:30].view(3, 10)
    assert _seen(row_kernel, 3, x, out, 10, 10, 0, BLOCK=16) == [] and torch.equal(out, x)
    assert _seen(row_kernel, 3, x, out, 10, 10, 2, BLOCK=16) == [
        "write of what another program writes: out",  # the next row
        "write outside out, which spans 30: element 30",  # after the last
    ]
    assert not whole[30:].any()


def test_the_watch_knows_the_gaps_between_rows():
    x, out = torch.randn(3, 12, dtype=torch.float32)[:, :10], torch.zeros(3, 10)
    assert _seen(row_kernel, 3, x, out, 10, 12, 0, BLOCK=16) == []
    assert _seen(row_kernel, 3, x, out, 10, 11, 0, BLOCK=16) == [
        "read outside x, which spans 34: element 11",
        "read outside x, which spans 34: element 22",
    ]


def test_the_watch_sees_a_race_and_none_between_atomics():
    x, out = torch.ones(64), torch.zeros(1)
    assert _seen(sum_kernel, 4, x, out, 64, ATOMIC=True, BLOCK=16) == [] and out.item() == 64
    found = _seen(sum_kernel, 4, x, out, 64, ATOMIC=False, BLOCK=16)
    assert found == [
        "read of what another program writes: out",
        "write of what another program writes: out",
        "write of what another program reads: out",
    ]
    assert _seen(sum_kernel, 1, x, out, 16, ATOMIC=False, BLOCK=16) == []


def test_the_watch_sees_a_race_through_one_storage():
    """Whether by one argument or by two that share memory, the later program reads or the earlier one does."""
    x = torch.arange(33.0)
    assert _seen(shift_kernel, 2, x, BLOCK=16) == ["write of what another program reads: x"]
    whole = torch.arange(40.0)
    found = _seen(row_kernel, 3, whole[:30].view(3, 10), whole[5:35].view(3, 10), 10, 10, 0, BLOCK=16)
    assert "read of what another program writes: x" in found


def test_the_watch_sees_threads_of_one_program():
    assert _seen(slot_kernel, 2, torch.zeros(2), BLOCK=8) == [
        "lanes of one store write different values to one element of out"
    ]
    assert _seen(back_kernel, 2, torch.zeros(16), BLOCK=8) == [
        "read of what the same program has written, perhaps in another thread: out",
        "write of what the same program has written, perhaps in another thread: out",
    ]


def test_the_watch_ends_with_its_block():
    out = torch.zeros(30)
    with watched() as watch:
        pass
    row_kernel[(3,)](torch.randn(3, 10, dtype=torch.float32), out, 10, 10, 0, BLOCK=16)
    assert watch.faults == [] and not watch.programs
