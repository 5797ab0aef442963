"""How ours and its peers are timed: cases, devices, and what is noted of each."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the examples are not installed

from examples.measure import commit

COMMIT = commit()  # before anything is measured and written
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def keep_freed_memory() -> None:
    """glibc gives large blocks back to the system and takes them anew, or not, by the history of the process: up to a
    millisecond of page faults for one member of a comparison and not for the next. Here they are kept, for all."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


class Case(NamedTuple):
    """One member of a comparison: what it runs, the bytes that any implementation must move, and of a search the pairs
    that it scores one by one, a query."""

    op: str
    shape: str
    dtype: str
    moved: int
    run: Callable[[], Any]
    rounds: int = 15
    scored: float | None = None


def compare(benchmark: Any, make: Callable[[str, str], Case], who: str, device: str) -> None:
    """Times one member of a comparison and notes its peak memory beyond what was there; for a peer also its time over
    ours, of runs taken in turn, the median and the best of both: what else the machine does then meets both."""
    case = make(device, who)
    if benchmark.disabled:  # does it run?
        benchmark(case.run)
        return

    def finished(run: Callable[[], Any] = case.run) -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    finished()  # compiled, and the threads are up
    with _peak_memory(device) as peak:
        finished()
    benchmark.group = f"{case.op} {case.shape} {case.dtype} {device}"
    benchmark.extra_info.update(
        op=case.op,
        shape=case.shape,
        dtype=case.dtype,
        device=device,
        who=who,
        gb=case.moved / 1e9,
        peak_mib=peak.mib,
        scored_pairs=case.scored,
    )
    # The few rounds of a case are of one that takes seconds, and it has run twice already.
    benchmark.pedantic(finished, rounds=case.rounds, warmup_rounds=2 if case.rounds > 5 else 0)
    if who != "ours":
        ours = make(device, "ours").run
        finished(ours)
        pairs = [(_seconds(finished, case.run), _seconds(finished, ours)) for _ in range(case.rounds)]
        benchmark.extra_info["times_ours"] = sorted(theirs / mine for theirs, mine in pairs)[len(pairs) // 2]
        theirs, mine = (min(seconds) for seconds in zip(*pairs, strict=True))
        benchmark.extra_info["best_times_ours"] = theirs / mine


def _seconds(finished: Callable[[Callable[[], Any]], None], run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    finished(run)
    return time.perf_counter() - began


class _peak_memory:
    """The most memory in use at once, less what was in use before; on Linux, else not a number."""

    mib = float("nan")

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def __enter__(self) -> _peak_memory:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # what is kept for the next call would hide what this one takes
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
            self.before = self._resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            self.mib = (torch.cuda.max_memory_allocated() - self.before) / 2**20
        else:
            self.mib = self._resident("VmHWM") - self.before

    @staticmethod
    def _resident(name: str) -> float:
        try:
            return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024  # type: ignore[index]
        except (OSError, TypeError):
            return float("nan")


def file_name(device: str) -> str:
    """Of the figures measured here."""
    return re.sub(r"\W+", "-", environment(device))


def environment(device: str) -> str:
    """Device and versions."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        with suppress(OSError):
            lines = Path("/proc/cpuinfo").read_text()
        found = re.search(r"model name\s*:\s*(.+)", lines)
        name = f"{found[1] if found else platform.machine()} {torch.get_num_threads()} threads"
    with suppress(ImportError):
        import triton

        return f"{name} torch {torch.__version__} triton {triton.__version__}"
    return f"{name} torch {torch.__version__}"
