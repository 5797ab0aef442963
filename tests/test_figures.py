"""Figures of pages against the committed results that they come from, and generated tables against their generator."""

from __future__ import annotations

import csv
import re
import statistics
import sys
from pathlib import Path

import pytest
from matplotlib import image

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))

import claims
import figures

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("claim", claims.claims(), ids=lambda claim: f"{claim.page}: {claim.text[:40]}")
def test_a_figure_of_a_page_is_that_of_its_file(claim: claims.Claim) -> None:
    page = " ".join((ROOT / claim.page).read_text().split())
    written = " ".join(claim.written().split())
    assert written in page, f"{claim.page} should say: {written}"


def test_every_row_of_the_tables_of_speeds_has_a_claim() -> None:
    """A row without one says that it is of an older run."""
    page = (ROOT / "docs/measured.md").read_text()
    written = " ".join(" ".join(claim.written().split()) for claim in claims.claims())
    for row in re.findall(r"^\| (?!-).* \d[\d.]* m?s \|.*$", page, flags=re.M):
        figures_of_row = re.search(r"\| ([\d./ ]+m?s)", row)
        assert figures_of_row is not None and (figures_of_row[1] in written or "before 0.9" in row), row


@pytest.mark.parametrize("page", figures.pages(), ids=str)
def test_a_generated_table_is_up_to_date(page: Path) -> None:
    assert figures.filled(page.read_text()) == page.read_text(), "python docs/figures.py writes it again"


@pytest.mark.parametrize("folder", ["docs/study", "docs/study/replication"])
def test_the_tables_of_a_study_are_those_of_its_seeds(folder: str) -> None:
    """pass@1 and pass@64 of each arm: the mean over the seeds that are committed."""
    with (ROOT / folder / "seeds.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    report = (ROOT / folder / "report.md").read_text()
    names = {"grpo": "GRPO", "anchor": "anchor only (k = 1)", "ngrpo": "N-GRPO"}
    for task in sorted({row["task"] for row in rows}):
        section = re.search(rf"^## {task}\n(.*?)(?=^## |\Z)", report, flags=re.M | re.S)
        assert section is not None
        for arm, name in names.items():
            line = re.search(rf"^\| {re.escape(name)} \| \d+ \|.*$", section[1], flags=re.M)
            assert line is not None, (task, name)
            for metric in ("pass@1", "pass@64"):
                mean = statistics.mean(float(r[metric]) for r in rows if (r["task"], r["arm"]) == (task, arm))
                assert re.search(rf"\| {mean:.3f} ± ", line[0]), (task, name, metric, mean)


def test_the_report_of_a_real_model_is_that_of_its_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    if not figures.studies():
        pytest.skip("no study of a real model is committed yet")
    for folder in figures.studies():
        assert (folder / "report.md").read_text() == figures.real_model_report(folder), folder


def test_the_picture_of_the_data_flow_is_what_its_code_draws(tmp_path: Path) -> None:
    figures.draw_data_flow(tmp_path / "drawn.png")
    drawn, committed = (image.imread(path) for path in (tmp_path / "drawn.png", ROOT / "docs/how_it_works.png"))
    assert drawn.shape == committed.shape
    differs = abs(drawn - committed).max(axis=2) > 0.1
    assert differs.mean() < 0.001, "python docs/figures.py draws it again"  # another word is some 0.004


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").rglob("*.png")), ids=lambda path: path.name)
def test_a_picture_is_on_a_page(picture: Path) -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    assert any(picture.name in page.read_text() for page in pages), picture


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks/results").glob("*.csv")), ids=lambda path: path.name)
def test_a_row_of_a_measurement_names_its_commit(file: Path) -> None:
    """The commit, alone or with "and changes". Tables that are computed and not measured have other columns."""
    with file.open(newline="") as table:
        rows = list(csv.DictReader(table))
    if {"median_s", "seconds"} & rows[0].keys():
        assert all(re.fullmatch(r"[0-9a-f]{40}( and changes)?", row["commit"]) for row in rows)
