"""Bad calls: the type of each error, and its words. Also the signatures and defaults of what is public."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from inputs import RENAMED, Case, Cases, Inputs, at_least, counter_based_sampler, refusal
from torch import Tensor

import ngrpo_ops
from ngrpo_ops import (
    MixingConfig,
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

NAN, INF = float("nan"), float("inf")
ones = torch.ones


def zeros(*shape: int) -> Tensor:
    """int64."""
    return torch.zeros(shape, dtype=torch.int64)


def true(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def away(*shape: int) -> Tensor:
    """int64 on another device."""
    return zeros(*shape).to("meta")


EMBEDDINGS = {
    "embedding": [
        1,
        ones(4, 2).int(),
        ones(2, 2, 2),
        ones(4, 0),
        ones(0, 2),
        ones(4, 2, dtype=torch.complex64),
        ones(4, 2).to("meta"),
    ]
}
COUNTERS = {
    "seed": [1.5, "0", True, 2**64, torch.tensor(1.0), torch.tensor([1]), away()],
    "step": [1.5, "0", None, 2**64, torch.tensor(1).int(), torch.tensor([1]), away(), away(4)],
    "row_ids": [[0, 1, 2, 3], ones(4), zeros(3), zeros(4, 1), away(4)],
}
SETTINGS = {
    "temperature": [
        -0.1,
        INF,
        NAN,
        "1",
        True,
        ones(3),
        torch.tensor([1.0, 1.0, -1.0, 1.0]),
        zeros(4),
        ones(4).to("meta"),
    ],
    "top_k": [0, 1.5, "1", ones(4), zeros(3), away(4)],
    "top_p": [0.0, 1.1, NAN, "1", zeros(4), torch.tensor([0.5, 0.5, 1.5, 0.5]), ones(4).to("meta")],
    "min_p": [-0.1, 1.1, NAN, ones(3), torch.tensor([0.5, 0.5, -1.5, 0.5])],
    "variant": ["official", None],
    "backend": ["cuda", "triton"],
    "mixing_temperature": [0.0, -1, INF, "1"],
    "moi_beta": [1.0],
    "k": [2, 4, 1.5],
    "strategy": ["neighbour", "topk", "anchor", None],
    "neighbor_ids": [None, [0], ones(5, 2), zeros(5), zeros(4, 2), zeros(5, 2).int(), away(5, 2)],
    "logits": [1, ones(5), ones(4, 5).long(), ones(0, 5), ones(4, 0), ones(2, 2, 5), ones(4, 5).to("meta")],
}
NO_NEIGHBORS = {"neighbor_ids": None}
STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "topk"}, {"strategy": "topk", "k": 6}, {"strategy": "topk", "k": 0}, {"strategy": "topk", "k": "2"},
    {"strategy": "anchor", "k": 2}, {"strategy": "gumbel", "k": 2, "variant": "released"},
    {"strategy": "moi", "k": 2, "variant": "released"}, {"strategy": "multiplex", "k": 2, "moi_beta": 1.0},
    {"strategy": "moi", "k": 2, "moi_beta": -1.0}, {"strategy": "moi", "k": 2, "moi_beta": INF},
    {"strategy": "multiplex", "k": 2, "variant": "released"}, {"strategy": "topk", "k": 33, "backend": "triton"},
]  # fmt: skip
RECORD = {"gate": true(2, 3), "ids": zeros(2, 3, 2), "weights": ones(2, 3, 2), "prompt_length": 1}

# A call that is right, and what to put in the place of each of its arguments.
Bad = tuple[Callable[..., Any], dict[str, Any], dict[str, list[Any]]]
BAD: dict[str, Bad] = {
    "nearest_neighbors": (
        nearest_neighbors,
        {"embedding": torch.arange(10.0).view(5, 2), "k": 2},
        EMBEDDINGS
        | {
            "k": [0, 5, 1.5, True, "2", None],
            "metric": ["euclid", None],
            "queries": [[0], ones(2), zeros(2, 1), zeros(0), zeros(2) + 5, zeros(2) - 1, zeros(2).int(), away(2)],
            "allowed": [[True], ones(5), true(4), true(5) & (torch.arange(5) < 2), true(5).to("meta")],
            "backend": ["cuda", "triton", 1],
            "progress": [lambda done, total: 1 / 0],
        },
    ),
    "nearest_neighbors, values": (
        lambda value: nearest_neighbors(torch.tensor([[1.0, 2.0], [0.0, value], [2.0, 1.0]]), 1, metric="dot"),
        {"value": 1.0},
        {"value": [NAN, INF, -INF, 1e19]},
    ),
    "candidate_weights": (
        candidate_weights,
        {"logits": ones(2, 4), "ids": zeros(2, 1)},
        {
            "logits": [[1.0], ones(3, 4), ones(4)],
            "ids": [
                [0],
                ones(2, 1),
                zeros(2),
                zeros(3, 1),
                zeros(2, 0),
                zeros(2, 1) + 4,
                zeros(2, 1).int(),
                away(2, 1),
            ],
            "temperature": [0.0, -1.0, NAN, INF, "1", None],
            "variant": ["official", None],
        },
    ),
    "mix_embeddings": (
        mix_embeddings,
        {"embedding": ones(4, 2), "ids": torch.tensor([[0, 1]]), "weights": ones(1, 2)},
        EMBEDDINGS
        | {
            "ids": [
                [[0, 1]],
                ones(1, 2),
                zeros(1, 2).int(),
                torch.tensor(1),
                zeros(1, 0),
                zeros(1, 2) + 4,
                zeros(1, 2) - 1,
                away(1, 2),
            ],
            "weights": [[1.0], zeros(1, 2), ones(2), ones(1, 3), ones(1, 2).to("meta")],
            "padding_id": [0.5, 2**63, "1", True],
            "deterministic": ["no", None, 1],
            "out_rows": [[0], torch.tensor([1]), torch.tensor([0.0]), zeros(1, 1), torch.tensor([-1]), away(1)],
            "backend": ["cuda", "triton"],
        },
    ),
    "mixing_candidates": (
        mixing_candidates,
        {"logits": ones(4, 5), "neighbor_ids": zeros(5, 2)},
        SETTINGS | COUNTERS | {"return_entropy": [1, None], "top_p": [0.9], "top_k": [2], "min_p": [0.1]},
    ),
    "decode_step": (
        decode_step,
        {"logits": ones(4, 5), "embedding": ones(5, 3), "neighbor_ids": zeros(5, 2), "seed": 0, "step": 0},
        SETTINGS
        | COUNTERS
        | EMBEDDINGS
        | {
            "mixing_rate": [-0.1, 1.5, NAN, "1", None],
            "noise_scale": [0.1, -1.0],
            "entropy_threshold": [-1.0, INF, "1"],
            "enabled": [ones(4), true(3), true(4).to("meta"), [True]],
        },
    ),
    "decode_step, neighbors": (
        lambda least: decode_step(ones(4, 5), ones(5, 3), torch.full((5, 2), least), seed=0, step=0),
        {"least": 0},
        {"least": [-1, 5]},
    ),
    "gaussian_noise": (
        gaussian_noise,
        {"mixed": ones(3, 4), "noise_scale": 0.1, "seed": 0, "row_ids": zeros(3), "steps": zeros(3)},
        {
            "mixed": [1, ones(3), zeros(3, 4)],
            "noise_scale": [-1.0, INF, "1", ones(2), zeros(3), ones(3).to("meta")],
            "seed": [1.5, 2**64, zeros(2), ones(3), away(), away(3)],
            "row_ids": [0, [0, 1, 2], ones(3), zeros(2), away(3)],
            "steps": [0, ones(3), zeros(2), away(3)],
            "backend": ["cuda", "triton"],
        },
    ),
    "raise_faults": (raise_faults, {"fault": torch.zeros(3)}, {"fault": [[0], torch.ones(3).int()]}),
    "group_advantages": (
        group_advantages,
        {"rewards": ones(6), "group_size": 2},
        {
            "rewards": [1, zeros(6), ones(0), ones(2, 3, 1), ones(6, 0), ones(7)],
            "group_size": [0, 4, -2, 1.5, "2", True, None],
            "group_ids": [zeros(6)],
            "offsets": [torch.tensor([0, 6])],
            "baseline": ["median", None],
            "scale": ["max", None],
            "aggregation": ["sum", None],
            "nan_policy": ["raise", None],
            "ddof": [-1, 0.5, "1"],
            "eps": [-1.0, INF, NAN, "1"],
            "mask": [ones(6), true(5), true(6).to("meta"), [True]],
            "reward_weights": [[1.0], zeros(1), ones(2), ones(1).to("meta")],
            "lengths": [zeros(6)],
            "whitening": [True, {"ddof": 0}],
            "backend": ["cuda", "triton"],
        },
    ),
    "group_advantages, labels": (
        group_advantages,
        {"rewards": ones(6), "group_ids": zeros(6)},
        {"group_ids": [[0], ones(6), zeros(5), zeros(6, 1), away(6)]},
    ),
    "group_advantages, offsets": (
        group_advantages,
        {"rewards": ones(6), "offsets": torch.tensor([0, 2, 6])},
        {
            "offsets": [
                [0, 6],
                ones(3),
                zeros(1),
                zeros(3, 1),
                torch.tensor([0, 4]),
                torch.tensor([1, 6]),
                torch.tensor([0, 4, 2, 6]),
                away(3),
            ]
        },
    ),
    "group_advantages, whitened": (
        group_advantages,
        {"rewards": ones(6), "group_size": 2, "whitening": Whitening()},
        {"lengths": [[1], ones(6), zeros(5), zeros(6) - 1, away(6)]},
    ),
    "Whitening": (Whitening, {}, {"ddof": [-1, 0.5], "eps": [-1.0, "1"], "floor": [-1.0, INF]}),
    "selective_log_softmax": (
        selective_log_softmax,
        {"logits": ones(3, 5), "ids": zeros(3)},
        {
            "logits": [1, ones(()), zeros(3, 5), ones(0, 5), ones(4, 5)],
            "ids": [[0], ones(3), zeros(2), zeros(3, 0), zeros(3).int(), zeros(3) + 5, zeros(3) - 1, away(3)],
            "temperature": [0.0, -1.0, NAN, INF, "1"],
            "return_entropy": [1, None],
            "in_place_backward": [1, "yes"],
            "backend": ["cuda", "triton"],
        },
    ),
    "selective_log_softmax, in place": (
        lambda logits: selective_log_softmax(logits, zeros(3), in_place_backward=True),
        {"logits": ones(3, 5)},
        {"logits": [ones(1, 5).expand(3, 5), ones(3, 1).expand(3, 5)]},
    ),
    "NeighborTable": (
        NeighborTable,
        {"k": 3},
        {"k": [0, -1, 1.5, True, "3"], "metric": ["euclid"], "candidates": [3, 2, 4.5, True]},
    ),
    "NeighborTable, refresh": (
        lambda embedding, k=2, allowed=None: NeighborTable(k, allowed=allowed).refresh(embedding),
        {"embedding": torch.arange(10.0).view(5, 2)},
        EMBEDDINGS
        | {"k": [5], "allowed": [ones(5), true(4), true(5) & (torch.arange(5) < 2)], "embedding": [ones(5, 2) * NAN]},
    ),
    "MixRecord": (
        MixRecord,
        RECORD,
        {
            "gate": [[True], ones(2, 3), true(3), true(2, 4)],
            "ids": [[0], ones(2, 3, 2), zeros(2, 3), zeros(2, 4, 2)],
            "weights": [[0], ones(2, 3, 3), zeros(2, 3, 2)],
            "prompt_length": [-1],
            "logprobs": [[0.0], ones(2, 4), zeros(2, 3)],
            "row_ids": [zeros(2)],
            "noise_scale": [ones(2), ones(3)],
            "noise_seed": [zeros(2)],
        },
    ),
    "MixRecord, fit": (lambda length: MixRecord(**RECORD).fit(length), {"length": 3}, {"length": [0, 2]}),
    "MixingConfig": (
        MixingConfig,
        {},
        {
            "k": [0, -1, 2.0, True, "3"],
            "mixing_rate": [-0.1, 1.1, NAN],
            "temperature": [0.0, -1.0, INF, NAN],
            "metric": ["euclid"],
            "strategy": ["nearest"],
            "variant": ["official"],
            "sampler": ["ours"],
            "stop_token_ids": [[-1], 3, None, ["a"]],
            "allowed_token_ids": [[5, -1, 2], [1, 2], [], 5],
            "entropy_threshold": [-1.0, INF, "1"],
            "noise_scale": [-1.0, 0.5],
            "moi_beta": [-1.0, 1.0],
            "seed": [2**63, -(2**63) - 1, 1.5, "0"],
            "loss_on_mixed_steps": [1, None],
        },
    ),
    "MixingConfig, vocabulary": (
        lambda size: MixingConfig(k=5, stop_token_ids=[7], allowed_token_ids=range(6)).require_vocabulary(size),
        {"size": 8},
        {"size": [3, 5, 6, 7]},
    ),
}
TOGETHER: dict[str, Callable[[], Any]] = {
    "no groups": lambda: group_advantages(ones(4)),
    "strategy anchor, k": lambda: MixingConfig(strategy="anchor", k=2),
    "strategy gumbel, released": lambda: MixingConfig(strategy="gumbel", variant="released"),
    "strategy topk, allowed": lambda: MixingConfig(strategy="topk", allowed_token_ids=[1, 2, 3]),
    "nothing in the loss": lambda: MixingConfig(mixing_rate=1.0, loss_on_mixed_steps=False),
    "records that do not agree": lambda: MixRecord.cat(
        [MixRecord(**RECORD), MixRecord(**RECORD | {"prompt_length": 2})]
    ),
    "no records": lambda: MixRecord.cat([]),
    "an empty table": lambda: NeighborTable(2).ids,
    "the state of an empty table": lambda: NeighborTable(2).state_dict(),
    "a state of nothing": lambda: NeighborTable(2).load_state_dict({}),
    "a second derivative of mix_embeddings": lambda: second(
        ones(4, 2), lambda x: mix_embeddings(x, zeros(3, 2), ones(3, 2).requires_grad_())
    ),
    "a second derivative of selective_log_softmax": lambda: second(
        ones(3, 5), lambda x: selective_log_softmax(x, zeros(3))
    ),
    "a second derivative of group_advantages": lambda: second(
        torch.arange(6.0), lambda x: group_advantages(x, group_size=3)
    ),
}


def second(x: Tensor, call: Callable[[Tensor], Tensor]) -> None:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    torch.autograd.grad(first.square().sum(), x)


def cases() -> Cases:
    for function, (call, right, bad) in BAD.items():
        yield Case("errors", f"{function}, right", partial(accepted, call=call, right=right))
        for name, values in bad.items():
            yield Case(
                "errors", f"{function}, {name}", partial(refused, call=call, right=right, name=name, values=values)
            )
        if function in ("decode_step", "mixing_candidates"):
            yield Case("errors", f"{function}, strategies", partial(refused_strategies, call=call, right=right))
    for name, together in TOGETHER.items():
        yield Case("errors", name, lambda inputs, call=together: refusal(call))
    yield Case("errors", "a state of another table", refused_states)
    yield Case("signatures", "functions", signatures)
    yield Case("signatures", "MixingConfig", lambda inputs: at_least(dict(config_fields())))


def accepted(inputs: Inputs, call: Callable[..., Any], right: dict[str, Any]) -> str:
    """What the bad calls change is a good one, or each would be refused for another reason than its own."""
    call(**right)
    return "accepted"


def refused(inputs: Inputs, call: Callable[..., Any], right: dict[str, Any], name: str, values: list[Any]) -> Any:
    return [refusal(partial(call, **right | {name: value})) for value in values]


def refused_strategies(inputs: Inputs, call: Callable[..., Any], right: dict[str, Any]) -> Any:
    return [refusal(partial(call, **right | NO_NEIGHBORS | change)) for change in STRATEGIES]


def refused_states(inputs: Inputs) -> Any:
    table = NeighborTable(2)
    table.refresh(inputs.normal(30, 4))
    state = table.state_dict()
    others = [NeighborTable(3), NeighborTable(2, metric="dot"), NeighborTable(2, allowed=true(30))]
    changed = [{**state, name: state[name][:7]} for name in ("scores", "ids", "candidates")]
    found = [refusal(partial(other.load_state_dict, state)) for other in others]
    return found + [refusal(partial(NeighborTable(2).load_state_dict, change)) for change in changed]


def signatures(inputs: Inputs) -> Any:
    """The parameters of every public function and method, with their defaults."""
    found: dict[str, Any] = {}
    for name in ngrpo_ops.__all__:
        thing = getattr(ngrpo_ops, name)
        if not callable(thing):
            continue
        methods = {
            f"{name}.{method}": function for method, function in vars(thing).items() if inspect.isfunction(function)
        }
        public = {label: f for label, f in methods.items() if not label.split(".")[1].startswith("_")}
        for label, function in {name: thing, **public}.items():
            parameters = inspect.signature(function).parameters.values()
            found[label] = at_least(
                {
                    RENAMED.get(p.name, p.name): [p.kind.name, "" if p.default is p.empty else repr(p.default)]
                    for p in parameters
                }
            )
    return at_least(found)


def config_fields() -> dict[str, Any]:
    configs = {
        "default": MixingConfig(), "anchor": MixingConfig(strategy="anchor"),
        "counter based": MixingConfig(sampler=counter_based_sampler(), stop_token_ids=[3], allowed_token_ids=range(4)),
        "moi": MixingConfig(k=9, strategy="moi", moi_beta=0.5, mixing_rate=1.0, temperature=0.7, seed=-(2**63)),
    }  # fmt: skip
    return {name: at_least(dataclasses.asdict(config)) for name, config in configs.items()}
