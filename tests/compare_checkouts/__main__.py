"""Shows that two checkouts compute the same, bit for bit, or how long their small calls take.

    python tests/compare_checkouts OTHER_CHECKOUT [--only WORD]
    python tests/compare_checkouts OTHER_CHECKOUT --time [--only WORD]

For a change that moves, renames or rewrites and must not change a value: OTHER_CHECKOUT is one from before it
(`git worktree add ../before COMMIT`). Both run the cases of this folder in processes of the same interpreter, on one
thread each, in plain torch and with the kernels interpreted. Some nine minutes on two cores.

Every tensor and number of every case is compared: dtype, shape and bytes, except that a NaN equals any NaN. After each
case torch's global generator is compared too. The exit status is 1 if anything differs. Of errors the type is compared;
other words of an error or a report are listed and are no difference.

--only WORD takes the cases, or calls, whose "group: name" contains the word. --time compares no values: it times small
calls in alternating processes, and its exit status is 0 however they come out. The ratio is this checkout's time over
the other's; on a machine that does something else too, look at the best times and run it twice.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

THIS = Path(__file__).resolve().parents[2]
ROUNDS = 5  # of --time
SHOWN = 40  # differences


# Processes --------------------------------------------------------------------------------------------------------


def start(checkout: Path, what: str, only: str, file: Path) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PYTHONPATH": str(checkout), "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    environment.pop("TRITON_INTERPRET", None)
    if what == "triton":
        environment["TRITON_INTERPRET"] = "1"
    worker = Path(__file__).with_name("worker.py")
    return subprocess.Popen(
        [sys.executable, str(worker), str(checkout), what, only, str(file)],
        env=environment, cwd=file.parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen[str], file: Path) -> Any:
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"a worker ended with status {process.returncode}:\n{errors[-4000:]}")
    return torch.load(file, weights_only=True)


def results(other: Path, backend: str, only: str, folder: Path) -> tuple[Any, Any]:
    """What the cases give in the other checkout and in this one, which run side by side."""
    places = {folder / f"{backend}-{name}" / "results.pt": path for name, path in (("other", other), ("this", THIS))}
    for file in places:
        file.parent.mkdir()
    processes = {file: start(path, backend, only, file) for file, path in places.items()}
    try:
        first, second = (finish(process, file) for file, process in processes.items())
    finally:
        for process in processes.values():
            process.kill()
    return first, second


# Comparison -------------------------------------------------------------------------------------------------------


class Comparison:
    """Counts what was compared, and keeps what differs (`differences`) or says the same in other words (`changes`)."""

    def __init__(self) -> None:
        self.count = 0
        self.differences: list[str] = []
        self.changes: list[str] = []

    def compare(self, place: str, other: Any, this: Any) -> None:
        if type(other) is not type(this):
            self._differ(place, f"{describe(other)} there, {describe(this)} here")
        elif isinstance(other, Tensor):
            self.count += 1
            self.differences += [f"{place}: {what}" for what in tensor_differences(other, this)]
        elif isinstance(other, dict):
            self._compare_entries(place, other, this, "entries")
        elif isinstance(other, tuple | list):
            self._compare_sequence(place, other, this)
        else:
            self.count += 1
            same = scalar_bits(other) == scalar_bits(this) if isinstance(other, float) else other == this
            if not same:
                self.differences.append(f"{place}: {other!r} there, {this!r} here")

    def _compare_sequence(self, place: str, other: Any, this: Any) -> None:
        kinds = [x[0] if x and isinstance(x[0], str) and isinstance(x, tuple) else None for x in (other, this)]
        if "failed" in kinds:
            for where, kind, value in (("there", kinds[0], other), ("here", kinds[1], this)):
                if kind == "failed":
                    self._differ(place, f"the case failed {where}:\n{value[1]}")
        elif kinds == ["raised", "raised"]:
            self.compare(f"{place}: type of the error", other[1], this[1])
            self._note(place, other[2], this[2])
        elif kinds == ["text", "text"]:
            self.count += 1
            self._note(place, other[1], this[1])
        elif kinds == ["at least", "at least"]:
            self._compare_entries(
                place, other[1], {name: x for name, x in this[1].items() if name in other[1]}, "names"
            )
            added = [name for name in this[1] if name not in other[1]]
            if added:
                self.changes.append(f"{place}: new here: {', '.join(added)}")
        elif len(other) != len(this):
            self._differ(place, f"{describe(other)} there, {describe(this)} here")
        else:
            for i, (x, y) in enumerate(zip(other, this, strict=True)):
                self.compare(f"{place}[{i}]", x, y)

    def _compare_entries(self, place: str, other: dict, this: dict, kind: str) -> None:
        if other.keys() != this.keys():
            missing, new = other.keys() - this.keys(), this.keys() - other.keys()
            self._differ(place, f"{kind} {sorted(missing)} are missing here, {sorted(new)} there")
        for name in other:
            if name in this:
                self.compare(f"{place}.{name}", other[name], this[name])

    def _differ(self, place: str, what: str) -> None:
        self.count += 1
        self.differences.append(f"{place}: {what}")

    def _note(self, place: str, other: str, this: str) -> None:
        if other != this:
            self.changes.append(f"{place}:\n    there: {other}\n    here:  {this}")


def scalar_bits(x: float) -> bytes:
    value = torch.tensor(x, dtype=torch.float64)
    return raw_bytes(value.nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=-torch.inf))[0].numpy().tobytes()


def raw_bytes(x: Tensor) -> Tensor:
    """[elements, bytes of an element]"""
    return x.detach().reshape(-1, 1).contiguous().view(torch.uint8).view(x.numel(), -1)


def tensor_differences(other: Tensor, this: Tensor) -> Iterator[str]:
    """Nothing for equal tensors; else what differs, in words."""
    if (other.dtype, other.shape) != (this.dtype, this.shape):
        yield f"{describe(other)} there, {describe(this)} here"
        return
    if not other.numel():
        return
    different = (raw_bytes(other) != raw_bytes(this)).any(1)
    if other.is_floating_point():
        different &= ~(other.isnan() & this.isnan()).reshape(-1)
    if not bool(different.any()):
        return
    first = int(different.nonzero()[0])
    x, y = other.reshape(-1)[first].item(), this.reshape(-1)[first].item()
    yield f"{int(different.sum())} of {different.numel()} elements, the first at {first}: {x!r} there, {y!r} here"


def describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}" if not value or value[0] != "raised" else f"raised {value[1:]}"
    return f"{type(value).__name__} {value!r}"


def compare(other: Path, only: str) -> int:
    rows: list[tuple[str, ...]] = [("group", "backend", "cases", "comparisons", "differences")]
    differences: list[str] = []
    changes: list[str] = []
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        for backend in ("eager", "triton"):
            there, here = results(other, backend, only, Path(folder))
            for group in there | here:
                found = Comparison()
                found.compare(group, there.get(group, {}), here.get(group, {}))
                numbers = (len(here.get(group, {})), found.count, len(found.differences))
                rows.append((group, backend, *map(str, numbers)))
                differences += [f"{text} ({backend})" for text in found.differences]
                changes += found.changes
                total += found.count
    if not total:
        raise SystemExit(f"no case's name contains {only!r}")
    print_table(rows)
    print_list("messages changed (no difference)", changes)
    print_list("differences", differences)
    print(f"\n{total} comparisons, {len(differences)} differences")
    return 1 if differences else 0


# Times ------------------------------------------------------------------------------------------------------------


def compare_times(other: Path, only: str) -> int:
    samples: dict[str, tuple[list[float], list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "times.pt"
        for turn in range(2 * ROUNDS):
            seconds = finish(start((other, THIS)[turn % 2], "time", only, file), file)
            for name, found in seconds.items():
                samples.setdefault(name, ([], []))[turn % 2].extend(found)
    if not samples:
        raise SystemExit(f"no call's name contains {only!r}")
    rows: list[tuple[str, ...]] = [
        ("microseconds a call", "best there", "here", "ratio", "median there", "here", "ratio")
    ]  # fmt: skip
    for name, (there, here) in samples.items():
        cells = []
        for statistic in (min, median):
            x, y = (1e6 * statistic(seconds) for seconds in (there, here))
            cells += [f"{x:.1f}", f"{y:.1f}", f"{y / x:.2f}"]
        rows.append((name, *cells))
    print_table(rows)
    return 0


def print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for i, row in enumerate(rows):
        print("  ".join(x.ljust(w) if j == 0 else x.rjust(w) for j, (x, w) in enumerate(zip(row, widths, strict=True))))
        if i == 0:
            print("  ".join("-" * w for w in widths))


def print_list(title: str, lines: list[str]) -> None:
    if lines:
        print(f"\n{title}:")
        print("\n".join(f"  {line}" for line in lines[:SHOWN]))
        if len(lines) > SHOWN:
            print(f"  and {len(lines) - SHOWN} more")


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="compare_checkouts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT")
    parser.add_argument("--time", action="store_true", help="time small calls instead of comparing values")
    parser.add_argument("--only", default="", metavar="WORD", help="cases or calls whose name contains this word")
    arguments = parser.parse_args()
    other = arguments.other.resolve()
    if not (other / "ngrpo_ops" / "__init__.py").exists():
        parser.error(f"no checkout of ngrpo_ops in {other}")
    return (compare_times if arguments.time else compare)(other, arguments.only)


if __name__ == "__main__":
    raise SystemExit(main())
