"""What mkdocs does to the pages on their way to the site: links that lead out of docs/ become addresses there."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]+)(#[^()\s]*)?\)")

log = logging.getLogger("mkdocs.hooks.links")


def _outside(page: Path, link: str) -> Path | None:
    """The file that a link of a page leads to, where it is outside of docs/."""
    if re.match(r"[a-z]+:", link):
        return None
    target = Path(os.path.normpath(page.parent / link))
    return None if target.is_relative_to(ROOT / "docs") else target


def on_files(files: Files, config: Any) -> Files:
    """Pictures that lie outside of docs/ come to the site with it, so that no page loads anything from elsewhere."""
    for source in list(files.documentation_pages()):
        page = Path(source.abs_src_path)
        for picture, _, link, _ in LINK.findall(page.read_text()):
            target = _outside(page, link)
            if picture and target is not None and target.exists():
                name = f"pictures/{target.name}"
                if files.get_file_from_path(name) is None:
                    files.append(File.generated(config, name, abs_src_path=str(target)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    source = Path(page.file.abs_src_path)

    def replaced(match: re.Match[str]) -> str:
        picture, text, link, anchor = match.groups(default="")
        target = _outside(source, link)
        if target is None:
            return match[0]
        if not target.exists():
            log.warning("%s links to %s, which does not exist", page.file.src_uri, link)
            return match[0]
        if picture:
            address = os.path.relpath(f"pictures/{target.name}", os.path.dirname(page.file.src_uri) or ".")
        else:
            kind = "tree" if target.is_dir() else "blob"
            address = f"{config.repo_url.rstrip('/')}/{kind}/main/{target.relative_to(ROOT).as_posix()}{anchor}"
        return f"{picture}[{text}]({address})"

    return LINK.sub(replaced, markdown)
