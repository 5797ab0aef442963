"""The code of the pages: what is in blocks marked as Python, page by page."""

from __future__ import annotations

from pathlib import Path

from markdown_it import MarkdownIt
from models import tiny_model
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODELS = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B")  # on the hub; a tiny one stands in for them


def blocks(page: Path) -> list[str]:
    """Page by page in its order; generated signatures are none."""
    if page.name == "contract.md":
        return []
    return [
        token.content
        for token in MarkdownIt().parse(page.read_text())
        if token.type == "fence" and token.info == "python"
    ]


def save_model(folder: Path, **shape: float) -> str:
    """A tiny Qwen2 (`shape` as of `tiny_model`) whose tokens are bytes, so that it reads any text."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = ["<pad>", "<eos>", *sorted(alphabet)]
    backend = Tokenizer(BPE({word: i for i, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tiny_model(**shape | {"vocab_size": len(words)}).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    ).save_pretrained(folder)
    return str(folder)


def run(page: Path, model: str) -> dict[str, object]:
    """Run a page from top to bottom, with a model of ours in the place of the hub's."""
    names: dict[str, object] = {}
    for block in blocks(page):
        for name in MODELS:
            block = block.replace(f'"{name}"', repr(model))
        exec(compile(block, str(page), "exec"), names)
    return names
