"""Every kernel, configuration and dtype compiled for GPUs that need not be here, and a table of what each takes.

    python benchmarks/resources.py                    # compiles what has changed since the table, and writes it
    python benchmarks/resources.py --accept KERNEL    # also where KERNEL takes more than the table says
    python benchmarks/resources.py --check            # a sample of every kernel and target must match the table
    python benchmarks/resources.py --stale            # what has changed since the table; compiles nothing

The table, benchmarks/results/resources.csv, is a budget. A change that needs more instructions, barriers, shuffles,
registers or shared memory, or leaves room for fewer blocks, is refused until it is accepted by name.

What is compiled is what a GPU would compile (kernel_cases.py). A compiler assertion kills its process: kernels are
compiled in forked processes.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import multiprocessing
import os
import sys
from collections import deque
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import compiled
import triton
from compiled import GPUS
from kernel_cases import Case, every_case, uncompiled_configs

from ngrpo_ops.kernels import configs

RESULTS = Path(__file__).parent / "results" / "resources.csv"
# What must not grow, or not shrink, unless it is accepted.
BUDGETED = ("instructions", "barriers", "shuffles", "registers", "shared", "blocks")
COLUMNS = (
    "kernel", "target", "config", "dtype", "registers", "stack", "spills", "shared", "wgmma", "blocks", "instructions",
    "loop", "barriers", "shuffles", "digest", "triton",
)  # fmt: skip
# Kernels with a matrix product, which must use the tensor cores' own instruction.
MULTIPLIES = {
    "append_pairs_kernel",
    "append_pairs_symmetric_kernel",
    "score_few_kernel",
}


# Compiling --------------------------------------------------------------------------------------------------------

Row = dict[str, Any]


def compile_cases(cases: list[Case], jobs: int | None = None) -> list[Row]:
    """The columns of each case, in their order; a case that did not compile has `error` in the place of figures.

    One forked process compiles a kernel for a target. Where it dies, the case that it was at has killed it, and another
    goes on with the rest.
    """
    jobs = jobs or os.cpu_count() or 1
    context = multiprocessing.get_context("fork")
    order = sorted(range(len(cases)), key=lambda i: (cases[i].kernel, cases[i].target))
    groups = itertools.groupby(order, key=lambda i: (cases[i].kernel, cases[i].target))
    waiting = deque(list(group) for _, group in groups)
    running: dict[Any, tuple[Any, deque[int]]] = {}
    rows: dict[int, Row] = {}
    codes: dict[int, bytes] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            indices = waiting.popleft()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_compile_in_child, args=(theirs, cases, indices))
            process.start()
            theirs.close()
            running[ours] = process, deque(indices)
        for connection in wait(running):
            process, left = running[connection]  # type: ignore[index]
            try:
                row, code = connection.recv()  # type: ignore[union-attr]
            except EOFError:
                process.join()
                del running[connection]  # type: ignore[arg-type]
                if left:
                    rows[left.popleft()] = {"error": f"the compiler ended with {process.exitcode}"}
                    waiting.appendleft(list(left))
                continue
            index = left.popleft()
            rows[index], codes[index] = row, code
            if not left:
                case = cases[index]
                print(f"{case.kernel} for {case.target}, {len(rows)} of {len(cases)}", file=sys.stderr, flush=True)
    for target in dict.fromkeys(case.target for case in cases):
        own = [i for i in codes if cases[i].target == target and "error" not in rows[i]]
        for i, counts in zip(own, compiled.instructions([codes[i] for i in own], target), strict=True):
            rows[i] |= counts
    versions = {"triton": triton.__version__}
    return [{**case.key, **rows[i], "digest": case.digest, **versions} for i, case in enumerate(cases)]


def _compile_in_child(connection: Connection, cases: list[Case], indices: list[int]) -> None:
    for i in indices:
        try:
            found = compiled.compile_launch(cases[i].launch, cases[i].target)
        except Exception as error:
            last = (str(error).strip().splitlines() or [""])[-1]
            found = {"error": f"{type(error).__name__}: {last}"}, b""
        connection.send(found)


# The table --------------------------------------------------------------------------------------------------------


def read_table(path: Path = RESULTS) -> list[Row]:
    """The rows of the table, figures as numbers; none where there is no table."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: int(x) if x.isdecimal() and name not in ("digest", "triton") else x for name, x in row.items()}
                for row in csv.DictReader(file)]  # fmt: skip


def write_table(rows: list[Row], path: Path = RESULTS) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\r\n")
        table.writeheader()
        table.writerows(rows)


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("kernel", "target", "config", "dtype"))


def faults(row: Row) -> list[str]:
    """Why a row would not pass: it did not compile, spills, overflows shared memory, multiplies on slower units."""
    if "error" in row:
        return [row["error"]]
    found = [f"{name} {row[name]}" for name in ("stack", "spills") if row[name]]
    limit = GPUS[row["target"]].shared_block
    if row["shared"] > limit:
        found.append(f"shared {row['shared']} above {limit}")
    # Both multiply 64 rows at least: tiles of fewer queries, which wait for memory, cannot use them; l1 has none.
    without = any(constant in row["config"] for constant in ("BLOCK_M=16", "L1=True"))
    needed = {"cuda:90": "wgmma", "cuda:100": "tcgen05"}.get(row["target"])
    if needed and row["kernel"] in MULTIPLIES and str(row["wgmma"]) != "True" and not without:
        found.append(f"no {needed}")
    return found


def exceeded(rows: list[Row], table: list[Row]) -> dict[str, list[str]]:
    """By kernel, what takes more than the table allows.

    A row has the figures of its predecessor for a budget. One without a predecessor has the most generous figures of
    its kernel and target, and what is wholly new has none.
    """
    before = {key(row): row for row in table}
    found: dict[str, list[str]] = {}
    for row in rows:
        own = [before[key(row)]] if key(row) in before else [
            old for old in table if (old["kernel"], old["target"]) == (row["kernel"], row["target"])
        ]  # fmt: skip
        for name in BUDGETED if own and "error" not in row else ():
            allowed = (min if name == "blocks" else max)(old[name] for old in own)
            if row[name] < allowed if name == "blocks" else row[name] > allowed:
                line = f"{row['kernel']} for {row['target']}, {row['dtype']}, {row['config']}: {row[name]} {name}"
                found.setdefault(row["kernel"], []).append(f"{line}, {allowed} allowed")
    return found


def sample(cases: list[Case]) -> list[Case]:
    """A case of each kernel and target, another one whenever the kernel changes."""
    chosen: dict[tuple[str, str], Case] = {}
    for case in cases:
        best = chosen.setdefault((case.kernel, case.target), case)
        if case.digest < best.digest:
            chosen[case.kernel, case.target] = case
    return list(chosen.values())


def stale(cases: list[Case], table: list[Row]) -> list[str]:
    """Where the table is not that of these cases."""
    digests = {key(row): row["digest"] for row in table}
    expected = {key(case.key): case.digest for case in cases}
    found = [f"no row: {' '.join(k)}" for k in expected if k not in digests]
    found += [f"changed: {' '.join(k)}" for k in expected if digests.get(k, expected[k]) != expected[k]]
    return found + [f"no case: {' '.join(k)}" for k in digests if k not in expected]


def check(cases: list[Case], table: list[Row]) -> list[str]:
    """What is wrong with a sample of the cases, which must match the table. Another version of triton than the table's
    compiles otherwise: then all cases are compiled, and only have to pass."""
    same = {row["triton"] for row in table} == {triton.__version__}
    known = {key(row): row for row in table}
    found = []
    for row in compile_cases(sample(cases) if same else cases):
        name = " ".join(key(row))
        found += [f"{name}: {fault}" for fault in faults(row)]
        if same and (old := known.get(key(row))) is not None and "error" not in row:
            found += [f"{name}: {column} {row[column]}, the table has {old[column]}"
                      for column in COLUMNS if str(row[column]) != str(old[column])]  # fmt: skip
    return found


def update(
    cases: list[Case], table: list[Row], accepted: set[str], jobs: int | None = None
) -> tuple[list[Row], list[str]]:
    """The rows to write, compiled where the table has none that are still true, and what is wrong.

    A kernel of which a row is wrong keeps the rows that it has in the table.
    """
    known = {(*key(row), row["digest"], row["triton"]): row for row in table}
    current = [known.get((*key(case.key), case.digest, triton.__version__)) for case in cases]
    changed = [case for case, row in zip(cases, current, strict=True) if row is None]
    fresh = iter(compile_cases(changed, jobs))
    rows = [next(fresh) if row is None else row for row in current]
    wrong = {row["kernel"]: [] for row in rows if faults(row)}
    for row in rows:
        for fault in faults(row):
            wrong[row["kernel"]].append(f"{' '.join(key(row))}: {fault}")
    for kernel, lines in exceeded(rows, table).items():
        if kernel not in accepted:
            hint = f"to accept this: python benchmarks/resources.py --accept {kernel}"
            wrong.setdefault(kernel, []).extend([*lines, hint])
    kept = [row for row in rows if row["kernel"] not in wrong] + [row for row in table if row["kernel"] in wrong]
    places = {key(row): place for place, row in enumerate([*rows, *table])}  # the order of the table, where it has one
    return sorted(kept, key=lambda row: places[key(row)]), [line for lines in wrong.values() for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=GPUS, action="append", help="only this one; for --check")
    parser.add_argument(
        "--accept", nargs="+", default=[], metavar="KERNEL", help="take these kernels' figures as they are"
    )
    parser.add_argument("--check", action="store_true", help="compile a sample and compare it with the table")
    parser.add_argument("--jobs", type=int, help="processes that compile; by default one a processor")
    parser.add_argument("--stale", action="store_true", help="only say what has changed since the table")
    arguments = parser.parse_args()
    if unknown := set(arguments.accept) - set(configs.PINNED):
        parser.error(f"--accept: no kernel {', '.join(sorted(unknown))}")
    targets = arguments.target or list(GPUS)
    cases = [case for target in targets for case in every_case(target)]
    table = [row for row in read_table() if row["target"] in targets]
    if arguments.check:
        wrong = check(cases, table)
    elif arguments.stale:
        wrong = stale(cases, table) + [f"{' '.join(key(row))}: {fault}" for row in table for fault in faults(row)]
        wrong += sorted(uncompiled_configs(cases))
    elif arguments.target:
        parser.error("--target is for --check and --stale: the table has all targets")
    else:
        rows, wrong = update(cases, table, set(arguments.accept), arguments.jobs)
        wrong += sorted(uncompiled_configs(cases))
        write_table(rows)
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
