"""What this package shows: `python -m ngrpo_ops rollout` and `neighbors` of a checkpoint, `env` of an installation."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from .checkpoint import Vocabulary, load_vocabulary
from .config import Metric, MixingConfig
from .environment import load_adapter, report
from .files import write_text
from .ops.nearest_neighbors.api import NearestNeighbors, nearest_neighbors
from .strategies import strategy_names
from .view import page, print_rollouts

_EXCLUDED = ("special", "unused", "equal")  # by default, as excluded_token_ids="special" does

_EPILOG = """examples:
  python -m ngrpo_ops neighbors --model Qwen/Qwen2.5-0.5B --tokens " seven" " therefore"
  python -m ngrpo_ops neighbors --model ./checkpoint --ids 220 --exclude none --plot neighbors.png
"""


_ROLLOUT_EPILOG = """example:
  python -m ngrpo_ops rollout --model ./checkpoint --prompt "What is 7 + 8?" --samples 2 --html rollout.html
"""

# What `MixingConfig` and the view call an option of this command.
_OPTIONS = {
    "mixing_rate": "--rate",
    "k": "--k",
    "strategy": "--strategy",
    "seed": "--seed",
    "prompt": "--prompt",
    "model": "--model",
}


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
    rollout = _add_rollout(commands)
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
    if arguments.command == "rollout":
        try:
            _rollout(arguments)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            rollout.error(_named(" ".join(str(error).split())))
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


def _add_rollout(commands: Any) -> argparse.ArgumentParser:
    rollout = commands.add_parser(
        "rollout",
        help="what a rollout of a checkpoint mixes: its text, the candidates and weights, beside plain sampling",
        description="Samples a prompt plainly and with mixing, replays both, and shows what each mixed token was mixed "
        "with. Both begin with the same random numbers: up to the first mix they say the same.",
        epilog=_ROLLOUT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rollout.add_argument("--model", required=True, help="a folder, or a name on the Hugging Face hub")
    rollout.add_argument("--prompt", required=True, help="the user's words; in the chat template, where there is one")
    names = ", ".join(strategy_names())
    rollout.add_argument("--strategy", default="neighbor", help=f"{names}, or package.module:function")
    rollout.add_argument("--rate", type=float, default=0.1, help="the probability that a step is mixed")
    rollout.add_argument("--k", type=int, help="candidates of a mix, the anchor counted (3)")
    rollout.add_argument("--temperature", type=float, default=0.7, help="of sampling and mixing")
    rollout.add_argument("--max-new-tokens", type=int, default=64, help="the longest rollout")
    rollout.add_argument("--samples", type=int, default=1, help="rollouts, each plain and mixed")
    rollout.add_argument("--seed", type=int, default=0, help="of sampling, gates and noise")
    rollout.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the weights"
    )
    rollout.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="where the model runs"
    )
    rollout.add_argument("--html", type=Path, help="write a page too, to this file; it loads nothing")
    return rollout


def _rollout(arguments: argparse.Namespace) -> None:
    for name, least in (("samples", 1), ("max_new_tokens", 1)):
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(arguments, name)}")
    if not 0 < arguments.temperature < float("inf"):
        raise ValueError(f"--temperature must be above 0 and finite, got {arguments.temperature}")
    if arguments.html is not None:  # said before the model is loaded
        _require_writable(arguments.html)
    shared = {"seed": arguments.seed, "excluded_token_ids": "special"}
    mixed = MixingConfig(strategy=arguments.strategy, mixing_rate=arguments.rate, k=arguments.k, **shared)
    load_adapter("transformers")
    adapter = importlib.import_module(".integrations.transformers.view", __package__)
    model, tokenizer = adapter.load_checkpoint(
        arguments.model, dtype=getattr(torch, arguments.dtype), device=arguments.device
    )
    arms = {"plain sampling": MixingConfig(mixing_rate=0, **shared)}
    arms[f"{mixed.strategy}, rate {mixed.mixing_rate:g}, k = {mixed.k}"] = mixed
    path = Path(arguments.model)
    shown = adapter.roll_out(
        model, tokenizer, arguments.prompt, arms, name=path.resolve().name if path.is_dir() else arguments.model,
        temperature=arguments.temperature,
        max_new_tokens=arguments.max_new_tokens, samples=arguments.samples, seed=arguments.seed,
    )  # fmt: skip
    print_rollouts(shown)
    if arguments.html is not None:
        write_text(arguments.html, page(shown))
        print(f"written to {arguments.html}")


def _require_writable(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--html must be a file in a folder that is there and can be written to, got {path}")


def _named(message: str) -> str:
    """A message that begins with the name of a field, with the option of this command in its place."""
    field, _, rest = message.partition(" ")
    return f"{_OPTIONS[field]} {rest}" if field in _OPTIONS else message


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
