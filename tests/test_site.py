"""The site of docs/: it builds strictly, its API pages are whole, and a browser shows it. `make docs` runs this too."""

from __future__ import annotations

import functools
import http.server
import importlib
import inspect
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ngrpo_ops

ROOT = Path(__file__).parent.parent
API = {page: re.findall(r"^::: ([\w.]+)$", page.read_text(), flags=re.M) for page in (ROOT / "docs/api").glob("*.md")}
DOCUMENTED = [name for names in API.values() for name in names]


def _resolve(path: str) -> Any:
    """What a dotted path of an API page stands for."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def test_every_public_name_is_on_one_api_page() -> None:
    assert sorted(DOCUMENTED) == sorted(set(DOCUMENTED))
    assert {f"ngrpo_ops.{name}" for name in ngrpo_ops.__all__} <= set(DOCUMENTED)


@pytest.mark.parametrize("path", [path for path in DOCUMENTED if ".vllm." not in path])
def test_a_docstring_names_every_parameter_on_a_line_of_its_own(path: str) -> None:
    documented = _resolve(path)
    if not callable(documented):
        return  # ADVANTAGE_PRESETS
    docstring = inspect.cleandoc(documented.__doc__ or "")
    assert "\nExample:\n" not in docstring, "the API pages know the section Examples:"
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", docstring + "\n", flags=re.M)
    entries = re.findall(r"^    (\S[^:]*?): ", section[1], flags=re.M) if section else []
    for entry in entries:
        assert re.fullmatch(r"\*{0,2}\w+", entry), entry
    if inspect.isfunction(documented) and entries:
        assert [entry.lstrip("*") for entry in entries] == list(inspect.signature(documented).parameters)


def test_a_build_without_mkdocs_says_what_to_install() -> None:
    code = "import runpy, sys; sys.modules['mkdocs'] = None; runpy.run_path('docs/build.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "pip install -c constraints.txt '.[docs]'" in done.stderr, done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="no mkdocs: pip install -c constraints.txt '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "docs/build.py", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_links_out_of_docs_are_addresses_of_the_repository(site: Path) -> None:
    repository = re.search(r"^repo_url: &repository (\S+)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    assert repository is not None
    found = 0
    for page in site.rglob("*.html"):
        for link in re.findall(r'href="([^"]+)"', page.read_text()):
            match = re.fullmatch(rf"{re.escape(repository[1])}/(?:blob|tree)/main/([^#]*)(?:#.*)?", link)
            if match is not None:
                found += 1
                assert (ROOT / match[1]).exists(), (page, link)
                assert not (ROOT / match[1]).is_symlink(), (page, link)
                assert not match[1].startswith(("ngrpo_ops/integrations", "ngrpo_ops/kernels")), (page, link)
    assert found > 30


@pytest.mark.slow
def test_every_documented_name_links_to_its_source(site: Path) -> None:
    for page, names in API.items():
        html = (site / "api" / f"{page.stem}.html").read_text()
        for name in names:
            after = html.partition(f'id="{name}"')[2]
            source = re.search(r'href="[^"]*/blob/main/([\w/.]+)#L(\d+)"', after)
            assert source is not None, name
            lines = (ROOT / source[1]).read_text().splitlines()
            following = "\n".join(lines[int(source[2]) - 1 :][:8])
            assert name.rpartition(".")[2] in following, (name, source[0])


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(_Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390], ids=["desk", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_every_page(browser: Any, site: Path, address: str, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    view, errors, elsewhere = context.new_page(), [], []
    view.on("pageerror", lambda error: errors.append(str(error)))
    view.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    view.on("request", lambda request: None if request.url.startswith(address) else elsewhere.append(request.url))
    backgrounds = set()
    for page in sorted(site.rglob("*.html")):
        name = page.relative_to(site).as_posix()
        if name == "404.html" or name.startswith("images/"):  # addresses of the published site; a rollout's own page
            continue
        view.goto(f"{address}/{name}")
        assert view.evaluate("document.documentElement.scrollWidth") <= width, name
        pictures = view.evaluate(
            "[...document.querySelectorAll('article img')].map(i => [i.alt, i.naturalWidth, i.src])"
        )
        assert all(alt and loaded for alt, loaded, _ in pictures), (name, pictures)
        backgrounds.add(view.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert errors == [] and elsewhere == []
    (background,) = backgrounds
    assert (background == "rgb(255, 255, 255)") == (scheme == "light"), background
    context.close()


def _questions() -> list[tuple[str, str]]:
    """Of CONTRIBUTING.md's table: the words that are searched and the page that answers."""
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("## Ten questions")[2]
    return re.findall(r"^\| .*? \| (.*?) \| \[\w+\]\(docs/([\w/]+)\.md\) \|", table, flags=re.M)


def test_there_are_ten_questions() -> None:
    assert len(_questions()) == 10


@pytest.mark.slow
def test_search_finds(browser: Any, address: str) -> None:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    view = context.new_page()
    expected = [("NeighborTable", "api/operations.html#ngrpo_ops.NeighborTable")]
    expected += [(words, f"{page}.html") for words, page in _questions()]
    missing = []
    for words, page in expected:
        view.goto(f"{address}/index.html")
        field = view.locator("input[name=query]")
        field.click()
        field.press_sequentially(words)
        items = view.locator(".md-search-result__item")
        view.locator(".md-search-result__meta", has_text="matching").wait_for()
        links = [link.get_attribute("href") for item in items.all()[:3] for link in item.locator("a").all()]
        found = [re.sub(r"\?[^#]*", "", link or "").removeprefix(f"{address}/") for link in links]
        if not any(link == page or link.startswith(f"{page}#") for link in found):
            missing.append((words, page, found))
    assert missing == []
    context.close()
