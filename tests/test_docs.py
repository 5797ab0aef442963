"""The pages: links lead somewhere, code runs, commands exist, what is generated is up to date."""

from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import snippets
from markdown_it import MarkdownIt
from markdown_it.token import Token

from ngrpo_ops.integrations import trl as adapter

ROOT = snippets.ROOT
LINKED = [
    *snippets.PAGES,
    ROOT / "CHANGELOG.md",
    ROOT / "SECURITY.md",
    *(ROOT / "docs/api").glob("*.md"),
    *(ROOT / "docs/study").rglob("*.md"),
    *(ROOT / "benchmarks").rglob("*.md"),
]
WITH_AN_ENGINE = {"vllm.md"}  # tests/engines runs it


def _inline(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from _inline(token.children or [])


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    tokens = MarkdownIt().parse(page.read_text())
    headings = [after.content for token, after in itertools.pairwise(tokens) if token.type == "heading_open"]
    documented = re.findall(r"^::: ([\w.]+)$", page.read_text(), flags=re.M)  # anchors of the site
    return {*documented} | {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = [
        str(token.attrs.get("href") or token.attrs.get("src"))
        for token in _inline(MarkdownIt().enable("table").parse(page.read_text()))
        if token.type in ("link_open", "image")
    ]
    for link in links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in _anchors(target), link


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.name == "README.md" or f"({page.relative_to(ROOT / 'docs')})" in index, page


def _sentences(page: Path) -> Iterator[str]:
    """The sentences and the cells of a page, of eight words and more; no code, no links' targets."""
    text = re.sub(r"^```.*?^```|^    .*?$|<!-- table.*?<!-- end -->", "", page.read_text(), flags=re.M | re.S)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)|<picture>.*?</picture>", "", text, flags=re.S)  # a picture may stand on two
    text = re.sub(r"\]\([^)]*\)", "]", text)
    for block in re.split(r"\n\s*\n|^\s*[-|\d#]|\|", text, flags=re.M):
        for sentence in re.split(r"(?<=[.:?!])\s", " ".join(block.split())):
            if len(sentence.split()) >= 8:
                yield sentence


def test_no_sentence_stands_twice() -> None:
    pages: dict[str, list[str]] = {}
    for page in snippets.PAGES:
        for sentence in _sentences(page):
            pages.setdefault(sentence, []).append(page.name)
    assert {sentence: names for sentence, names in pages.items() if len(names) > 1} == {}


class _Here(adapter.NGRPOConfig):
    """What a page leaves to the machine: no GPU, and no hours."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1} | kwargs)


@pytest.mark.parametrize(
    "page",
    [page for page in snippets.PAGES if snippets.blocks(page) and page.name not in WITH_AN_ENGINE],
    ids=lambda page: page.name,
)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = snippets.save_model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adapter, "NGRPOConfig", _Here)
    names: dict[str, Any] = snippets.run(page, model)
    if "trainer" in names:
        rows = [row for row in names["trainer"].state.log_history if "mix/replay_error" in row]
        assert rows and max(row["mix/replay_error"] for row in rows) < 1e-5
    if "emitted" in names:
        assert float((names["logprobs"] - names["record"].logprobs)[names["emitted"]].abs().max()) < 1e-5


def _commands() -> list[str]:
    """Every line of shell in the pages, comments and prompts off."""
    found = []
    for page in snippets.PAGES:
        for token in MarkdownIt().parse(page.read_text()):
            if token.type == "code_block" or (token.type == "fence" and token.info in ("bash", "sh")):
                for line in re.sub(r"\\\n\s*", "", token.content).splitlines():
                    found += [part.strip() for part in line.partition("#")[0].split("&&") if part.strip()]
    return [command for command in found if re.match(r"(make|python|pip|pytest) ", command)]


@pytest.mark.parametrize("command", sorted(set(_commands())))
def test_commands_exist(command: str) -> None:
    words = command.split()
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        assert re.search(rf"^{words[1]}:", makefile, flags=re.M), command
    elif words[0] == "pip":
        extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
        for names in re.findall(r"\[([\w,]+)\]", command):
            assert set(names.split(",")) <= extras | {"vllm"}, command
    elif words[1] == "-m":
        module = words[2]
        assert importlib.util.find_spec(module) is not None, command
    else:
        assert (ROOT / words[1]).exists(), command


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "-m examples.countdown",
        "-m examples.real_model",
        "examples/countdown/study.py",
        "examples/train.py",
        "-m ngrpo_ops",
        "-m ngrpo_ops neighbors",
        "-m ngrpo_ops rollout",
    ],
)
def test_commands_explain_themselves(command: str) -> None:
    done = subprocess.run([sys.executable, *command.split(), "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr
