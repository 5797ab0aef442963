"""The code of the pages: what is in blocks marked as Python, page by page."""

from __future__ import annotations

from pathlib import Path

from markdown_it import MarkdownIt
from models import byte_tokenizer, tiny_model

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODELS = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B")  # on the hub; a tiny one stands in for them


def blocks(page: Path) -> list[str]:
    """Page by page in its order."""
    return [
        token.content
        for token in MarkdownIt().parse(page.read_text())
        if token.type == "fence" and token.info == "python"
    ]


def save_model(folder: Path, **shape: float) -> str:
    """A tiny Qwen2 (`shape` as of `tiny_model`) that reads any text, with generation settings as the real one has."""
    tokenizer = byte_tokenizer()
    model = tiny_model(**shape | {"vocab_size": len(tokenizer)})
    model.generation_config.update(do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(page: Path, model: str) -> dict[str, object]:
    """Run a page from top to bottom, with a model of ours in the place of the hub's."""
    names: dict[str, object] = {}
    for block in blocks(page):
        for name in MODELS:
            block = block.replace(f'"{name}"', repr(model))
        exec(compile(block, str(page), "exec"), names)
    return names
