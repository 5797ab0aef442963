"""Cases of mix_embeddings, group_advantages and selective_log_softmax, all with their gradients."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from inputs import LAYOUTS, Case, Cases, Inputs, at_least, dtypes, short, singleton_groups, with_gradients
from torch import Tensor

from ngrpo_ops import ADVANTAGE_PRESETS, Whitening, group_advantages, mix_embeddings, selective_log_softmax


def cases(backend: str) -> Cases:
    yield from mix_cases(backend)
    yield from advantage_cases(backend)
    yield from log_softmax_cases(backend)


# mix_embeddings ---------------------------------------------------------------------------------------------------


def mix_cases(backend: str) -> Cases:
    def case(name: str, **options: Any) -> Case:
        return Case("mix_embeddings", name, partial(mixed, backend=backend, **options))

    for dtype in dtypes(backend):
        name = short(dtype)
        yield case(name, dtype=dtype)
        yield case(f"{name}, padding", dtype=dtype, padding_id=2)
        yield case(f"{name}, padding outside", dtype=dtype, padding_id=-1)
        yield case(f"{name}, zero weights", dtype=dtype, zeros=True)
        yield case(f"{name}, some rows", dtype=dtype, out_rows=5)
        yield case(f"{name}, atomic", dtype=dtype, deterministic=False)
        for weights in dtypes(backend):
            if weights != dtype:
                yield case(f"{name}, weights of {short(weights)}", dtype=dtype, weights_dtype=weights)
        for layout in LAYOUTS[1:]:
            yield case(f"{name}, {layout}", dtype=dtype, layout=layout)
        if backend == "eager" or dtype == torch.float32:
            yield case(f"{name}, many positions", dtype=dtype, shape=(300,), v=7)
    yield case("k = 1", k=1)
    yield case("k = 32", k=32, shape=(3,))
    yield case("one position", shape=())
    yield case("three dimensions", shape=(2, 3, 2))
    yield case("no positions", shape=(0,))
    yield case("wide rows", d=300)
    yield Case("mix_embeddings", "one gradient alone", partial(mixed_one_gradient, backend=backend))
    if backend == "eager":
        yield case("k = 40", k=40, shape=(3,))
        yield Case("mix_embeddings", "rows of NaN and inf", mixed_unusual)


def mixed(
    inputs: Inputs, backend: str, dtype: torch.dtype = torch.float32, weights_dtype: torch.dtype | None = None,
    shape: tuple[int, ...] = (9,), v: int = 20, d: int = 6, k: int = 3, layout: str = "contiguous",
    zeros: bool = False, out_rows: int | None = None, **options: Any,
) -> Any:  # fmt: skip
    ids = inputs.integers(v, *shape, k, layout=layout)
    weights = inputs.uniform(*shape, k, dtype=weights_dtype or (dtype if dtype == torch.float64 else torch.float32))
    if zeros:
        weights = weights.masked_fill(inputs.mask(0.4, *weights.shape), 0)
    if options.get("padding_id") == -1:
        ids = ids.masked_fill(inputs.mask(0.3, *ids.shape), -1)
    if out_rows is not None:
        options["out_rows"] = inputs.integers(shape[0], out_rows)
    embedding = inputs.normal(v, d, dtype=dtype, layout=layout)

    def call(embedding: Tensor, weights: Tensor) -> Tensor:
        return mix_embeddings(embedding, ids, weights, backend=backend, **options)

    plain = call(embedding, weights)
    return plain, with_gradients(inputs, call, embedding=embedding, weights=weights)


def mixed_one_gradient(inputs: Inputs, backend: str) -> Any:
    embedding, weights, ids = inputs.normal(9, 4), inputs.uniform(5, 3), inputs.integers(9, 5, 3)
    of_table = with_gradients(
        inputs, lambda embedding: mix_embeddings(embedding, ids, weights, backend=backend), embedding=embedding.clone()
    )
    of_weights = with_gradients(
        inputs, lambda weights: mix_embeddings(embedding, ids, weights, backend=backend), weights=weights.clone()
    )
    return of_table, of_weights


def mixed_unusual(inputs: Inputs) -> Any:
    results = []
    for dtype in dtypes("eager"):
        embedding = inputs.normal(9, 4, dtype=dtype)
        embedding[4], embedding[5, 1] = torch.nan, torch.inf
        ids, weights = torch.tensor([[4, 1], [4, 2], [5, 3]]), torch.tensor([[0.0, 1.0], [0.5, 0.5], [0.3, 0.7]])
        results.append(mix_embeddings(embedding, ids, weights.to(dtype) if dtype == torch.float64 else weights))
    return results


# group_advantages -------------------------------------------------------------------------------------------------


def layouts(inputs: Inputs, backend: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Name, number of rewards and arguments of the ways to say what is a group."""
    yield "equal groups", 24, {"group_size": 4}
    yield "offsets", 24, {"offsets": torch.tensor([0, 0, 1, 3, 3, 12, 24])}
    if backend == "eager":  # the same to a kernel, which takes long under the interpreter
        yield "labels", 24, {"group_ids": inputs.integers(7, 24) * 1000 - 7}
        yield "one group", 9, {"group_size": 9}
        yield "groups of one", 5, {"group_size": 1}


def advantage_cases(backend: str) -> Cases:
    if backend == "eager":
        presets = {name: at_least(dict(options)) for name, options in ADVANTAGE_PRESETS.items()}
        yield Case("group_advantages", "the presets", lambda inputs: at_least(presets))
    for preset, options in ADVANTAGE_PRESETS.items():
        for dtype in dtypes(backend) if backend == "eager" or preset == "trl/grpo" else (torch.float32,):
            call = partial(advantages, options=dict(options), dtype=dtype, backend=backend)
            yield Case("group_advantages", f"{preset}, {short(dtype)}", call)
    for baseline in ("mean", "leave_one_out", "none"):
        for scale in ("std", "batch_std", "mean", "none"):
            for single in ("zero", "keep"):
                options = {"baseline": baseline, "scale": scale, "ddof": 0, "eps": 1e-2, singleton_groups(): single}
                call = partial(advantages, options=options, backend=backend)
                yield Case("group_advantages", f"baseline {baseline}, scale {scale}, alone: {single}", call)
    for aggregation in ("sum_then_normalize", "normalize_then_sum"):
        for policy in ("propagate", "omit"):
            for whitening in (None, Whitening(ddof=0, eps=1e-3, floor=0.5)):
                options = {"aggregation": aggregation, "nan_policy": policy, "whitening": whitening}
                call = partial(advantages, options=options, functions=3, backend=backend)
                name = f"{aggregation}, {policy}" + ("" if whitening is None else ", whitened")
                yield Case("group_advantages", name, call)


def advantages(
    inputs: Inputs, options: dict[str, Any], backend: str, dtype: torch.dtype = torch.float32, functions: int = 0
) -> Any:
    """Every layout: plain, and with masked rows, equal rewards, NaN or, for whitening, lengths."""
    results: dict[str, Any] = {}
    for name, n, groups in layouts(inputs, backend):
        shape = (n, functions) if functions else (n,)
        rewards = inputs.normal(*shape, dtype=dtype)
        settings = {"backend": backend, **groups, **options}
        if functions:
            settings["reward_weights"] = torch.tensor([2.0, 0.5, -1.0])[:functions]

        def compute(rewards: Tensor, settings: dict[str, Any] = settings, **more: Any) -> Any:
            call = partial(group_advantages, **settings, **more)
            return with_gradients(inputs, lambda rewards: call(rewards), rewards=rewards.clone())

        unscored = rewards.masked_fill(inputs.mask(0.2, *shape), torch.nan)
        mask, lengths = inputs.mask(0.6, n), inputs.integers(30, n)
        whitened = options.get("whitening") is not None
        results[f"{name}, NaN, masked"] = compute(unscored, mask=mask, **{"lengths": lengths} if whitened else {})
        if backend == "eager" or name == "equal groups":
            results[name] = compute(rewards)
        if backend == "eager":
            results[f"{name}, NaN"] = compute(unscored)
            results[f"{name}, masked"] = compute(rewards, mask=mask)
            results[f"{name}, equal"] = compute((rewards > 0).to(dtype))
            if whitened:
                results[f"{name}, lengths"] = compute(rewards, lengths=lengths)
    return results


# selective_log_softmax --------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "a row": ((17,), ()),
    "a row, 2 ids": ((17,), (2,)),
    "rows": ((6, 40), (6,)),
    "rows, 5 ids": ((6, 40), (6, 5)),
    "sequences": ((2, 4, 40), (2, 4)),
    "sequences, 3 ids": ((2, 4, 40), (2, 4, 3)),
    "batches of sequences": ((2, 2, 3, 9), (2, 2, 3)),
    "one token": ((3, 1), (3,)),
    "large vocabulary": ((2, 2100), (2,)),
    "more rows than a block": ((14, 50_000), (14,)),  # of the CPU form: 2^19 logits
}


def log_softmax_cases(backend: str) -> Cases:
    for dtype in dtypes(backend):
        for shape in SHAPES:
            if shape == "more rows than a block" and (backend == "triton" or dtype != torch.float32):
                continue
            if backend == "triton" and dtype != torch.float32 and shape not in ("rows, 5 ids", "sequences"):
                continue
            call = partial(log_probabilities, shape=shape, dtype=dtype, backend=backend)
            yield Case("selective_log_softmax", f"{shape}, {short(dtype)}", call)
        for layout in LAYOUTS[1:] if backend == "eager" or dtype == torch.bfloat16 else ():
            call = partial(log_probabilities, shape="sequences", dtype=dtype, backend=backend, layout=layout)
            yield Case("selective_log_softmax", f"{layout}, {short(dtype)}", call)
    for temperature in (0.01, 0.7, 3.0):
        call = partial(log_probabilities, shape="rows", temperature=temperature, backend=backend)
        yield Case("selective_log_softmax", f"temperature {temperature}", call)
    yield Case("selective_log_softmax", "all but the last column", partial(sliced_log_probabilities, backend=backend))
    yield Case("selective_log_softmax", "unusual rows", partial(unusual_log_probabilities, backend=backend))


def log_probabilities(
    inputs: Inputs, shape: str, backend: str, dtype: torch.dtype = torch.float32, layout: str = "contiguous",
    temperature: float = 0.8, logits: Tensor | None = None,
) -> Any:  # fmt: skip
    """With and without entropy and gradient, the latter in place or not; in place also what becomes of the logits."""
    of_logits, of_ids = SHAPES[shape]
    if logits is None:
        logits = inputs.normal(*of_logits, dtype=dtype, scale=3, layout=layout)
    ids = inputs.integers(logits.shape[-1], *of_ids)
    results: dict[str, Any] = {}
    for entropy in (False, True):
        options = {"temperature": temperature, "return_entropy": entropy, "backend": backend}
        results[f"entropy {entropy}"] = selective_log_softmax(logits, ids, **options)
        for in_place in (False, True):
            leaf = logits.detach().clone(memory_format=torch.preserve_format)
            call = partial(selective_log_softmax, ids=ids, in_place_backward=in_place, **options)
            results[f"entropy {entropy}, in place {in_place}"] = with_gradients(inputs, call, logits=leaf)
            results[f"entropy {entropy}, in place {in_place}, logits"] = leaf
    return results


def sliced_log_probabilities(inputs: Inputs, backend: str) -> Any:
    whole = inputs.normal(2, 5, 40, scale=3)
    return log_probabilities(inputs, "sequences", backend, logits=whole[:, :-1])


def unusual_log_probabilities(inputs: Inputs, backend: str) -> Any:
    logits = inputs.normal(6, 40, scale=30)
    logits[0, 3:] = -torch.inf
    logits[1], logits[2, 5], logits[3, 6], logits[4] = -torch.inf, torch.nan, torch.inf, 1e30
    return log_probabilities(inputs, "rows", backend, logits=logits)
