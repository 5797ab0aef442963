"""The figures that stand in the text of pages, each made from a committed result. tests/test_figures.py compares them.

A claim is a page, the words around its figures, and the figures. A figure of a run by hand, without a committed result, has no
claim: the page says "by hand", "in another run" or how it was measured.
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results"
EPYC = "AMD-EPYC-2-threads-torch-2-13-0-cpu-triton-3-7-1.csv"
XEON = "Intel-R-Xeon-R-Processor-2-threads-torch-2-13-0-cpu-triton-3-7-1.csv"
ENGINES = "engines.json"
STUDY, REPLICATION = "docs/study/seeds.csv", "docs/study/replication/seeds.csv"

SMOLLM2 = "SmolLM2-135M-Instruct V=49152 d=576"


class Claim(NamedTuple):
    """Words of a page with figures in them.

    Attributes:
        page: from the root.
        text: as `str.format` takes it.
        figures: what stands in the braces.
    """

    page: str
    text: str
    figures: tuple[Any, ...]

    def written(self) -> str:
        return self.text.format(*self.figures)


@functools.cache
def _rows(file: str) -> dict[tuple[str, str, str, str], dict[str, str]]:
    with (RESULTS / file).open(newline="") as table:
        return {(row["op"], row["shape"], row["dtype"], row["who"]): row for row in csv.DictReader(table)}


def _row(who: str, op: str, shape: str, dtype: str, file: str) -> dict[str, str]:
    return _rows(file)[op, shape, dtype, who]


def seconds(op: str, shape: str, dtype: str = "float32", file: str = EPYC, who: str = "ours") -> float:
    """The median time of a benchmark."""
    return float(_row(who, op, shape, dtype, file)["median_s"])


def ms(*case: Any, **more: Any) -> float:
    return 1e3 * seconds(*case, **more)


def times(who: str, op: str, shape: str, dtype: str = "float32", file: str = EPYC) -> float:
    """A peer's time over ours, of runs taken in turn."""
    return float(_row(who, op, shape, dtype, file)["times_ours"])


def pairs(op: str, shape: str, dtype: str = "float32", file: str = XEON) -> float:
    """The pairs a query that a search scored one by one."""
    return float(_row("ours", op, shape, dtype, file)["scored_pairs"])


def _decode(rows: int) -> tuple[float, ...]:
    case = "decode_step", f"B={rows} V=151936"
    peers = ("torch.compile with a table", "a search at every step", "softmax + multinomial, no mixing")
    return ms(*case), *(times(who, *case) for who in peers)


def _both(value: Any, op: str, shape: str) -> tuple[float, float]:
    return value(op, shape, "float32"), value(op, shape, "bfloat16")


def _peers(op: str, shape: str, *who: str) -> tuple[float, ...]:
    """A peer's time over ours: peer by peer, each for float32 and bfloat16, in turn."""
    return tuple(
        times(name, op, shape, dtype)
        for name, dtype in zip(who, itertools.cycle(("float32", "bfloat16")), strict=False)
    )


_PAGE = "docs/measured.md"
_ROWS, _TABLE = "V=151936 d=896 Q=2048 k=2", "V=32768 d=896 whole table k=2"
_REFRESH = "NeighborTable.refresh", "V=32768 d=896 k=2 after a step of 1e-06"
_MIX, _SOFTMAX = "N=4096 k=3 V=151936 d=896", "N=64 V=151936"
_LOG_SOFTMAX, _GATHER, _TRL = "selective_log_softmax", "log_softmax + gather", "TRL's selective_log_softmax"
_BACKWARD = f"{_LOG_SOFTMAX} forward and backward"
_COMPILED = "torch.compile of log_softmax + gather"
_FILTERED = "decode_step top-k 50, top-p 0.95", "B=64 V=151936"
_WARPERS = "transformers' warpers + multinomial, no mixing"
_GENERATE = "generate", "B={} new=32 V=32000 layers=4 d=512"
_REWARDS = "group_advantages", "N=65536 groups of 8"


def claims() -> list[Claim]:
    """Every figure of a page that a committed result has."""
    nn, tiled, faiss = "nearest_neighbors", "tiled matmul + topk", "faiss IndexFlatIP"
    found = [
        ("float32, exact | {:.2f} s | faiss `IndexFlatIP` | {:.2f} | tiled matmul + topk {:.1f} |",
         seconds(nn, _ROWS), times(faiss, nn, _ROWS), times(tiled, nn, _ROWS)),
        ("d = 896 | {:.2f} s | faiss `IndexFlatIP` | {:.1f} | tiled matmul + topk {:.1f}; our own sweep without symmetry {:.2f} |",
         seconds(nn, _TABLE), times(faiss, nn, _TABLE), times(tiled, nn, _TABLE), times("ours, plain sweep", nn, _TABLE)),
        ("1e-6 in every entry | {:.3f} s | our own rebuild | {:.0f} | rebuilt without symmetry {:.0f} |",
         seconds(*_REFRESH), times("ours, rebuilt", *_REFRESH), times("ours, plain sweep", *_REFRESH)),
        ("1 row, float32 | {:.1f} ms | the table and `torch.compile` | {:.1f} | a search at every step {:.0f}; "
         "softmax + multinomial, which mix nothing, {:.1f} |", *_decode(1)),
        ("| 64 rows | {:.0f} ms | the table and `torch.compile` | {:.1f} | a search {:.1f}; softmax + multinomial {:.1f} |",
         *_decode(64)),
        ("| 256 rows | {:.0f} ms | the same | {:.1f} | {:.1f}; {:.1f} |", *_decode(256)),
        ("| 1,024 rows | {:.0f} ms | the same | {:.1f} | {:.1f}; {:.1f} |", *_decode(1024)),
        ("top-p 0.95 | {:.0f} ms | transformers' warpers + multinomial, which mix nothing | {:.1f} |",
         ms(*_FILTERED), times(_WARPERS, *_FILTERED)),
        ("d = 896, float32 | {:.2f} ms | `F.embedding_bag` | {:.2f} | `torch.compile` {:.2f}; gather + einsum {:.1f} |",
         ms("mix_embeddings", _MIX), *(times(who, "mix_embeddings", _MIX) for who in
                                       ("F.embedding_bag", "torch.compile of the oracle", "gather + einsum"))),
        ("float32 weights | {:.2f} ms | `torch.compile` | {:.2f} | gather + einsum {:.1f}; `embedding_bag` with its weights cut to 8 bits {:.2f} |",
         ms("mix_embeddings", _MIX, "bfloat16"), *(times(who, "mix_embeddings", _MIX, "bfloat16") for who in
         ("torch.compile of the oracle", "gather + einsum", "F.embedding_bag, weights of 8 bits"))),
        ("its backward, float32 / bfloat16 | {:.1f} / {:.1f} ms | `embedding_bag` / `torch.compile` | {:.2f} / {:.2f} |",
         *_both(ms, "mix_embeddings backward", _MIX),
         *_peers("mix_embeddings backward", _MIX, "F.embedding_bag", "torch.compile of the oracle")),
        ("64 x 151,936, float32 / bfloat16 | {:.1f} / {:.1f} ms | `torch.compile` | {:.2f} / {:.2f} | TRL's {:.1f} / {:.1f} |",
         *_both(ms, _LOG_SOFTMAX, _SOFTMAX), *_peers(_LOG_SOFTMAX, _SOFTMAX, _COMPILED, _COMPILED),
         *_peers(_LOG_SOFTMAX, _SOFTMAX, _TRL, _TRL)),
        ("with backward, float32 / bfloat16 | {:.1f} / {:.1f} ms | log_softmax + gather | {:.2f} / {:.2f} | TRL's {:.1f} / {:.1f} |",
         *_both(ms, _BACKWARD, _SOFTMAX), *_peers(_BACKWARD, _SOFTMAX, _GATHER, _GATHER),
         *_peers(_BACKWARD, _SOFTMAX, _TRL, _TRL)),
        ("groups of 8 | {:.2f} ms | `torch.compile` of TRL's formula | {:.2f} | TRL's {:.1f}; OpenRLHF's {:.1f} |",
         ms(*_REWARDS), *(times(who, *_REWARDS) for who in
                          ("torch.compile of TRL's formula", "TRL's formula", "OpenRLHF's group_norm"))),
        ("the same by label | {:.1f} ms | verl's loop | {:.0f} |",
         ms("group_advantages", "N=65536 groups of 8, by label"),
         times("verl's loop", "group_advantages", "N=65536 groups of 8, by label")),
        ("| 2,048 queries | {:.2f} s | {:.1f} (2.3 in two other runs) | {:.1f} | {:.1f} |", *_real("Q=2048 k=2", tiled, faiss)),
        ("| 16 queries | {:.0f} ms | {:.2f} | {:.1f} | {:.1f} |",
         *(value * scale for value, scale in zip(_real("Q=16 k=2", tiled, faiss), (1e3, 1, 1, 1), strict=True))),
        ("| every row | {:.1f} s | {:.1f} | | {:.1f} |", *_real("whole table k=2", tiled)),
        ("lr 1e-5 | {:.2f} s | {:.0f} | | {:.1f} |",
         *_real("k=2 after a step of 1e-05", tiled, op="NeighborTable.refresh")),
        ("records fetched,\ntake {:.2f} times the time without mixing ({:.2f} and {:.2f} s", overhead("ours", "times_plain"),
         overhead("ours", "seconds"), overhead("plain engine", "seconds")),
        ("is not asked to {:.2f} times", overhead("mixing engine, plain requests", "times_plain")),
        ("{:.2f} and {:.2f} s of it are the interpreter's, and what is\nleft takes {:.2f} times", overhead("ours", "interpreter"),
         overhead("plain engine", "interpreter"), overhead("ours", "rest_times_plain")),
        ("({:.3f}, {:.3f} and {:.3f} for 1, 16 and 64 rows", *(
            1 / float(_row("plain generate", _GENERATE[0], _GENERATE[1].format(b), "float32", EPYC)["best_times_ours"])
            for b in (1, 16, 64))),
    ]  # fmt: skip
    error = largest_replay_error()
    rollout = "{} of {} tokens were read as a mix, the first as {:.2f} of ' and' and {:.2f} of a comma. Replay error {} ({} with plain ids)"
    return [
        *(Claim(_PAGE, text, tuple(figures)) for text, *figures in found),
        *(Claim(page, rollout, shown_rollout()) for page in ("README.md", "docs/rollouts.md")),
        Claim(_PAGE, "lower than GRPO's\n  by {} [{}, {}]", pass1_of_the_replication()),
        *real_models(),
        Claim("docs/metrics.md", "1e-6 to {} in float32", (f"{error:.0e}".replace("e-0", "e-"),)),
    ]


REAL = "examples/real_model"


def real_models() -> list[Claim]:
    """Of the rollout studies of real models."""
    smollm, qwen = (
        json.loads((ROOT / REAL / folder / "results.json").read_text()) for folder in (".", "qwen2.5-coder-0.5b")
    )
    matched, anchor = (smollm["question"]["against"][name] for name in ("grpo_matched", "anchor"))
    row = "| {:.4f} | {:.4f} | {} | {:.3f} |"

    def mixes(found: dict[str, Any]) -> tuple[float, ...]:
        return *found["mixes"]["cosine"].values(), found["mixes"]["anchor_weight"]

    return [
        Claim(_PAGE, "was given {} one-digit word problems, {} samples each", (
            smollm["problems"], smollm["arms"]["ngrpo"]["samples"])),
        Claim(_PAGE, "differs by {:+.3f} [{:+.3f}, {:+.3f}] from that of plain", tuple(matched["pass@1"])),
        Claim(_PAGE, "by {:.3f} [{:.3f}, {:.3f}] a problem", tuple(
            -matched["right_paths"][i] for i in (0, 2, 1))),
        Claim(_PAGE, "than the control: {:+.3f} [{:+.3f}, {:+.3f}]", tuple(anchor["right_paths"])),
        Claim(_PAGE, "dequantized from 4 bits " + row, _percent(mixes(smollm))),
        Claim(_PAGE, "dequantized from 5 bits " + row, _percent(mixes(qwen))),
    ]  # fmt: skip


def _percent(figures: tuple[float, ...]) -> tuple[Any, ...]:
    """The third figure as the pages write percents."""
    return *figures[:2], f"{100 * figures[2]:.1f} %", *figures[3:]


def pass1_of_the_replication() -> tuple[str, ...]:
    """By how much N-GRPO's pass@1 is below GRPO's on "equation": the estimate, and the ends of its interval."""
    section = (ROOT / "docs/study/replication/report.md").read_text().partition("\n## equation\n")[2]
    found = re.search(r"^\| N-GRPO \| 12 \| -(0\.\d+) \[-(0\.\d+), -(0\.\d+)\]", section, flags=re.M)
    assert found is not None
    return found[1], found[3], found[2]


def _real(shape: str, *who: str, op: str = "nearest_neighbors") -> tuple[float, ...]:
    case = op, f"{SMOLLM2} {shape}"
    return (
        seconds(*case, file=XEON),
        *(times(name, *case, "float32", XEON) for name in who),
        pairs(*case),
    )


def overhead(who: str, name: str) -> float:
    """A median of benchmarks/engine_overhead.py."""
    return float(json.loads((RESULTS / "engine_overhead.json").read_text())["medians"][who][name])


def largest_replay_error() -> float:
    """The largest difference of log-probabilities between an engine and a replay in float32."""
    files = json.loads((RESULTS / ENGINES).read_text())["largest difference of log-probabilities"].values()
    return max(
        value
        for paths in files
        for name, value in paths.items()
        if "bfloat16" not in name and not name.endswith(", plain ids")
    )


def shown_rollout() -> tuple[str | float, ...]:
    """Of the rollout in the picture: mixed tokens, tokens, two weights of the first mix, and its replay errors."""
    page = re.sub(r"<[^>]+>", " ", (ROOT / "docs/images/rollout.html").read_text())
    counts = re.search(r"(\d+) of (\d+) tokens mixed.*?replay error (\S+) \((\S+) with plain ids\)", page, flags=re.S)
    weights = re.findall(r"\b([01]\.\d{4})\b", page.partition("read as a mix of")[2])
    assert counts is not None
    return counts[1], counts[2], float(weights[0]), float(weights[2]), counts[3], counts[4]
