"""Everything measured, on one page: `make report` writes report.md and its pictures from the CSV files beside them.

It only reads: a figure that no file has is "not yet measured". The files are those of `make bench` and `make gpu`, of
`make scaling` and of `make resources`, in benchmarks/results or the folder NGRPO_OPS_RESULTS.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import search_scaling
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from peers import NOT_THE_SAME

# What is measured, and the sizes that each is to be measured over.
OPERATIONS = {
    "nearest_neighbors": "V d Q k",
    "NeighborTable.refresh": "V d k",
    "decode_step": "B V d k",
    "mix_embeddings": "N V d k",
    "selective_log_softmax": "N V",
    "group_advantages": "N",
    "generate": "B V d",
    "vLLM rollout": "B V d",
}
DEVICES = {"cpu": "CPU", "cuda": "GPU"}
CURVES = "VdBk"  # drawn as curves where there are several values
MISSING = "not yet measured"
OURS, FLOOR = "#0072B2", "black"
PEERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


@dataclass(frozen=True)
class Row:
    """A member of a comparison; figures are None where the file has none."""

    op: str
    shape: str
    dtype: str
    who: str
    median: float | None
    low: float | None  # 20 %
    high: float | None  # 80 %
    times_ours: float | None
    best_peer: float | None
    bandwidth: float | None  # GB/s
    memory: float | None  # MiB
    scored: float | None  # pairs a query that a search scores one by one

    @property
    def operation(self) -> str:
        return next((name for name in OPERATIONS if self.op.startswith(name)), self.op)

    @property
    def case(self) -> str:
        return f"{self.op.removeprefix(self.operation)} {self.shape} {self.dtype}".strip()

    @property
    def sizes(self) -> dict[str, int]:
        return {name: int(value) for name, value in re.findall(r"\b([A-Za-z])=(\d+)", self.shape)}

    @property
    def is_floor(self) -> bool:
        return self.who.startswith("floor") or self.who == "an empty launch"

    @property
    def seconds(self) -> str:
        return MISSING if self.median is None else duration(self.median)


def write(folder: Path) -> Path:
    """The report of a folder's files.

    Raises:
        ValueError: a CSV of unknown columns, or one that is damaged; the message names the file.
    """
    measured, scaling, resources, predicted = _read(folder)
    for old in folder.glob("report_*.png"):
        old.unlink()
    lines = [*_summary(measured)]
    for device, title in DEVICES.items():
        lines += ["", f"## {title}"]
        of_device = [(name, rows) for which, name, rows in measured if which == device]
        missing = set(OPERATIONS) - {row.operation for _, rows in of_device for row in rows}
        if missing:
            lines += ["", f"{MISSING.capitalize()}: {', '.join(name for name in OPERATIONS if name in missing)}."]
        for number, (name, rows) in enumerate(of_device, start=1):
            lines += ["", f"Measured on [{Path(name).stem}]({name})."]
            for operation in _operations(rows):
                of_operation = [row for row in rows if row.operation == operation]
                picture = f"report_{device}{number if number > 1 else ''}_{re.sub(r'[^a-zA-Z]', '_', operation)}.png"
                below = "V d" if operation == "nearest_neighbors" and device in scaling else ""
                lines += ["", f"### {operation}", "", *_operation(of_operation, below.split(), folder / picture)]
        if device in scaling:
            lines += ["", "### nearest_neighbors over V and d", "", *_scaling(scaling[device], folder, device)]
    lines += ["", "## Compiled for GPUs, and not run", "", *_resources(resources)]
    lines += ["", "## Predicted for an H100, and not measured", "", *_predictions(predicted)]
    report = folder / "report.md"
    report.write_text("\n".join(lines) + "\n")
    return report


def _operations(rows: Iterable[Row]) -> list[str]:
    """In the order of `OPERATIONS`; then those that it does not know."""
    found = {row.operation: None for row in rows}
    return [*(name for name in OPERATIONS if name in found), *(name for name in found if name not in OPERATIONS)]


Measured = list[tuple[str, str, list[Row]]]  # device, file, rows
Scaling = dict[str, list[dict[str, Any]]]  # by device


def _read(folder: Path) -> tuple[Measured, Scaling, list[dict[str, str]], list[dict[str, str]]]:
    measured: Measured = []
    scaling: Scaling = {}
    resources: list[dict[str, str]] = []
    predicted: list[dict[str, str]] = []
    for path in sorted(folder.glob("*.csv")):
        try:
            columns, rows = _table_of(path)
            if {"op", "who", "median_s"} <= columns:
                of_devices = [(d, path.name, [_row(row) for row in rows if row["device"] == d]) for d in DEVICES]
                measured += [part for part in of_devices if part[2]]
            elif {"V", "d", "who", "seconds"} <= columns:
                for row in rows:
                    if (seconds := _number(row["seconds"])) is not None:
                        figures = {"V": int(row["V"]), "d": int(row["d"]), "seconds": seconds}
                        scaling.setdefault(row["device"], []).append({**row, **figures})
            elif {"kernel", "target", "registers"} <= columns:
                resources += rows
            elif {"op", "floor_s", "predicted_s", "published_s"} <= columns:
                for row in rows:
                    for name in ("floor_s", "instructions_s", "predicted_s", "published_s"):
                        _number(row[name])
                predicted += rows
            else:
                raise ValueError(f"a CSV of unknown columns {sorted(columns)}")
        except KeyError as error:
            raise ValueError(f"{path.name}: lacks the column {error}") from error
        except (OSError, ValueError, csv.Error) as error:  # a folder, not UTF-8, not a number, zero bytes
            raise ValueError(f"{path.name}: {error}") from error
    return measured, scaling, resources, predicted


def _table_of(path: Path) -> tuple[set[str], list[dict[str, str]]]:
    """The columns and rows of a CSV.

    Raises:
        ValueError: a file that was cut off, which would else lose rows or digits without a word.
    """
    with path.open(newline="", encoding="utf-8") as file:
        text = file.read()
    table = csv.DictReader(io.StringIO(text, newline=""))
    columns, rows = set(table.fieldnames or ()), list(table)
    if not text.endswith("\n") or not rows or any(None in row or None in row.values() for row in rows):
        raise ValueError(f"a CSV that is empty or cut off, of columns {sorted(columns)}")
    return columns, rows


def _row(row: dict[str, str]) -> Row:
    names = ("median_s", "q20_s", "q80_s", "times_ours", "speed_to_best_peer", "gb_per_s", "peak_mib", "scored_pairs")
    return Row(row["op"], row["shape"], row["dtype"], row["who"], *(_number(row.get(name)) for name in names))


def _number(text: str | None) -> float | None:
    value = float(text or "nan")
    return value if math.isfinite(value) else None


def duration(seconds: float, digits: str = "#.3g") -> str:
    unit, scale = next((u for u in (("s", 1.0), ("ms", 1e-3)) if seconds >= u[1]), ("µs", 1e-6))
    return f"{_digits(seconds / scale, digits)} {unit}"


def _digits(value: float, digits: str = "#.3g") -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:{digits}}"


# The page ---------------------------------------------------------------------------------------------------------


def _summary(measured: Measured) -> Iterator[str]:
    yield "# What was measured"
    yield ""
    yield (
        'Written by `make report` from the CSV files here. "Peer / ours" is a peer\'s time over ours, the median of '
        "runs taken in turn: above 1 we are faster. In the pictures a mark is a median, its bar goes from the 20 % to "
        "the 80 % quantile, hollow marks compute something else and are no peers, and dotted black is the floor."
    )
    yield ""
    yield "| best peer / ours | " + " | ".join(DEVICES.values()) + " |"
    yield "|---" * (1 + len(DEVICES)) + "|"
    others = _operations(row for _, _, rows in measured for row in rows)
    for operation in dict.fromkeys((*OPERATIONS, *others)):
        cells = []
        for device in DEVICES:
            rows = [row for which, _, rows in measured if which == device for row in rows if row.operation == operation]
            best = [row.best_peer for row in rows if row.best_peer is not None]
            cases = "" if len(best) == 1 else f", {len(best)} cases"
            span = " to ".join(_digits(value) for value in sorted({min(best), max(best)})) if best else ""
            cells.append(f"{span}{cases}" if best else "no peer" if rows else MISSING)
        yield f"| `{operation}` | {' | '.join(cells)} |"


def _operation(rows: list[Row], below: list[str], picture: Path) -> Iterator[str]:
    """The section of an operation; `below` are sizes that another section has it over."""
    if any(row.median is not None for row in rows):
        draw(rows, picture)
        yield f"![times of {rows[0].operation} and its peers]({picture.name})"
        yield ""
    over, fixed = [], []
    for size in OPERATIONS.get(rows[0].operation, "").split():
        values = sorted({row.sizes[size] for members in _along(size, rows) for row in members})
        only = sorted({row.sizes[size] for row in rows if size in row.sizes})
        if values:
            over.append(f"{size} ({', '.join(f'{value:,}' for value in values)})")
        elif size in below:
            over.append(f"{size} (below)")
        else:
            fixed.append(f"{size} (at {' and '.join(f'{value:,}' for value in only)})" if only else size)
    if over:
        yield f"Over {', '.join(over)}."
    if fixed:
        yield f"{MISSING.capitalize()} over {', '.join(fixed)}."
    if not below and not any(row.is_floor for row in rows):
        yield f"Floor: {MISSING}."
    yield ""
    yield "| case | who | median | 20 to 80 % | peer / ours | GB/s | memory, MiB |"
    yield "|---|---|---|---|---|---|---|"
    for case, members in _cases(rows).items():
        for i, row in enumerate(members):
            ratio = "" if row.who == "ours" else MISSING if row.times_ours is None else _digits(row.times_ours)
            span = MISSING if row.low is None or row.high is None else f"{duration(row.low)} to {duration(row.high)}"
            figures = (MISSING if value is None else _digits(value) for value in (row.bandwidth, row.memory))
            who = row.who if row.scored is None else f"{row.who}, {_digits(row.scored)} pairs scored a query"
            yield f"| {'' if i else case} | {who} | {row.seconds} | {span} | {ratio} | {' | '.join(figures)} |"


def _cases(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The members of each comparison, ours first, then the fastest."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    for members in cases.values():
        members.sort(key=lambda row: (row.who != "ours", math.inf if row.median is None else row.median))
    return cases


def _scaling(rows: list[dict[str, Any]], folder: Path, device: str) -> Iterator[str]:
    picture = folder / f"search_scaling_{device}.png"
    if not picture.exists():
        search_scaling.draw(rows, picture, DEVICES[device])
    yield f"![seconds of a search over V and over d]({picture.name})"
    yield ""
    whos = list(dict.fromkeys(row["who"] for row in rows if row["who"] != "ours"))
    yield f"| rows | V | d | ours | {' | '.join(f'{who} / ours' for who in whos)} |"
    yield "|---" * (4 + len(whos)) + "|"
    shapes: dict[tuple[int, int, str], dict[str, float]] = {}
    for row in rows:
        shapes.setdefault((row["V"], row["d"], row.get("rows") or search_scaling.RANDOM), {})[row["who"]] = row[
            "seconds"
        ]
    for (v, d, of), times in sorted(shapes.items()):
        ours = times.get("ours")
        ratios = [_digits(times[who] / ours) if ours and who in times else MISSING for who in whos]
        yield f"| {of} | {v:,} | {d:,} | {duration(ours) if ours else MISSING} | {' | '.join(ratios)} |"


def _resources(rows: list[dict[str, str]]) -> Iterator[str]:
    if not rows:
        yield f"{MISSING.capitalize()}."
        return
    yield "[All kernels and configurations](resources.csv); the largest of each:"
    yield ""
    yield "| target | compiled | registers | stack, bytes | spills | shared memory, bytes |"
    yield "|---|---|---|---|---|---|"
    for target in dict.fromkeys(row["target"] for row in rows):
        of_target = [row for row in rows if row["target"] == target]
        compiled = [row for row in of_target if row["registers"]]
        most = (
            max((int(row[name]) for row in compiled), default=0) for name in ("registers", "stack", "spills", "shared")
        )
        yield f"| {target} | {len(compiled)} of {len(of_target)} | {' | '.join(f'{value:,}' for value in most)} |"


def _predictions(rows: list[dict[str, str]]) -> Iterator[str]:
    """What `benchmarks/predictions.py` has computed, for our operations and for kernels that others have measured."""
    if not rows:
        yield f"{MISSING.capitalize()}."
        return

    def time(text: str) -> str:
        seconds = _number(text)
        return "-" if seconds is None else duration(seconds)

    yield (
        "Arithmetic, and no measurement: bytes over bandwidth, the instructions that the kernels above issue on the "
        "busiest multiprocessor, and the launches (`benchmarks/predictions.py`). Latencies are left out, so small "
        "cases take longer. A kernel whose loops depend on its data has no prediction."
    )
    yield ""
    yield "| case | bytes alone | instructions alone | launches | prediction |"
    yield "|---|---|---|---|---|"
    for row in rows:
        if not row["published_s"]:
            yield (
                f"| `{row['op']}` {row['shape']} {row['dtype']} | {time(row['floor_s'])} "
                f"| {time(row['instructions_s'])} | {row['launches']} | {time(row['predicted_s'])} |"
            )
    yield ""
    yield (
        "The same arithmetic for kernels of our own whose like others have measured. The first is bound by its matrix "
        "products and the second by its bytes: nothing published checks the instructions."
    )
    yield ""
    yield "| kernel | predicted | published | ratio | source |"
    yield "|---|---|---|---|---|"
    for row in rows:
        if (published := _number(row["published_s"])) and (predicted := _number(row["predicted_s"])):
            yield (
                f"| {row['op']} {row['shape']} | {duration(predicted)} | {duration(published)} "
                f"| {_digits(predicted / published)} | {row['source']} |"
            )


# The pictures -----------------------------------------------------------------------------------------------------


def draw(rows: list[Row], path: Path) -> None:
    """A panel for each curve over a size, then one for each case that is on none, in the width of a README."""
    rows = [row for row in rows if row.median is not None]
    curves = [(size, members) for size in CURVES for members in _along(size, rows)]
    on_curves = {row for _, members in curves for row in members}
    cases = _cases(row for row in rows if row not in on_curves)
    heights = [3.4] * len(curves) + [0.55 + 0.27 * len(members) for members in cases.values()]
    figure = Figure(figsize=(8.3, sum(heights) + 0.2), layout="constrained")
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    whos = dict.fromkeys(row.who for row in rows if not row.who.startswith("ours") and not row.is_floor)
    colors = {who: PEERS[i % len(PEERS)] for i, who in enumerate(whos)}
    for axes, (size, members) in zip(panels, curves, strict=False):
        _draw_curve(axes, size, members, colors)
    marks = panels[len(curves) :]
    for axes, (case, members) in zip(marks, cases.items(), strict=True):
        _draw_marks(axes, case, members, colors)
    if cases:
        seconds = [value for row in rows if row not in on_curves for value in (row.low, row.median, row.high) if value]
        low, high = math.log10(min(seconds)), math.log10(max(seconds))
        for axes in marks:  # the right third is for what is written beside the marks
            axes.set_xlim(10 ** (low - 0.1), 10 ** (high + 0.5 * (high - low) + 0.3))
            _label_times(axes.xaxis)
        marks[-1].set_xlabel("time")
    figure.savefig(path, dpi=150)


def _along(size: str, rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that differ in one size alone, and do."""
    same: dict[str, list[Row]] = {}
    for row in rows:
        if size in row.sizes:
            same.setdefault(re.sub(rf"\b{size}=\d+ ?", "", row.case), []).append(row)
    return [members for members in same.values() if len({row.sizes[size] for row in members}) > 1]


def _style(row: Row, colors: dict[str, str]) -> dict[str, Any]:
    if row.is_floor:
        return {"color": FLOOR, "marker": "|", "markersize": 6}
    color = OURS if row.who.startswith("ours") else colors[row.who]
    marker = "o" if row.who == "ours" else "D" if row.who.startswith("ours") else "s"
    if row.who in NOT_THE_SAME:  # seen around a mark that covers it
        return {"color": color, "marker": marker, "markerfacecolor": "white", "markersize": 9}
    return {"color": color, "marker": marker, "markersize": 6}


def _draw_curve(axes: Any, size: str, rows: list[Row], colors: dict[str, str]) -> None:
    for who in sorted({row.who for row in rows}, key=lambda who: (who != "ours", who)):
        line = sorted((row for row in rows if row.who == who), key=lambda row: row.sizes[size])
        style = {**_style(line[0], colors), "linestyle": ":" if line[0].is_floor else "-" if who == "ours" else "--"}
        at, seconds = [row.sizes[size] for row in line], [row.median for row in line]
        axes.plot(at, seconds, label=who, linewidth=2 if who == "ours" else 1.3, **style)
    at = sorted({row.sizes[size] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(at, [f"{x:,}" for x in at])
    axes.set_xticks([], minor=True)
    axes.set_yscale("log")
    _label_times(axes.yaxis)
    axes.set_title(re.sub(rf"\b{size}=\d+ ?", "", rows[0].case), fontsize=10, loc="left")
    axes.set_xlabel(size)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)


def _label_times(axis: Any) -> None:
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 50 else (1,), numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda seconds, _: duration(seconds, "g")))
    axis.set_minor_formatter(NullFormatter())


def _draw_marks(axes: Any, case: str, rows: list[Row], colors: dict[str, str]) -> None:
    for y, row in enumerate(reversed(rows)):
        spread = [[row.median - (row.low or row.median)], [(row.high or row.median) - row.median]]
        axes.errorbar([row.median], [y], xerr=spread, linestyle="none", **_style(row, colors))
        ratio = "" if row.times_ours is None else f"  ({_digits(row.times_ours)} x ours)"
        axes.annotate(
            f"{row.seconds}{ratio}",
            (row.high or row.median, y),
            (8, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
        if row.is_floor:
            axes.axvline(row.median, color=FLOOR, linestyle=":", linewidth=1)
    axes.set_yticks(range(len(rows)), [textwrap.fill(row.who, 38) for row in reversed(rows)], fontsize=9)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xscale("log")
    axes.set_title(case, fontsize=10, loc="left")
    axes.grid(axis="x", alpha=0.3)


def main() -> None:
    folder = Path(os.environ.get("NGRPO_OPS_RESULTS") or Path(__file__).parent / "results")
    print(f"written to {write(folder)}")


if __name__ == "__main__":
    main()
