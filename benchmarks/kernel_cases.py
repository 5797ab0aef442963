"""The launches of every kernel in each configuration, dtype and set of constants, as a GPU would get them.

The launchers are run on meta tensors at the shapes of real models with their launches recorded, so nothing is launched
and no memory is needed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import compiled
import torch
from compiled import NAMES

from ngrpo_ops.kernels import (
    configs,
    decode_step,
    gaussian_noise,
    group_advantages,
    mix_embeddings,
    nearest_neighbors,
    nearest_neighbors_few,
    nearest_neighbors_rows,
    selective_log_softmax,
)
from ngrpo_ops.kernels.primitives import Launch, forced_int64, recording
from ngrpo_ops.ops.decode_step.settings import Settings
from ngrpo_ops.ops.group_advantages.reference import GroupSettings
from ngrpo_ops.strategies import get_strategy

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# The launches -----------------------------------------------------------------------------------------------------


_V = 151_936


def _meta(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def mix(dtype: torch.dtype, d: int, k: int, n: int = 16_384) -> None:
    table, ids, weights = _meta(_V, d, dtype=dtype), _meta(n, k), _meta(n, k, dtype=torch.float32)
    mix_embeddings.forward(table, ids, weights, None)


def mix_backward(dtype: torch.dtype, d: int, k: int, n: int = 16_384, *, deterministic: bool = True) -> None:
    table, ids, weights = _meta(_V, d, dtype=dtype), _meta(n, k), _meta(n, k, dtype=torch.float32)
    grad = _meta(n, d, dtype=dtype)
    mix_embeddings.grad_weights(grad, table, ids, weights, None)
    mix_embeddings.grad_embedding(grad, table, ids, weights, None, deterministic)


def log_softmax(dtype: torch.dtype, v: int, k: int, entropy: bool, *, backward: bool = True) -> None:
    b, t = 8, 1024
    logits, ids = _meta(b, t, v, dtype=dtype), _meta(b * t, k)
    grad, *rest = selective_log_softmax.forward(logits, ids, 0.7, entropy)
    if backward:
        selective_log_softmax.backward(grad, rest[0], logits, ids, *rest, 0.7, False)


def advantages(
    dtype: torch.dtype,
    group_size: int,
    ragged: bool,
    baseline: str,
    scale: str,
    singleton_groups: str,
    weights_dtype: torch.dtype,
    *,
    groups: int = 64,
    backward: bool = True,
) -> None:
    n = groups * group_size
    rewards, weights = _meta(n, 1, dtype=dtype), _meta(n, dtype=weights_dtype) if ragged else None
    order, offsets = (_meta(n), _meta(groups + 1)) if ragged else (None, None)
    settings = GroupSettings(
        weights, order, offsets, group_size, baseline, scale, ddof=1, eps=1e-4, singleton_groups=singleton_groups,
        omit_nan=ragged,
    )  # fmt: skip
    out, scales = group_advantages.forward(rewards, settings)
    if backward:
        group_advantages.backward(out, scales, rewards, settings)


DECODE_STEPS: tuple[tuple[int, int, str, dict[str, Any]], ...] = (
    (151_936, 3, "neighbor", {"alone": True}),
    (151_936, 3, "neighbor", {"numbers": True}),
    (8192, 3, "neighbor", {"cut": True, "entropy": 1.0}),
    (262_144, 32, "neighbor", {"cut": True, "variant": "released"}),
    (151_936, 3, "neighbor", {"numbers": True, "cut": True}),
    (151_936, 1, "anchor", {}),
    (151_936, 3, "topk", {"tau": 0.5}),
    (151_936, 4, "gumbel", {"tau": 0.5, "cut": True, "alone": True}),
    (262_144, 32, "gumbel", {}),
    (151_936, 3, "gaussian", {}),
    (151_936, 3, "moi", {"cut": True, "alone": True}),
    (262_144, 8, "multiplex", {"alone": True}),
)


def step(dtype: torch.dtype, v: int, k: int, strategy: str, *, b: int = 64, **other: Any) -> None:
    d = 1536
    entry = get_strategy(strategy)
    rows = {name: _meta(b, dtype=torch.float32) for name in ("temperature", "top_p", "min_p")}
    filters: dict[str, Any] = dict.fromkeys(("top_k", "top_p", "min_p"))
    if other.get("cut"):
        filters |= {"top_k": _meta(b), "top_p": rows["top_p"], "min_p": rows["min_p"]}
    counters: dict[str, Any] = {"seed": _meta(), "step": _meta(), "row_ids": _meta(b)}
    if other.get("numbers"):  # as the API's default settings are, and every setting that is given as a number
        rows["temperature"] = torch.tensor(1.0, dtype=torch.float32, device="cpu")
        numbers = {"top_k": 50, "top_p": 0.9, "min_p": 0.05} if other.get("cut") else {}
        filters |= {name: torch.tensor(value, device="cpu") for name, value in numbers.items()}
        counters = {"seed": torch.tensor(17), "step": torch.tensor(3), "row_ids": None}
    settings = Settings(
        neighbor_ids=_meta(v, k - 1) if entry.reads_neighbors else None, k=k, strategy=strategy,
        options=entry.option_values({}), variant=other.get("variant", "paper"), temperature=rows["temperature"],
        mixing_temperature=other.get("tau"), **filters, **counters, mixing_rate=0.1,
        entropy_threshold=other.get("entropy"),
        enabled=None if other.get("numbers") else _meta(b, dtype=torch.bool),
    )  # fmt: skip
    logits = _meta(b, v, dtype=dtype)
    if other.get("alone"):
        unread = {} if entry.reads_filters else dict.fromkeys(filters)
        decode_step.mixing_candidates(logits, settings._replace(**unread), return_entropy=True)
    decode_step.decode_step(logits, _meta(v, d, dtype=dtype), settings)
    if strategy == "gaussian":
        n = _meta(4096)
        gaussian_noise.gaussian_noise(_meta(4096, d, dtype=dtype), n.float(), n, n, n)


def _append_pairs(dtype: torch.dtype, q: int) -> None:
    metric, width = ("l1", 896) if dtype == torch.float32 else ("cosine", 960)
    x, y = (_meta(n, width, dtype=dtype) for n in (q, 16_384))
    pairs = nearest_neighbors.no_pairs(_V, 88, x.device)
    x_limits, y_limits, ids = _meta(q, dtype=torch.float32), _meta(16_384, dtype=torch.float32), _meta(16_384)
    excluded = _meta(q, dtype=torch.int32)
    nearest_neighbors.append_pairs(x, y, metric, x_limits, excluded, pairs, x_ids=_meta(q), y_ids=ids)
    if q > 64:
        allowed = _meta(q, dtype=torch.bool)
        for diagonal in (False, True) if metric != "l1" else (False,):
            nearest_neighbors.append_pairs_symmetric(
                x, y, metric, x_limits, y_limits, allowed, allowed, pairs, x_ids=ids, y_ids=ids, diagonal=diagonal
            )


def _keep_best(places: int, metric: str) -> None:
    pairs = nearest_neighbors.no_pairs(49_152, places, torch.device("meta"))
    values, is_far = _meta(49_152, dtype=torch.float32), _meta(49_152, dtype=torch.bool)
    kept = places // 3
    nearest_neighbors.keep_best(
        pairs, metric, values, values, is_far, *[values] * 4, k=kept // 5 + 1, kept=kept, rounding=1e-4, underflow=1e-36
    )


def _pair_scores(dtype: torch.dtype, d: int, metric: str) -> None:
    table, ids = _meta(151_936, d, dtype=dtype), _meta(300_000)
    scales = _meta(151_936, dtype=torch.float32) if metric == "cosine" else None
    nearest_neighbors.pair_scores(table, scales, ids, table, scales, ids, metric)


def _rows(dtype: torch.dtype, d: int, metric: str) -> None:
    table = _meta(151_936, d, dtype=dtype)
    norms, inverse_norms, roundoffs, _ = nearest_neighbors_rows.row_statistics(table, metric)
    scales = inverse_norms if metric == "cosine" else None
    nearest_neighbors_rows.row_movements(table.float(), scales, table, scales, metric)
    if metric == "l1":
        return
    rows = _meta(16_384) if d == 896 else slice(0, 16_384)
    for queries in (True, False):
        nearest_neighbors_rows.prepare_rows(
            table, rows, norms, inverse_norms, roundoffs, metric, queries=queries, rounding=1e-4, underflow=1e-36
        )


def _score_few(dtype: torch.dtype, q: int, metric: str) -> None:
    x, values = _meta(q, 960, dtype=torch.bfloat16), _meta(q, dtype=torch.float32)
    table = _meta(151_936, 896, dtype=dtype)
    nearest_neighbors_few.score_few(x, values, values, table, metric, rounding=1e-4, underflow=1e-36)


def _every_case() -> Iterator[tuple[torch.dtype, Callable[[], None]]]:
    for dtype in DTYPES:
        for d, k in ((128, 3), (896, 3), (1536, 3), (1536, 32)):
            yield dtype, lambda dtype=dtype, d=d, k=k: mix(dtype, d, k)
            for order in (True, False):
                yield dtype, lambda dtype=dtype, d=d, k=k, o=order: mix_backward(dtype, d, k, deterministic=o)
        for v in (4096, 151_936):
            for k, entropy in ((1, False), (3, True)):
                yield dtype, lambda dtype=dtype, v=v, k=k, e=entropy: log_softmax(dtype, v, k, e)
        for case in (
            (8, False, "mean", "std", "zero", torch.bool),
            (8, True, "leave_one_out", "none", "nan", torch.bool),
            (8, True, "mean", "std", "keep", torch.int64),
            (64, False, "none", "mean", "zero", torch.bool),
            (4096, False, "mean", "std", "zero", torch.bool),
        ):
            yield dtype, lambda dtype=dtype, case=case: advantages(dtype, *case)
        every = dtype == torch.bfloat16  # the logits' dtype changes a load and no more
        for v, k, strategy, other in DECODE_STEPS if every else DECODE_STEPS[:3]:
            yield dtype, lambda dtype=dtype, v=v, k=k, s=strategy, o=other: step(dtype, v, k, s, **o)
        for metric in ("cosine", "dot", "l2", "l1"):
            yield dtype, lambda dtype=dtype, m=metric: _pair_scores(dtype, 896, m)
        for d, metric in ((128, "cosine"), (896, "cosine"), (896, "dot"), (896, "l2"), (896, "l1")):
            if every or (d, metric) == (896, "cosine"):
                yield dtype, lambda dtype=dtype, d=d, m=metric: _rows(dtype, d, m)
    for q in (16, 16_384):
        for dtype in (torch.bfloat16, torch.float32):
            yield dtype, lambda dtype=dtype, q=q: _append_pairs(dtype, q)
    for dtype, q, metric in (
        (torch.float32, 16, "cosine"), (torch.float32, 64, "cosine"), (torch.bfloat16, 16, "cosine"),
        (torch.bfloat16, 32, "cosine"), (torch.bfloat16, 64, "cosine"), (torch.bfloat16, 64, "dot"),
        (torch.float32, 64, "l2"),
    ):  # fmt: skip
        yield dtype, lambda dtype=dtype, q=q, metric=metric: _score_few(dtype, q, metric)
    for places, metric in ((88, "cosine"), (88, "l1"), (341, "l2"), (1264, "cosine")):
        yield torch.float32, lambda places=places, metric=metric: _keep_best(places, metric)


@dataclass(frozen=True)
class Case:
    """A launch for a target, and what its row of the table says of it."""

    launch: Launch
    target: str
    config: str
    dtype: str

    @property
    def kernel(self) -> str:
        return self.launch.kernel.__name__

    @property
    def key(self) -> dict[str, str]:
        return {"kernel": self.kernel, "target": self.target, "config": self.config, "dtype": self.dtype}

    @functools.cached_property
    def digest(self) -> str:
        return compiled.digest(self.launch, self.target)


def describe(launch: Launch) -> str:
    """Tile, warps, stages and constants: what tells the rows of a kernel apart."""
    parts = [f"{name}={value}" for name, value in launch.config.kwargs.items()]
    parts += [f"warps={launch.config.num_warps}", f"stages={launch.config.num_stages}"]
    fixed = compiled.constants(launch).items()
    parts += [f"{name}={value}" for name, value in fixed if name not in launch.config.kwargs]
    return " ".join(parts)


def every_case(target: str) -> list[Case]:
    """Each kernel once for each configuration, set of constants and dtype, in a fixed order."""
    cases: dict[tuple[str, str, str], Case] = {}
    for dtype, run in _every_case():
        # float16 differs from bfloat16 in a conversion, and wide offsets from narrow ones in address arithmetic.
        for wide in (False, True) if dtype != torch.float16 else (False,):
            with configs.for_architecture(target), recording() as launches:
                if wide:
                    with forced_int64():
                        run()
                else:
                    run()
            for launch in launches:
                case = Case(launch, target, describe(launch), NAMES[dtype])
                cases.setdefault((case.kernel, case.config, case.dtype), case)
    return list(cases.values())


def uncompiled_configs(cases: Iterable[Case]) -> set[str]:
    """Pinned configurations that no case launches: empty, or a kernel goes untested."""
    cases = list(cases)
    seen = {(case.target, case.kernel, str(case.launch.config)) for case in cases}
    missing = set()
    for target, kernel in itertools.product({case.target for case in cases}, configs.PINNED):
        with configs.for_architecture(target):
            for _, config in configs.pinned_for(kernel):
                if (target, kernel, str(config)) not in seen:
                    missing.add(f"{kernel} for {target}: {config}")
    return missing
