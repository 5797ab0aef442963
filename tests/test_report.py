"""benchmarks/report.py, on figures made up for it."""

from __future__ import annotations

import csv
import itertools
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import report
from peers import NOT_THE_SAME

COLUMNS = (
    "op", "shape", "dtype", "device", "who", "q20_s", "median_s", "q80_s", "peak_mib", "gb", "gb_per_s", "times_ours",
    "best_times_ours", "speed_to_best_peer",
)  # fmt: skip


def row(op, shape, who, median, ratio="", best="", device="cpu", **other):
    spread = {"q20_s": median * 0.9, "q80_s": median * 1.2} if median else {}
    return {
        "op": op, "shape": shape, "dtype": "float32", "device": device, "who": who, "median_s": median, "peak_mib": 3,
        "gb": 1, "gb_per_s": 2, "times_ours": ratio, "speed_to_best_peer": best, **spread, **other,
    }  # fmt: skip


CPU = [
    *(row("decode_step", f"B={b} V=1000", "ours", 1e-3 * b, best=2.5) for b in (1, 64)),
    *(row("decode_step", f"B={b} V=1000", "a peer", 4e-3 * b, ratio=2.5) for b in (1, 64)),
    *(row("decode_step", f"B={b} V=1000", "floor: a copy", 5e-4 * b, ratio=0.5) for b in (1, 64)),
    row("mix_embeddings", "N=4 k=3 V=1000 d=8", "ours", 2e-3, best=0.5),
    row("mix_embeddings", "N=4 k=3 V=1000 d=8", "a peer", 1.3e-3, ratio=0.5, peak_mib="nan"),
    row("mix_embeddings", "N=4 k=3 V=1000 d=8", "unmeasured", ""),
    row("mix_embeddings backward", "N=4 k=3 V=1000 d=8", "ours", 5e-6),
    row("generate", "B=1 new=32", "ours", 1.5),
    row("generate", "B=1 new=32", "plain generate", 1.2, ratio=0.8),
]


def keep(folder: Path, name: str, rows: list[dict]) -> None:
    with (folder / name).open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS if "op" in rows[0] else list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def section(text: str, title: str) -> str:
    """From a heading to the next of its level."""
    level = re.search(rf"^(#+) {re.escape(title)}$", text, flags=re.M)[1]
    return re.search(rf"^{level} {re.escape(title)}\n(.*?)(?=^#{{1,{len(level)}}} |\Z)", text, flags=re.M | re.S)[1]


@pytest.fixture
def page(tmp_path):
    keep(tmp_path, "a-machine.csv", CPU)
    return report.write(tmp_path).read_text()


def cells(text: str, who: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.split(" | ")[1:2] == [who])
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_figures_and_ratios_are_those_of_the_file(page):
    cpu = section(page, "CPU")
    assert "[a-machine](a-machine.csv)" in cpu
    lines = section(cpu, "mix_embeddings").splitlines()
    assert "| N=4 k=3 V=1000 d=8 float32 | ours | 2.00 ms | 1.80 ms to 2.40 ms |  | 2.00 | 3.00 |" in lines
    assert "|  | a peer | 1.30 ms | 1.17 ms to 1.56 ms | 0.500 | 2.00 | not yet measured |" in lines  # not 1.3 / 2
    assert "| backward N=4 k=3 V=1000 d=8 float32 | ours | 5.00 µs | 4.50 µs to 6.00 µs |  | 2.00 | 3.00 |" in lines
    assert "| `mix_embeddings` | 0.500 | not yet measured |" in page
    assert "| `decode_step` | 2.50, 2 cases | not yet measured |" in page
    assert "| `generate` | no peer | not yet measured |" in page


def test_what_was_not_measured_says_so(page):
    cpu = section(page, "CPU")
    assert cells(section(cpu, "mix_embeddings"), "unmeasured")[2:5] == ["not yet measured"] * 3
    every = "nearest_neighbors, NeighborTable.refresh, decode_step, mix_embeddings, selective_log_softmax, "
    every += "group_advantages, generate, vLLM rollout"
    assert section(page, "GPU").strip() == f"Not yet measured: {every}."
    missing = re.sub("(decode_step|mix_embeddings|generate), ", "", every)
    assert cpu.startswith(f"\nNot yet measured: {missing}.\n\nMeasured on ")
    assert section(page, "Compiled for GPUs, and not run").strip() == "Not yet measured."
    steps = section(cpu, "decode_step")
    assert "Over B (1, 64).\nNot yet measured over V (at 1,000), d, k.\n" in steps and "Floor" not in steps
    assert "Not yet measured over N (at 4), V (at 1,000), d (at 8), k (at 3).\nFloor: not yet" in cpu
    assert "nan" not in page and "None" not in page


def test_sizes_of_different_cases_are_not_a_measurement_over_them(tmp_path):
    rows = [row("nearest_neighbors", f"V={v} d=8 {what} k=2", "ours", 1) for v, what in ((10, "table"), (20, "Q=3"))]
    keep(tmp_path, "a.csv", rows)
    text = report.write(tmp_path).read_text()
    assert "Not yet measured over V (at 10 and 20), d (at 8), Q (at 3), k (at 2)." in text


def test_devices_are_apart(tmp_path):
    keep(tmp_path, "both.csv", [*CPU, row("generate", "B=1 new=32", "ours", 0.25, best=3.5, device="cuda")])
    keep(tmp_path, "more.csv", [row("generate", "B=1 new=32", "ours", 0.125, device="cuda")])
    text = report.write(tmp_path).read_text()
    gpu = section(text, "GPU")
    assert "250 ms" in gpu and "125 ms" in gpu and "1.50 s" not in gpu and "250 ms" not in section(text, "CPU")
    assert "| `generate` | no peer | 3.50 |" in text and "| `decode_step` | 2.50, 2 cases | not yet measured |" in text
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert {"report_cpu_generate.png", "report_cuda_generate.png", "report_cuda2_generate.png"} <= pictures
    assert set(re.findall(r"\((\S+\.png)\)", text)) == pictures


def test_an_operation_that_is_new_is_shown_too(tmp_path):
    keep(tmp_path, "a.csv", [row("new thing", "B=1", "ours", 1.5, best=4), *CPU])
    text = report.write(tmp_path).read_text()
    assert "| `new thing` | 4.00 | not yet measured |" in text and "1.50 s" in section(text, "new thing")


def test_the_same_files_give_the_same_page(page, tmp_path):
    pictures = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    (tmp_path / "report_cpu_gone.png").write_bytes(b"of an earlier page")
    assert report.write(tmp_path).read_text() == page and str(tmp_path) not in page
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == pictures


def drawn(monkeypatch, rows):
    figures = []
    monkeypatch.setattr(report.Figure, "savefig", lambda figure, path, dpi: figures.append((figure, dpi)))
    report.draw([report._row({name: str(value) for name, value in r.items()}) for r in rows], Path("x.png"))
    ((figure, dpi),) = figures
    assert 800 <= figure.get_figwidth() * 100 <= 860 and dpi >= 100
    figure.canvas.draw()
    return figure.axes


def test_a_curve_has_its_floor_and_every_member(monkeypatch):
    (axes,) = drawn(monkeypatch, [r for r in CPU if r["op"] == "decode_step"])
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert set(lines) == {"ours", "a peer", "floor: a copy"}
    assert lines["floor: a copy"].get_linestyle() == ":" and lines["floor: a copy"].get_color() == "black"
    assert list(lines["a peer"].get_xdata()) == [1, 64] and list(lines["a peer"].get_ydata()) == [4e-3, 0.256]
    assert (axes.get_xlabel(), [t.get_text() for t in axes.get_xticklabels()]) == ("B", ["1", "64"])
    assert "1 ms" in [t.get_text() for t in axes.get_yticklabels()]


@pytest.mark.parametrize(("floor", "slowest"), [(1.6e-6, 1.0), (1.5e-3, 0.15), (0.1, 0.12)])
def test_cases_are_panels_whose_writing_stays_inside(monkeypatch, floor, slowest):
    (name,) = {"plain generate"} & set(NOT_THE_SAME)
    rows = [
        row("generate", "new=32", "ours", floor * 1.1), row("generate", "new=32", name, slowest, ratio=0.8),
        row("generate", "new=64", "ours", floor * 1.1), row("generate", "new=64", "an empty launch", floor, ratio=1e-6),
    ]  # fmt: skip
    panels = drawn(monkeypatch, rows)
    assert [axes.get_title(loc="left") for axes in panels] == ["new=32 float32", "new=64 float32"]
    marks = {line.get_marker(): line for axes in panels for line in axes.get_lines()}
    assert marks["s"].get_markerfacecolor() == "white" and marks["o"].get_markerfacecolor() == report.OURS
    assert marks["None"].get_linestyle() == ":" and marks["None"].get_xdata()[0] == floor  # the floor, all the way up
    for axes in panels:
        inside = axes.get_window_extent()
        for text in axes.texts:
            assert text.get_window_extent().x1 <= inside.x1, text
        assert all(re.fullmatch(r"[\d,.]+ (s|ms|µs)", t.get_text()) for t in axes.get_xticklabels())
        ticks = [t.get_window_extent() for t in axes.get_xticklabels() if inside.x0 <= t.get_window_extent().x0]
        assert all(a.x1 + 5 < b.x0 for a, b in itertools.pairwise(ticks))


def test_the_search_over_sizes_and_the_compiled_kernels(tmp_path):
    whos = {"ours": 2.0, "a peer": 3.0, "floor: the matrix product alone": 1.0}
    keep(tmp_path, "scaling.csv", [
        {"device": "cuda", "V": v, "d": 896, "who": who, "seconds": "" if (v, who) == (20_000, "a peer") else t}
        for v in (10_000, 20_000) for who, t in whos.items()
    ])  # fmt: skip
    compiled = {"kernel": "x", "target": "cuda:90", "registers": 64, "stack": 0, "spills": 8, "shared": 1024}
    keep(
        tmp_path,
        "resources.csv",
        [compiled, {**compiled, "registers": 32}, dict.fromkeys(compiled, "") | {"target": "cuda:90"}],
    )
    text = report.write(tmp_path).read_text()
    gpu = section(text, "GPU")
    assert "| 10,000 | 896 | 2.00 s | 1.50 | 0.500 |" in gpu and "search_scaling_cuda.png" in gpu
    assert "| 20,000 | 896 | 2.00 s | not yet measured | 0.500 |" in gpu
    assert (tmp_path / "search_scaling_cuda.png").exists()
    assert "| cuda:90 | 2 of 3 | 64 | 0 | 8 | 1,024 |" in text
    assert section(text, "CPU").startswith("\nNot yet measured: nearest_neighbors, ")


def test_sizes_measured_by_the_scaling_are_not_called_unmeasured(tmp_path):
    keep(tmp_path, "a.csv", [row("nearest_neighbors", "V=10 d=8 Q=3 k=2", "ours", 1)])
    keep(tmp_path, "b.csv", [{"device": "cpu", "V": 10, "d": 896, "who": "ours", "seconds": 1.0}])
    text = section(report.write(tmp_path).read_text(), "nearest_neighbors")
    assert "Over V (below), d (below).\nNot yet measured over Q (at 3), k (at 2).\n\n" in text


def test_an_unknown_file_is_named(tmp_path):
    keep(tmp_path, "other.csv", [{"what": 1}])
    with pytest.raises(ValueError, match=r"other\.csv: a CSV of unknown columns \['what'\]"):
        report.write(tmp_path)


def test_the_page_in_the_repository_is_that_of_its_files(tmp_path):
    """After new measurements: make report."""
    results = Path(report.__file__).parent / "results"
    for path in results.glob("*.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert report.write(tmp_path).read_text() == (results / "report.md").read_text()
    assert {path.name for path in tmp_path.glob("report_*.png")} == {path.name for path in results.glob("report_*.png")}


@pytest.mark.parametrize(
    "rows",
    [CPU, [{"device": "cpu", "V": 10, "d": 896, "who": "ours", "seconds": 1.0}],
     [{"kernel": "x", "target": "cuda:90", "registers": 64, "stack": 0, "spills": 8, "shared": 1024}]],
    ids=["measured", "scaling", "resources"],
)  # fmt: skip
@pytest.mark.parametrize(
    "how", ["empty", "header alone", "cut off", "cut off by one", "another type", "zeros", "a folder"]
)
def test_a_damaged_file_is_named(tmp_path, rows, how):
    keep(tmp_path, "a.csv", rows)
    path = tmp_path / "a.csv"
    content = path.read_bytes()
    path.unlink()
    if how == "a folder":
        path.mkdir()
    else:
        ways = {"empty": b"", "header alone": content.splitlines(keepends=True)[0], "cut off": content[:-7],
                "cut off by one": content.rstrip(), "another type": b"\x89PNG\r\n\xff" * 9,
                "zeros": bytes(99)}  # fmt: skip
        path.write_bytes(ways[how])
    with pytest.raises(ValueError, match=r"^a\.csv: "):
        report.write(tmp_path)


@pytest.mark.parametrize(("column", "value"), [("median_s", "fast"), ("seconds", "x"), ("V", "1.5")])
def test_a_value_that_is_no_number_is_named(tmp_path, column, value):
    rows = {"median_s": CPU[0]}.get(column, {"device": "cpu", "V": 10, "d": 896, "who": "ours", "seconds": 1.0})
    keep(tmp_path, "a.csv", [rows | {column: value}])
    with pytest.raises(ValueError, match=rf"^a\.csv: .*{value}"):
        report.write(tmp_path)
