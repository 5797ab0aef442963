"""Every public call with what it does not expect: foreign defaults, tensors of other kinds, extreme sizes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from ngrpo_ops import (
    MixRecord,
    NeighborTable,
    Whitening,
    candidate_weights,
    decode_step,
    gaussian_noise,
    group_advantages,
    mix_embeddings,
    mixing_candidates,
    nearest_neighbors,
    raise_faults,
    selective_log_softmax,
)
from ngrpo_ops.random import gates


def given(*shape: int, high: int = 0) -> Tensor:
    """Numbers that no default changes: normal, or int64 below `high`."""
    generator = torch.Generator("cpu").manual_seed(sum(shape) + high)
    if high:
        return torch.randint(high, shape, generator=generator, device="cpu")
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


V, D, B, K = 13, 8, 4, 3
TENSORS: dict[str, dict[str, Tensor]] = {
    "nearest_neighbors": {"embedding": given(V, D), "queries": given(5, high=V), "allowed": given(V) > -1},
    "NeighborTable.refresh": {"embedding": given(V, D)},
    "NeighborTable.lookup": {"token_ids": given(B, high=V)},
    "candidate_weights": {"logits": given(B, V), "ids": given(B, K, high=V)},
    "mix_embeddings": {"embedding": given(V, D), "ids": given(B, K, high=V), "weights": given(B, K)},
    "gaussian_noise": {
        "mixed": given(B, D), "noise_scale": given(B).abs(), "seed": given(B, high=99), "row_ids": given(B, high=99),
        "steps": given(B, high=99),
    },
    "decode_step": {
        "logits": given(B, V), "embedding": given(V, D), "neighbor_ids": given(V, K - 1, high=V),
        "temperature": given(B).abs() + 0.1, "top_k": given(B, high=V) + 1, "top_p": given(B).sigmoid(),
        "min_p": given(B).sigmoid() / 2, "row_ids": given(B, high=99), "step": given(B, high=99),
        "enabled": given(B) > 0, "seed": given(high=99),
    },
    "mixing_candidates": {
        "logits": given(B, V), "neighbor_ids": given(V, K - 1, high=V), "temperature": given(B).abs() + 0.1,
        "row_ids": given(B, high=99), "step": given(B, high=99), "seed": given(high=99),
    },
    "group_advantages": {
        "rewards": given(8, 2), "group_ids": given(8, high=3), "mask": given(8) > -1, "reward_weights": given(2),
        "lengths": given(8, high=9),
    },
    "selective_log_softmax": {"logits": given(B, V), "ids": given(B, K, high=V)},
    "raise_faults": {"fault": given(B, high=1) * 0, "row_ids": given(B, high=99)},
    "MixRecord": {
        "gate": given(B, 5) > 0, "ids": given(B, 5, K, high=V), "weights": given(B, 5, K), "logprobs": given(B, 5),
        "noise_scale": given(B), "noise_seed": given(B, high=9), "row_ids": given(B, high=9),
    },
}  # fmt: skip


def lookup(token_ids: Tensor) -> Any:
    table = NeighborTable(K - 1)
    table.refresh(given(V, D))
    return table.lookup(token_ids)


def refresh(embedding: Tensor) -> Any:
    table = NeighborTable(K - 1)
    table.refresh(embedding)
    table.refresh(embedding + 1e-3)
    return table.ids, table.scores


CALLS: dict[str, Callable[..., Any]] = {
    "nearest_neighbors": functools.partial(nearest_neighbors, k=K - 1),
    "NeighborTable.refresh": refresh,
    "NeighborTable.lookup": lookup,
    "candidate_weights": candidate_weights,
    "mix_embeddings": mix_embeddings,
    "gaussian_noise": gaussian_noise,
    "decode_step": functools.partial(decode_step, mixing_rate=0.5),
    "mixing_candidates": functools.partial(mixing_candidates, return_entropy=True),
    "group_advantages": functools.partial(
        group_advantages, scale="batch_std", whitening=Whitening(), aggregation="normalize_then_sum"
    ),
    "selective_log_softmax": functools.partial(selective_log_softmax, return_entropy=True),
    "raise_faults": raise_faults,
    "MixRecord": functools.partial(MixRecord, prompt_length=2),
}
OTHERS: dict[str, Callable[[], Any]] = {
    "decode_step by numbers": lambda: decode_step(
        given(B, V), given(V, D), given(V, K - 1, high=V), temperature=0.7, top_k=5, top_p=0.9, seed=3, step=4
    ),
    **{
        f"mixing_candidates, {strategy}": functools.partial(
            mixing_candidates, given(B, V), strategy=strategy, k=K, temperature=0.7, seed=3, step=4
        )
        for strategy in ("topk", "gumbel", "gaussian", "moi", "multiplex")
    },
    "many rows": lambda: decode_step(given(64, 40_000), None, strategy="topk", k=2, seed=1, step=2),
    "group_advantages by size": lambda: group_advantages(given(8), group_size=4),
    "group_advantages by offsets": lambda: group_advantages(
        given(8), offsets=torch.tensor([0, 3, 8], device="cpu"), scale="batch_std", mask=given(8) > 0
    ),
    **{
        f"nearest_neighbors, {metric}": functools.partial(nearest_neighbors, given(200, D), 5, metric=metric)
        for metric in ("cosine", "dot", "l2", "l1")
    },
    "mix_embeddings, float16": lambda: mix_embeddings(given(V, D).half(), given(B, K, high=V), given(B, K)),
    "gates": lambda: gates(given(high=9), given(B, high=9), given(B, high=9), 0.5),
    "MixRecord.fit": lambda: MixRecord(**TENSORS["MixRecord"], prompt_length=2).fit(9),
    "MixRecord.bytes": lambda: MixRecord.from_bytes(MixRecord(**TENSORS["MixRecord"], prompt_length=2).to_bytes()),
    "gradients": lambda: gradients(),
}


def gradients() -> list[Tensor]:
    table, weights, logits = (x.clone().requires_grad_() for x in (given(V, D), given(B, K), given(B, V)))
    rewards = given(8).requires_grad_()
    ids = given(B, K, high=V)
    total = mix_embeddings(table, ids, weights).square().sum() + selective_log_softmax(logits, ids).sum()
    (total + group_advantages(rewards, group_size=4).square().sum()).backward()
    return [x.grad for x in (table, weights, logits, rewards)]  # type: ignore[misc]


def flat(result: Any) -> list[Any]:
    if isinstance(result, MixRecord):
        return [*result.tensors().values(), result.prompt_length]
    return list(result) if isinstance(result, (tuple, list)) else [result]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "meta": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("call", [*CALLS, *OTHERS])
def test_no_default_of_torch_changes_a_result(call: str, default: str) -> None:
    run = OTHERS.get(call) or functools.partial(CALLS[call], **TENSORS[call])
    expected = flat(run())
    with DEFAULTS[default]():
        found = flat(run())
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        if isinstance(y, Tensor):
            assert x.device == y.device and x.dtype == y.dtype
            assert torch.equal(x.nan_to_num(7.0) if x.is_floating_point() else x, y.nan_to_num(7.0))
        else:
            assert x == y


# Tensors of other kinds -------------------------------------------------------------------------------------------


def as_nested(x: Tensor) -> Tensor:
    return torch.nested.nested_tensor([x, x], layout=torch.jagged)


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "float8": lambda x: x.float().to(torch.float8_e4m3fn),
    "coo": lambda x: x.to_sparse(),
    "csr": lambda x: x[None].to_sparse_csr() if x.dim() == 1 else x.reshape(len(x), -1).to_sparse_csr(),
    "nested": as_nested,
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "complex": lambda x: x.to(torch.complex64),
    "meta": lambda x: x.to("meta"),
    "array": lambda x: x.numpy(),
    "list": lambda x: x.tolist(),
    "text": lambda x: "text",
    "none": lambda x: None,
    "other integers": lambda x: x.to(torch.int32),
}
OPTIONAL = {
    "nearest_neighbors": {"queries", "allowed"},
    "decode_step": {"embedding", "top_k", "top_p", "min_p", "row_ids", "enabled"},
    "mixing_candidates": {"row_ids"},
    "group_advantages": {"mask", "reward_weights", "lengths"},
    "raise_faults": {"row_ids"},
    "MixRecord": {"logprobs"},
}
HOSTILE = [
    (call, name, kind)
    for call, tensors in TENSORS.items()
    for name, kind in itertools.product(tensors, KINDS)
    if tensors[name].dim() or kind not in ("csr", "coo", "nested", "list")
    if (name, kind) != ("fault", "other integers")
]


@pytest.mark.parametrize(("call", "name", "kind"), HOSTILE)
@pytest.mark.filterwarnings("ignore")
def test_a_tensor_of_another_kind_is_refused_by_name(call: str, name: str, kind: str) -> None:
    """None is an answer where an argument may be left out."""
    arguments: dict[str, Any] = dict(TENSORS[call])
    arguments[name] = KINDS[kind](arguments[name])
    if kind == "none" and name in OPTIONAL.get(call, ()):
        CALLS[call](**arguments)
        return
    with pytest.raises((TypeError, ValueError)) as caught:
        CALLS[call](**arguments)
    assert name in str(caught.value), str(caught.value)
    assert "Dispatch" not in str(caught.value) and "aten::" not in str(caught.value)


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "mixing_rate", "mixing_temperature"])
@pytest.mark.parametrize("value", [True, "0.5", float("nan"), float("inf"), -1, 1e-39, [0.5], np.ones(B)], ids=str)
def test_a_number_of_another_kind_is_refused_by_name(name: str, value: Any) -> None:
    if isinstance(value, float) and 0 < value < 1e-30 and "temperature" not in name:
        return  # as good as 0
    with pytest.raises((TypeError, ValueError), match=rf"^{name} "):
        decode_step(given(B, V), None, given(V, K - 1, high=V), **{"seed": 0, "step": 0, name: value})


@pytest.mark.parametrize("temperature", [1e-30, 1e30, 0.0])
def test_an_extreme_temperature_is_right(temperature: float) -> None:
    """Against the limits in float64: the argmax, or the uniform distribution."""
    logits = given(B, V)
    step = decode_step(logits, None, strategy="topk", k=2, temperature=temperature, seed=0, step=0, mixing_rate=1.0)
    assert not step.fault.any() and torch.equal(step.token_ids, logits.argmax(-1))
    right = {1e-30: (1.0, 0.0), 1e30: (0.5, 0.5)}.get(temperature)
    if right is not None:
        assert torch.allclose(step.weights, torch.tensor(right).expand(B, 2))
        entropy = 0.0 if temperature < 1 else float(torch.tensor(V).log())
        assert torch.allclose(step.entropy, torch.full((B,), entropy), atol=1e-6)


# Derivatives ------------------------------------------------------------------------------------------------------

IDS, WEIGHTS, TABLE, ONE_ID = given(B, K, high=V), given(B, K), given(V, D), given(B, high=V)
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "mix_embeddings, table": (lambda x: mix_embeddings(x, IDS, WEIGHTS), TABLE),
    "mix_embeddings, weights": (lambda x: mix_embeddings(TABLE, IDS, x), WEIGHTS),
    "group_advantages": (lambda x: group_advantages(x, group_size=4), given(8)),
    "group_advantages, whitened": (lambda x: group_advantages(x, group_size=4, whitening=Whitening()), given(8)),
    "selective_log_softmax": (lambda x: selective_log_softmax(x, ONE_ID), given(B, V)),
    "candidate_weights": (lambda x: candidate_weights(x, IDS), given(B, V)),
}


def dual(function: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


FORWARD_MODES: dict[str, Callable[..., Any]] = {
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "dual": dual,
    "jacfwd": lambda f, x, t: torch.func.jacfwd(f)(x).flatten(-x.dim()) @ t.flatten(),
}


@pytest.mark.parametrize("mode", FORWARD_MODES)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_forward_mode_derivative_is_right_or_refused(function: str, mode: str) -> None:
    f, x = FUNCTIONS[function]
    tangent = given(*x.shape)
    try:
        found = FORWARD_MODES[mode](f, x, tangent)
    except NotImplementedError as error:
        assert "has no forward-mode derivative" in str(error)
        return
    step = 1e-6
    expected = (f(x.double() + step * tangent) - f(x.double() - step * tangent)) / (2 * step)
    assert torch.allclose(found.double(), expected, atol=1e-4) and float(expected.abs().max()) > 1e-2


# Squares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", [-37, -30, -20, 0, 20, 30, 37])
@pytest.mark.parametrize("settings", [{}, {"scale": "batch_std"}, {"whitening": Whitening(eps=0.0)}], ids=str)
def test_deviations_of_any_size(settings: dict, exponent: int, dtype: torch.dtype) -> None:
    """Against float64 of the same rewards at size 1: advantages have no unit, gradients that of 1 / reward."""
    if dtype == torch.float64:
        exponent *= 8
    size = 10.0**exponent
    base, upstream = given(8).double(), given(8).double()
    results = []
    for scale, kind in ((1.0, torch.float64), (size, dtype)):
        rewards = (base * scale).to(kind).requires_grad_()
        advantages = group_advantages(rewards, group_size=4, eps=0.0, **settings)
        (advantages * upstream.to(kind)).sum().backward()
        assert rewards.grad is not None
        results.append((advantages.detach().double(), rewards.grad.double() * scale))
    for found, expected in zip(results[1], results[0], strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exponent", [-37, -30, -20, 0, 20, 30, 37])
def test_noise_on_rows_of_any_size(exponent: int) -> None:
    """The noise has the row's own size: a row 10^n times as large has 10^n times the noise."""
    counters = {"seed": 3, "row_ids": torch.arange(B), "steps": torch.arange(B)}
    mixed = given(B, D)
    noise = gaussian_noise(mixed.double(), 0.5, **counters) - mixed
    found = gaussian_noise(mixed * 10.0**exponent, 0.5, **counters).double() / 10.0**exponent - mixed
    assert torch.allclose(found, noise, rtol=1e-4, atol=1e-5) and float(noise.abs().mean()) > 0.1


def test_masked_rows_are_zero_whatever_the_others_are() -> None:
    nan, infinity = float("nan"), float("inf")
    mask = torch.tensor([True, True, False, True, False, True, True, True])
    columns = ([1.0, nan, 2, 3, 0, 1, 5, 2], [1.0, infinity, 2, 3, 0, 1, 5, 2], [1.0, 2, 3, 1e38, -1e38, 3, 3, 3])
    weights = (None, torch.tensor([1.0, nan]), torch.tensor([infinity, 0.0]))
    for rewards, scale, baseline, policy, singles, whitening, aggregation, weight in itertools.product(
        columns, ("std", "batch_std", "mean", "none"), ("mean", "leave_one_out", "none"), ("propagate", "omit"),
        ("zero", "keep"), (None, Whitening()), ("sum_then_normalize", "normalize_then_sum"), weights,
    ):  # fmt: skip
        one = torch.tensor(rewards)
        advantages = group_advantages(
            one if weight is None else torch.stack([one, one.flip(0)], dim=1), group_size=4, scale=scale,
            baseline=baseline, nan_policy=policy, singleton_groups=singles, whitening=whitening,
            aggregation=aggregation, reward_weights=weight, mask=mask,
        )  # fmt: skip
        assert (advantages[~mask] == 0).all(), (rewards, scale, baseline, policy, singles, whitening, aggregation)
