"""Cases of decode_step, mixing_candidates, candidate_weights, gaussian_noise and raise_faults."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from inputs import (
    LAYOUTS,
    OWN_WEIGHTS,
    STRATEGIES,
    Case,
    Cases,
    Inputs,
    dtypes,
    refusal,
    short,
    with_gradients,
)
from torch import Tensor

from ngrpo_ops import candidate_weights, decode_step, gaussian_noise, mixing_candidates, raise_faults

B, V, D, K = 7, 40, 5, 3
INTERPRETED_ROWS = 3  # of B: the interpreter takes time by the row
BY_ROW = ("logits", "temperature", "top_k", "top_p", "min_p", "step", "row_ids", "enabled")
PER_ROW = {
    "top_k": torch.tensor([0, 5, 9, 1, 40, 99, 3]),
    "top_p": torch.tensor([0.5, 0.9, 1.0, 0.1, 0.99, 0.3, 2.0**-20]),
    "min_p": torch.tensor([0.01, 0.0, 0.1, 0.5, 1.0, 0.2, 0.0]),
    "temperature": torch.tensor([0.5, 2.0, 0.0, 1.0, 0.0, 0.7, 1.3]),
}


def faulty(inputs: Inputs) -> dict[str, Any]:
    logits = inputs.normal(B, V, scale=2)
    logits[0, 3], logits[1, 5], logits[2], logits[3, :39] = torch.nan, torch.inf, -torch.inf, -torch.inf
    logits[4, 7] = -torch.inf
    return {"logits": logits}


def tied(inputs: Inputs) -> dict[str, Any]:
    return {"logits": inputs.integers(3, B, V).float(), "top_k": 9, "top_p": 0.8}


# What each case changes of the arguments.
SETTINGS: dict[str, Callable[[Inputs], dict[str, Any]]] = {
    "k = 1": lambda i: {"k": 1},
    "k = 5": lambda i: {"k": 5},
    "greedy": lambda i: {"temperature": 0.0},
    "temperature 2.5": lambda i: {"temperature": 2.5},
    "temperature a row": lambda i: {"temperature": PER_ROW["temperature"]},
    "mixing temperature": lambda i: {"mixing_temperature": 0.4},
    "ties": tied,
    "faults": faulty,
    "bad neighbors": lambda i: {"bad_neighbors": True},
    "seed and step as tensors": lambda i: {"seed": torch.tensor(-(2**62)), "step": torch.tensor(2**40)},
    "steps of their own": lambda i: {"seed": 2**63 - 1, "step": i.integers(2**40, B), "row_ids": i.integers(2**62, B)},
    "top_k": lambda i: {"top_k": 4},
    "top_p": lambda i: {"top_p": 0.7},
    "min_p": lambda i: {"min_p": 0.1},
    "all filters": lambda i: {"top_k": 9, "top_p": 0.9, "min_p": 0.02},
    "filters of no effect": lambda i: {"top_k": 99, "top_p": 1.0, "min_p": 0.0},
    "top_k a row": lambda i: {"top_k": PER_ROW["top_k"]},
    "top_p a row": lambda i: {"top_p": PER_ROW["top_p"]},
    "min_p a row": lambda i: {"min_p": PER_ROW["min_p"]},
    "all a row": lambda i: dict(PER_ROW),
    "one token": lambda i: {"logits": i.normal(B, 1), "k": 1},
    "few tokens": lambda i: {"logits": i.normal(B, V).masked_fill(torch.arange(V) % 19 > 0, -torch.inf), "k": 5},
    "large logits": lambda i: {"logits": i.normal(B, V, scale=1e4)},
    "large vocabulary": lambda i: {"logits": i.normal(4, 2100, scale=2), "top_p": 0.95},
}
# Those of a decode step alone.
STEP_SETTINGS: dict[str, Callable[[Inputs], dict[str, Any]]] = {
    "rate 0": lambda i: {"mixing_rate": 0.0},
    "rate 1": lambda i: {"mixing_rate": 1.0},
    "enabled": lambda i: {"enabled": i.mask(0.5, B), "mixing_rate": 1.0},
    "entropy threshold": lambda i: {"entropy_threshold": 2.6, "mixing_rate": 1.0},
    "no embedding": lambda i: {"embedding": None},
}
OF_STRATEGY: dict[str, dict[str, dict[str, Any]]] = {
    "gaussian": {"noise 1": {"noise_scale": 1.0}, "noise 0": {"noise_scale": 0.0}},
    "moi": {"beta 0": {"moi_beta": 0.0}, "beta 2.5": {"moi_beta": 2.5}},
}
FILTERS = ("top_k", "top_p", "min_p")
# With the interpreter the strategies other than "neighbor" get only these cases.
INTERPRETED = (
    "k = 5", "mixing temperature", "ties", "faults", "all a row", "few tokens", "bfloat16", "released", "rate 1",
    "noise 1", "beta 2.5", "steps of their own",
)  # fmt: skip
INTERPRETED_CANDIDATES = ("mixing temperature", "faults", "all a row", "float16", "released")


def cases(backend: str) -> Cases:
    for strategy in STRATEGIES:
        yield from step_cases(backend, strategy)
    yield from noise_cases(backend)
    if backend == "eager":
        yield Case("decode_step", "more rows than a block", many_rows)
        yield from weight_cases()
        yield from fault_cases()


def arguments(inputs: Inputs, strategy: str, backend: str, change: dict[str, Any]) -> dict[str, Any]:
    found = {
        "logits": inputs.normal(B, V, scale=2), "embedding": ..., "temperature": 0.8, "mixing_rate": 0.5, "seed": 5,
        "step": 3, "strategy": strategy, "k": K, "backend": backend,
    } | change  # fmt: skip
    v, k = found["logits"].shape[1], found["k"]
    if found["embedding"] is ...:
        found["embedding"] = inputs.normal(v, D)
    bad = found.pop("bad_neighbors", False)
    if strategy == "neighbor":
        found["neighbor_ids"] = inputs.integers(v, v, k - 1)
        if bad and k > 1:
            found["neighbor_ids"][:, -1] = torch.tensor([-1, v, 0, 1]).repeat(v // 4 + 1)[:v]
    if strategy in ("neighbor", "anchor"):
        del found["k"]
    if backend == "triton":
        found |= {x: found[x][:INTERPRETED_ROWS] for x in BY_ROW if isinstance(found.get(x), Tensor) and found[x].dim()}
    return found


def step(inputs: Inputs, strategy: str, backend: str, change: Callable[[Inputs], dict[str, Any]]) -> Any:
    return decode_step(**arguments(inputs, strategy, backend, change(inputs)))


def candidates(inputs: Inputs, strategy: str, backend: str, change: Callable[[Inputs], dict[str, Any]]) -> Any:
    found = arguments(inputs, strategy, backend, change(inputs))
    for name in ("embedding", "mixing_rate", *(() if strategy in ("moi", "multiplex") else FILTERS)):
        found.pop(name, None)
    return [mixing_candidates(**found, return_entropy=entropy) for entropy in (False, True)[backend == "triton" :]]


def step_cases(backend: str, strategy: str) -> Cases:
    settings = dict(SETTINGS)
    for dtype in dtypes(backend):
        settings[short(dtype)] = partial(of_dtype, dtype=dtype)
    for layout in LAYOUTS[1:]:
        settings[layout] = partial(of_layout, layout=layout)
    if strategy not in OWN_WEIGHTS:
        settings["released"] = lambda i: {"variant": "released"}
        if backend == "eager":
            settings["released, mixing temperature"] = lambda i: {"variant": "released", "mixing_temperature": 0.01}
    if strategy == "anchor":
        del settings["k = 5"]
    if strategy != "neighbor" or backend == "eager":
        del settings["bad neighbors"]  # plain torch on a CPU refuses them
    if strategy == "gumbel" and backend == "triton":
        del settings["faults"]  # up to 0.6.1 the kernel writes past the end of its outputs there
    of_strategy = OF_STRATEGY.get(strategy, {})
    alone = STEP_SETTINGS | {name: lambda i, values=values: values for name, values in of_strategy.items()}
    whole = backend == "eager" or strategy == "neighbor"
    for name, change in (settings | alone).items():
        if whole or name in INTERPRETED:
            call = partial(step, strategy=strategy, backend=backend, change=change)
            yield Case("decode_step", f"{strategy}, {name}", call)
    for name, change in settings.items():
        if name in FILTERS and strategy not in ("moi", "multiplex"):
            continue  # only the strategies that draw read filters here
        if backend == "eager" or name in INTERPRETED_CANDIDATES:
            call = partial(candidates, strategy=strategy, backend=backend, change=change)
            yield Case("mixing_candidates", f"{strategy}, {name}", call)


def of_dtype(inputs: Inputs, dtype: torch.dtype) -> dict[str, Any]:
    return {"logits": inputs.normal(B, V, dtype=dtype, scale=2), "embedding": inputs.normal(V, D, dtype=dtype)}


def of_layout(inputs: Inputs, layout: str) -> dict[str, Any]:
    return {"logits": inputs.normal(B, V, layout=layout), "embedding": inputs.normal(V, D, layout=layout)}


def many_rows(inputs: Inputs) -> Any:
    """The CPU form takes 2^19 logits at a time."""
    logits, rows = inputs.normal(13, 50_000, scale=3), inputs.integers(2**62, 13)
    table, neighbors = inputs.normal(50_000, 4), inputs.integers(50_000, 50_000, 2)
    options = {"mixing_rate": 0.5, "top_p": 0.9, "enabled": inputs.mask(0.7, 13), "seed": 1, "row_ids": rows}
    return [decode_step(logits, table, neighbors, step=step, **options) for step in (4, torch.arange(13))]


# candidate_weights, gaussian_noise, raise_faults ------------------------------------------------------------------


def weight_cases() -> Cases:
    for dtype in dtypes("eager"):
        for variant in ("paper", "released"):
            call = partial(weighed, dtype=dtype, variant=variant)
            yield Case("candidate_weights", f"{variant}, {short(dtype)}", call)


def weighed(inputs: Inputs, dtype: torch.dtype, variant: str) -> Any:
    results = []
    for shape, temperature in (((), 1.0), ((4,), 0.3), ((2, 3), 2.0), ((0,), 1.0)):
        for layout in LAYOUTS if len(shape) == 2 else LAYOUTS[:1]:
            logits = inputs.normal(*shape, 17, dtype=dtype, scale=3, layout=layout)
            ids = inputs.integers(17, *shape, 3, layout=layout)
            call = partial(candidate_weights, ids=ids, temperature=temperature, variant=variant)
            results.append(with_gradients(inputs, call, logits=logits))
    return results


def noise_cases(backend: str) -> Cases:
    for dtype in dtypes(backend):
        for name in ("one scale and seed", "scale and seed a row"):
            call = partial(noised, dtype=dtype, of_rows="a row" in name, backend=backend)
            yield Case("gaussian_noise", f"{name}, {short(dtype)}", call)


def noised(inputs: Inputs, dtype: torch.dtype, of_rows: bool, backend: str) -> Any:
    results = []
    for m, d, layout in ((5, 37, "contiguous"), (3, 300, "transposed"), (4, 8, "sliced"), (0, 4, "contiguous")):
        call = partial(
            gaussian_noise,
            noise_scale=inputs.uniform(m) if of_rows else 0.5,
            seed=inputs.integers(2**62, m) - 2**61 if of_rows else -7,
            row_ids=inputs.integers(2**62, m), steps=inputs.integers(2**40, m), backend=backend,
        )  # fmt: skip
        mixed = inputs.normal(m, d, dtype=dtype, layout=layout)
        results.append(with_gradients(inputs, call, mixed=mixed))
    return results


def fault_cases() -> Cases:
    found = {
        "none": torch.zeros(4), "one row": torch.tensor([0, 1, 0, 0]), "two rows": torch.tensor([0, 2, 4, 0]),
        "several reasons": torch.tensor([0, 7, 0, 0]),
        "steps": torch.tensor([[0, 0, 1], [0, 2, 0], [0, 0, 0], [0, 4, 4]]),
    }  # fmt: skip
    for name, fault in found.items():
        fault = fault.to(torch.int32)
        for rows in (None, torch.arange(4) + 100):
            call = partial(raise_faults, fault, row_ids=rows)
            label = name if rows is None else f"{name}, named rows"
            yield Case("raise_faults", label, lambda inputs, call=call: refusal(call))
