"""What this package shows in a terminal: `python -m ngrpo_ops neighbors` of a checkpoint, `env` of an installation."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from .checkpoint import Vocabulary, load_vocabulary
from .config import Metric
from .environment import report
from .ops.nearest_neighbors.api import NearestNeighbors, nearest_neighbors

_EXCLUDED = ("special", "unused", "equal")  # by default, as excluded_token_ids="special" does

_EPILOG = """examples:
  python -m ngrpo_ops neighbors --model Qwen/Qwen2.5-0.5B --tokens " seven" " therefore"
  python -m ngrpo_ops neighbors --model ./checkpoint --ids 220 --exclude none --plot neighbors.png
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ngrpo_ops", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser(
        "neighbors",
        help="the nearest neighbors of tokens in a checkpoint's input embeddings",
        description="Prints each token's nearest neighbors in a checkpoint's input embeddings: what it is mixed with.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    look.add_argument("--model", required=True, help="a folder with safetensors, or a name on the Hugging Face hub")
    look.add_argument("--tokens", nargs="+", default=[], help="texts of one token each; mind the leading space")
    look.add_argument("--ids", nargs="+", type=int, default=[], help="token ids")
    look.add_argument("--k", type=int, default=8, help="neighbors of each")
    look.add_argument("--metric", choices=get_args(Metric), default="cosine")
    look.add_argument(
        "--exclude",
        nargs="+",
        choices=(*_EXCLUDED, "none"),
        default=_EXCLUDED,
        help="rows never returned; all three are what a rollout leaves out by default; none brings them back",
    )
    look.add_argument("--plot", type=Path, help="draw how similarity is distributed over the vocabulary, to this file")
    look.add_argument("--sample", type=int, default=4096, help="rows that --plot looks at, drawn at random (0: all)")
    env = commands.add_parser(
        "env",
        help="what is installed and what it will do here: the first thing to paste into a bug report",
        description="Prints versions, devices, the backend of each operation, settings, and which adapters are usable.",
    )
    env.add_argument("--imports", action="store_true", help="import the adapters too, which takes seconds each")
    arguments = parser.parse_args(argv)
    if arguments.command == "env":
        print(report(arguments.imports))
        return 0
    if not arguments.tokens and not arguments.ids and arguments.plot is None:
        look.error("give --tokens, --ids or --plot")
    if arguments.sample < 0:
        look.error(f"--sample must be at least 0, got {arguments.sample}")
    if arguments.plot is not None and not arguments.plot.parent.is_dir():  # said before the search
        look.error(f"--plot must be in a folder that is there, got {arguments.plot}")
    try:
        _neighbors(arguments)
    except (ImportError, OSError, ValueError) as error:
        look.error(" ".join(str(error).split()))  # one line, the hub's too
    return 0


def _neighbors(arguments: argparse.Namespace) -> None:
    vocabulary = load_vocabulary(arguments.model)
    rows, width = vocabulary.embedding.shape
    print(
        f"{arguments.model}: {rows:,} rows of {width}, {vocabulary.embedding.dtype}; "
        f"{int(vocabulary.special.sum())} special, {int(vocabulary.unused.sum())} unused, "
        f"{int(vocabulary.equal.sum())} equal to another"
    )
    for i in arguments.ids:
        if not 0 <= i < rows:
            raise ValueError(f"--ids must be within [0, {rows}), got {i}")
    queries = torch.tensor(
        [vocabulary.id_of(text) for text in arguments.tokens] + arguments.ids, dtype=torch.int64, device="cpu"
    )
    allowed = torch.ones(rows, dtype=torch.bool, device="cpu")
    arguments.exclude = [kind for kind in arguments.exclude if kind != "none"]
    for kind in arguments.exclude:
        allowed &= ~getattr(vocabulary, kind)
    if int(allowed.sum()) <= arguments.k < rows:
        raise ValueError(f"--exclude must leave more than --k = {arguments.k} rows, got {int(allowed.sum())}")
    options: dict[str, Any] = {"metric": arguments.metric, "allowed": allowed}
    if queries.numel():
        found = nearest_neighbors(vocabulary.embedding, arguments.k, queries=queries, **options)
        _print_table(vocabulary, queries, found)
    if arguments.plot is not None:
        few = 0 < arguments.sample < rows
        generator = torch.Generator().manual_seed(0)
        looked_at = (
            torch.randperm(rows, generator=generator, device="cpu")[: arguments.sample]
            if few
            else torch.arange(rows, device="cpu")
        )
        found = nearest_neighbors(
            vocabulary.embedding, arguments.k, queries=looked_at, progress=_show_progress, **options
        )
        _draw(arguments, vocabulary, looked_at, found)
        print(f"drawn to {arguments.plot}")


def _print_table(vocabulary: Vocabulary, queries: Tensor, found: NearestNeighbors) -> None:
    for query, ids, scores in zip(queries.tolist(), found.ids.tolist(), found.scores.tolist(), strict=True):
        print(f"\n{vocabulary.names[query]!r} ({query})")
        for i, score in zip(ids, scores, strict=True):
            note = next((f"  {kind}" for kind in _EXCLUDED if getattr(vocabulary, kind)[i]), "")
            print(f"    {score:9.4f}  {vocabulary.names[i]!r} ({i}){note}")


def _show_progress(done: int, total: int) -> None:
    end = "\n" if done == total else ""
    print(f"\rsearching: {done:,} of {total:,} rows", end=end, file=sys.stderr, flush=True)


def _draw(arguments: argparse.Namespace, vocabulary: Vocabulary, rows: Tensor, found: NearestNeighbors) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("--plot needs: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    k = found.scores.shape[1]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    edges = torch.histogram(found.scores.float().flatten().cpu(), 80).bin_edges.tolist()
    for rank in sorted({0, min(1, k - 1), k - 1}):
        scores = found.scores[:, rank].tolist()
        axes.hist(scores, bins=edges, histtype="step", linewidth=1.8, label=f"neighbor {rank + 1}")
    left_out = f", without {', '.join(arguments.exclude)} rows" if arguments.exclude else ""
    axes.set_xlabel(f"{arguments.metric} similarity of a row and its neighbor")
    axes.set_ylabel(f"rows (of {len(rows):,} looked at, {vocabulary.embedding.shape[0]:,} in all)")
    axes.set_title(f"{arguments.model}{left_out}", fontsize=10)
    axes.legend()
    figure.savefig(arguments.plot, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
