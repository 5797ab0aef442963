"""Redraws every picture and generated table of README.md and docs/ from committed results: `python docs/figures.py`.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. Pictures of the Countdown study come with its runs
alone (`make study`), whose curves are not committed. The pictures of a rollout need a browser, and stay as they
are without one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from data_flow import draw_data_flow

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", flags=re.S)

# Of each model V and d, as its config.json has them.
MODELS = {
    "Qwen2.5-0.5B": (151_936, 896),
    "Qwen2.5-1.5B, Qwen2.5-Math-1.5B": (151_936, 1_536),
    "Qwen2.5-7B": (152_064, 3_584),
    "Llama-3.2-1B": (128_256, 2_048),
    "Llama-3.1-8B": (128_256, 4_096),
    "SmolLM2-135M": (49_152, 576),
}


def _models() -> Iterator[str]:
    """Bytes by the formulas of docs/cost.md, for k = 3 and bfloat16."""
    page = (DOCS / "cost.md").read_text()
    code = re.search(r"```python\n(def .*?)\n\n", page, flags=re.S)
    assert code is not None
    names: dict = {}
    exec(code[1], names)
    yield "| model | V | d | neighbor table | engine's buffer, 8,192 tokens |"
    yield "|---|---|---|---|---|"
    for name, (v, d) in MODELS.items():
        table, buffer = names["table_bytes"](v, d), 8192 * 2 * d
        yield f"| {name} | {v:,} | {d:,} | {table / 2**20:,.0f} MiB | {buffer / 2**20:,.0f} MiB |"


TABLES = {"models": _models}


def pages() -> list[Path]:
    """The pages with generated tables, of README.md and docs/."""
    return [page for page in (ROOT / "README.md", *sorted(DOCS.rglob("*.md"))) if TABLE.search(page.read_text())]


def filled(text: str) -> str:
    """A page with its tables written anew."""

    def table(match: re.Match[str]) -> str:
        return match[1] + "".join(f"{line}\n" for line in TABLES[match[2]]()) + match[3]

    return TABLE.sub(table, text)


def draw_rollout(page: Path, folder: Path) -> bool:
    """Pictures of a rollout's page, light and dark; False where there is no browser."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        return False
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("NGRPO_OPS_BROWSER") or next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as started:
        try:
            browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error:
            return False
        for scheme in ("light", "dark"):
            context = browser.new_context(viewport={"width": 880, "height": 400}, color_scheme=scheme, offline=True)
            view = context.new_page()
            view.goto(page.as_uri())
            view.keyboard.press("Tab")  # the first mixed token shows its candidates
            view.screenshot(path=folder / f"{page.stem}-{scheme}.png", full_page=True)
            context.close()
        browser.close()
    return True


def real_model_report(folder: Path) -> str:
    """The text of a real model's study, from its results."""
    from examples.real_model.report import report

    return report(json.loads((folder / "results.json").read_text()))


def studies() -> list[Path]:
    """The folders of examples/real_model with results."""
    return [path.parent for path in sorted((ROOT / "examples/real_model").rglob("results.json"))]


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    for folder in studies():
        from examples.real_model.report import draw

        draw(json.loads((folder / "results.json").read_text()), folder)
        (folder / "report.md").write_text(real_model_report(folder))
    draw_data_flow(DOCS / "how_it_works.png")
    for page in pages():
        page.write_text(filled(page.read_text()))
    import report

    print(report.write(ROOT / "benchmarks/results"))
    rollout = DOCS / "images/rollout.html"
    if rollout.exists() and not draw_rollout(rollout, rollout.parent):
        print("no headless browser (pip install playwright): the pictures of a rollout stay as they are")


if __name__ == "__main__":
    main()
