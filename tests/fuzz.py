"""Public calls with ordinary and hostile arguments, against formulas in float64 that are written here and nowhere else.

    python tests/fuzz.py [--seconds 120] [--seed 0]

A call must give the right value, or raise TypeError or ValueError with the name of an argument. Everything else is a
finding: a wrong value, another error, a NaN that the contract does not have. The call is printed with its number, and
`--seed SEED --only NUMBER` runs it alone.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ngrpo_ops

VALUES = [0.0, -0.0, 1.0, -1.0, 1e-38, 1e-20, 1e20, -1e20, 3e38, math.inf, -math.inf, math.nan]
DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]
UNIT = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Wrong(AssertionError):
    """A value that is not the formula's."""


def near(found: Tensor, right: Tensor, dtype: torch.dtype, what: str, scale: Tensor | float = 1.0) -> None:
    """Checks |found - right| <= unit (scale + |right|); infinities and NaN must be met."""
    found, right = found.double(), right.double()
    if found.shape != right.shape:
        raise Wrong(f"{what}: shape {tuple(found.shape)}, right {tuple(right.shape)}")
    if dtype != torch.float64:
        limit = torch.finfo(dtype if dtype in (torch.float16, torch.bfloat16) else torch.float32).max
        right = torch.where(right.abs() > limit, right.sign() * math.inf, right)
    same = (found == right) | (found.isnan() & right.isnan())
    close = (found - right).abs() <= UNIT[dtype] * (torch.as_tensor(scale, dtype=torch.float64) + right.abs())
    if not bool((same | close).all()):
        place = tuple((~(same | close)).nonzero()[0].tolist())
        raise Wrong(f"{what} at {place}: {found[place].item()!r}, right {right[place].item()!r}")


class Draw:
    """Random arguments: mostly ordinary, sometimes hostile."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def one(self, values: Any) -> Any:
        return self.random.choice(list(values))

    def size(self, most: int) -> int:
        return self.random.randint(1, most)

    def numbers(self, *shape: int, hostile: float = 0.2, scale: float | None = None) -> Tensor:
        x = torch.randn(shape, generator=self.torch, dtype=torch.float64)
        x = x * (self.one([0.0, 0.1, 1.0, 1.0, 5.0, 30.0]) if scale is None else scale)
        if self.chance(0.3):
            x = x.round()  # ties
        if self.chance(hostile) and x.numel():
            for _ in range(self.size(3)):
                x.view(-1)[self.random.randrange(x.numel())] = self.one(VALUES)
        dtype = self.one(DTYPES)
        x = x.to(dtype)
        layout = self.one(["plain", "plain", "strided", "transposed"])
        if layout == "strided" and x.dim():
            wide = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)
            wide[..., ::2] = x
            return wide[..., ::2]
        return x.mT.contiguous().mT if layout == "transposed" and x.dim() > 1 else x

    def ids(self, *shape: int, high: int) -> Tensor:
        return torch.randint(high, shape, generator=self.torch)

    def spoil(self, arguments: dict[str, Any]) -> str | None:
        """Makes one argument hostile. Returns its name."""
        if not self.chance(0.15):
            return None
        name = self.one(sorted(set(arguments) - {"moved_by"}))
        value = arguments[name]
        others: list[Any] = ["text", [1], object(), -1, math.nan, True, None, 2**70]
        if isinstance(value, Tensor):
            others += [value[..., None], value[:0] if value.dim() else value, value.to(torch.complex64)]
            others += [value.to(torch.int32), value.to("meta")]
        arguments[name] = self.one(others)
        return name


# Formulas ---------------------------------------------------------------------------------------------------------


def softmax(z: Tensor) -> Tensor:
    return (z - z.amax(-1, keepdim=True)).exp() / (z - z.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True)


def candidate_weights(d: Draw) -> tuple[dict, Callable]:
    b, v, k = d.size(4), d.size(12), d.size(4)
    arguments = {"logits": d.numbers(b, v), "ids": d.ids(b, k, high=v), "temperature": d.one([1.0, 0.3, 7.0, 1e-3])}

    def check(found: Tensor, logits: Tensor, ids: Tensor, temperature: float) -> None:
        z = logits.double().gather(1, ids) / temperature
        fine = (z.abs() < 1e30).all(1)  # others overflow float32, as the contract allows
        near(found[fine], softmax(z)[fine], torch.float32 if logits.dtype != torch.float64 else logits.dtype, "weights")

    return arguments, check


def mix_embeddings(d: Draw) -> tuple[dict, Callable]:
    n, v, k, width = d.size(5), d.size(12), d.size(4), d.size(9)
    arguments = {
        "embedding": d.numbers(v, width).requires_grad_(),
        "ids": d.ids(n, k, high=v),
        "weights": d.numbers(n, k, scale=1.0, hostile=0.0).requires_grad_(),
    }

    def check(found: Tensor, embedding: Tensor, ids: Tensor, weights: Tensor) -> None:
        table, w = embedding.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
        right = (w[:, :, None] * table[ids]).sum(1)
        sizes = (w.abs()[:, :, None] * table.abs()[ids]).sum(1).detach()
        dtype = max(embedding.dtype, weights.dtype, key=lambda one: UNIT[one])
        finite = sizes < 1e30
        if embedding.dtype == torch.float16:
            finite &= sizes < 6e4
        near(found.detach()[finite], right.detach()[finite], dtype, "mix", sizes[finite] + 1e-30)
        if not bool(finite.all()) or float(sizes.max()) > 1e15 or found.dtype == torch.float16:
            return
        upstream = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view(found.shape)
        found.backward(upstream.to(found.dtype))
        right.backward(upstream)
        assert table.grad is not None and w.grad is not None
        near(embedding.grad, table.grad, dtype, "gradient of the table", 4.0 * float(w.abs().max().detach()) + 1e-30)  # type: ignore[arg-type]
        largest = 9 * (float(sizes.nan_to_num(0).max()) + float(table.detach().abs().nan_to_num(0, 0).max()))
        near(weights.grad, w.grad, dtype, "gradient of the weights", largest)  # type: ignore[arg-type]

    return arguments, check


def selective_log_softmax(d: Draw) -> tuple[dict, Callable]:
    n, v, k = d.size(5), d.size(40), d.size(3)
    arguments = {
        "logits": d.numbers(n, v).requires_grad_(), "ids": d.ids(n, k, high=v), "temperature": d.one([1.0, 0.5, 3.0]),
        "return_entropy": True,
    }  # fmt: skip

    def check(found: Any, logits: Tensor, ids: Tensor, temperature: float, return_entropy: bool) -> None:
        z = logits.detach().double() / temperature
        fine = (z.amax(1) < 1e6) & ~z.isnan().any(1) & (z.amax(1) > -1e6)
        p = z.log_softmax(-1)
        terms = torch.where(p == -math.inf, 0.0, -p.exp() * p)
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        near(
            found[0].detach()[fine],
            p.gather(1, ids)[fine],
            dtype,
            "log-probabilities",
            z.clamp(-1e9, 1e9).abs().amax(1)[fine, None] + 1,
        )
        near(found[1].detach()[fine], terms.sum(1)[fine], dtype, "entropy", z.clamp(-1e4, 1e4).abs().amax(1)[fine] + 1)

    return arguments, check


def group_advantages(d: Draw) -> tuple[dict, Callable]:
    groups, size = d.size(4), d.size(5)
    n = groups * size
    arguments: dict[str, Any] = {
        "rewards": d.numbers(n), "group_size": size, "scale": d.one(["std", "batch_std", "mean", "none"]),
        "baseline": d.one(["mean", "leave_one_out", "none"]), "ddof": d.one([0, 1]), "eps": d.one([0.0, 1e-4, 1.0]),
        "nan_policy": d.one(["propagate", "omit"]),
    }  # fmt: skip
    if d.chance(0.4):
        arguments["mask"] = torch.rand(n, generator=d.torch) < 0.7

    def check(
        found: Tensor, rewards: Tensor, group_size: int, scale: str, baseline: str, ddof: int, eps: float,
        nan_policy: str, mask: Tensor | None = None,
    ) -> None:  # fmt: skip
        x = rewards.double()
        keep = torch.ones(n, dtype=torch.bool) if mask is None else mask.clone()
        if bool((found[~keep] != 0).any()):
            raise Wrong("a masked row is not 0")
        if nan_policy == "omit":
            keep &= ~x.isnan()
            if bool((found[~keep] != 0).any()):
                raise Wrong("a row without a reward is not 0")
        if bool(x[keep].isinf().any()) or float(x[keep].abs().nan_to_num(0).max() if keep.any() else 0) > 1e30:
            return  # beyond float32, in differences at the least

        def deviation(values: Tensor) -> Tensor:
            return ((values - values.mean()).square().sum() / max(len(values) - ddof, 1)).sqrt()

        right, sizes = torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
        whole = deviation(x[keep]) if keep.any() else torch.tensor(0.0)
        for start in range(0, n, group_size):
            rows = torch.arange(start, start + group_size)[keep[start : start + group_size]]
            values = x[rows]
            if not len(rows):
                continue
            alone = len(rows) == 1
            if alone and (baseline != "none" or scale == "std"):
                if scale == "batch_std" and bool(whole.isnan()):
                    right[rows] = math.nan  # 0 over a scale that is NaN
                continue
            for i, row in enumerate(rows.tolist()):
                others = torch.cat([values[:i], values[i + 1 :]])
                level = {"mean": values.mean(), "none": torch.tensor(0.0), "leave_one_out": others.mean()}[baseline]
                below = {"std": deviation(values), "batch_std": whole, "mean": values.mean(), "none": torch.tensor(1.0)}
                divisor = below[scale] + (0.0 if scale == "none" else eps)
                top = values[i] - level
                if baseline != "none" and bool((values == values[0]).all()):
                    top = torch.tensor(0.0)
                right[row] = 0.0 if divisor == 0 else top / divisor
                # What rounding of the rewards' own size makes of a difference, over the divisor. A mean is rounded too.
                sizes[row] = 1 + float(values.abs().max() / divisor.abs()) if divisor != 0 else math.inf
                if scale == "mean":
                    sizes[row] *= 1 + right[row].abs()
        dtype = rewards.dtype
        fine = (sizes < 1e6) | right.isnan()
        near(found[fine], right[fine], dtype, "advantages", sizes[fine].nan_to_num(1.0))

    return arguments, check


def nearest_neighbors(d: Draw) -> tuple[dict, Callable]:
    v, width = d.size(40) + 1, d.size(8)
    arguments: dict[str, Any] = {
        "embedding": d.numbers(v, width, hostile=0.1), "k": d.size(v - 1),
        "metric": d.one(["cosine", "dot", "l2", "l1"]),
    }  # fmt: skip
    if d.chance(0.4):
        arguments["queries"] = d.ids(d.size(6), high=v)
    if d.chance(0.4):
        arguments["allowed"] = torch.rand(v, generator=d.torch) < 0.8

    def check(
        found: Any, embedding: Tensor, k: int, metric: str, queries: Tensor | None = None, allowed: Tensor | None = None
    ) -> None:
        x = embedding.double()
        rows = torch.arange(v) if queries is None else queries
        if metric == "cosine":
            norms = x.norm(dim=1, keepdim=True)
            x = torch.where(norms < 1e-30, 0.0, x / norms)
        if metric in ("cosine", "dot"):
            scores = x[rows] @ x.T
        else:
            differences = x[rows][:, None] - x[None]
            scores = -(differences.square().sum(-1) if metric == "l2" else differences.abs().sum(-1))
        scores[torch.arange(len(rows)), rows] = -math.inf
        if allowed is not None:
            scores[:, ~allowed] = -math.inf
        size = float(x.abs().max()) ** (1 if metric == "l1" else 2) * 4 * width + 1e-30
        near(found.scores, scores.gather(1, found.ids), torch.float32, "scores", size)
        near(found.scores, scores.topk(k).values, torch.float32, "scores of the best", size)
        if any(len(set(row)) != k for row in found.ids.tolist()):
            raise Wrong("an id stands twice")

    return arguments, check


def neighbor_table(d: Draw) -> tuple[dict, Callable]:
    arguments, _ = nearest_neighbors(d)
    arguments.pop("queries", None)
    arguments["moved_by"] = d.one([0.0, 1e-4, 1e-2, 1.0])

    def check(found: Any, **_: Any) -> None:
        (ids, scores), fresh = found
        if not (torch.equal(ids, fresh.ids) and torch.equal(scores, fresh.scores)):
            raise Wrong("a refreshed table is not a fresh search")

    return arguments, check


def run_table(embedding: Tensor, k: int, metric: str, moved_by: float, allowed: Tensor | None = None) -> Any:
    table = ngrpo_ops.NeighborTable(k, metric=metric, allowed=allowed)  # type: ignore[arg-type]
    table.refresh(embedding)
    moved = embedding + (moved_by * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(1))).to(
        embedding
    )
    table.refresh(moved)
    return (table.ids, table.scores), ngrpo_ops.nearest_neighbors(moved, k, metric=metric, allowed=allowed)  # type: ignore[arg-type]


STRATEGIES = ["neighbor", "topk", "gumbel", "gaussian", "moi", "multiplex", "anchor"]


def decode_step(d: Draw) -> tuple[dict, Callable]:
    b, v, width = d.size(4), d.size(20) + 2, d.size(6)
    strategy = d.one(STRATEGIES)
    k = 1 if strategy == "anchor" else d.size(min(v, 5))
    arguments: dict[str, Any] = {
        "logits": d.numbers(b, v), "embedding": d.numbers(v, width, hostile=0.0), "strategy": strategy,
        "mixing_rate": d.one([0.0, 0.5, 1.0]), "temperature": d.one([0.0, 1.0, 0.5, 2.0]), "seed": d.size(99),
        "step": d.size(99),
    }  # fmt: skip
    if strategy == "neighbor":
        arguments["neighbor_ids"] = d.ids(v, k - 1, high=v)
    else:
        arguments["k"] = k
    if d.chance(0.3):
        arguments["top_k"] = d.size(v)
    if d.chance(0.3):
        arguments["top_p"] = d.one([0.1, 0.5, 0.9, 1.0])
    if d.chance(0.3):
        arguments["entropy_threshold"] = d.one([0.0, 0.5, 10.0])

    def check(found: Any, logits: Tensor, embedding: Tensor, strategy: str, temperature: float, **rest: Any) -> None:
        x, table = logits.double(), embedding.double()
        top = x.amax(1)
        if logits.dtype != torch.float64:  # what float32 makes of it
            top = torch.where(top / (temperature or 1.0) > 3.4e38, math.inf, top)
        bad = x.isnan().any(1) | (top == math.inf) | (top == -math.inf)
        if not torch.equal(found.fault != 0, bad):
            raise Wrong(f"faults {found.fault.tolist()}, bad rows {bad.tolist()}")
        if bool((found.gate & bad).any()):
            raise Wrong("a faulty row is mixed")
        fine = ~bad & (x.clamp(-1e9, 1e9).abs().amax(1) < 1e4)
        z = x / (temperature or 1.0)
        p = z.log_softmax(-1)
        size = z.clamp(-1e5, 1e5).abs().amax(1) + 1
        emitted = p.gather(1, found.token_ids[:, None])[:, 0]
        near(
            found.logprobs[fine],
            emitted[fine],
            torch.float32,
            "logprobs",
            size[fine],
        )
        terms = torch.where(p == -math.inf, 0.0, -p.exp() * p)
        near(found.entropy[fine], terms.sum(1)[fine], torch.float32, "entropy", size[fine])
        if bool((emitted[fine] == -math.inf).any()):
            raise Wrong("a token of probability 0 was emitted")
        if float((found.weights[fine].double().sum(1) - 1).abs().max() if fine.any() else 0) > 1e-4:
            raise Wrong("weights do not sum to 1")
        gate = found.gate & fine
        if bool((found.token_ids[gate] != found.ids[gate, 0]).any()):
            raise Wrong("a mixed step does not emit its first candidate")
        if rest["mixing_rate"] == 0 and bool(found.gate.any()):
            raise Wrong("mixed at a rate of 0")
        if rest["mixing_rate"] == 1 and rest.get("entropy_threshold") is None and not torch.equal(found.gate, ~bad):
            raise Wrong("not mixed at a rate of 1")
        if (
            temperature == 0
            and bool((x.gather(1, found.token_ids[:, None])[fine, 0] != top[fine]).any())
            and strategy != "gumbel"
        ):
            raise Wrong("a greedy row does not emit its argmax")
        if strategy in ("neighbor", "topk", "anchor", "gaussian"):
            ids = found.ids
            if strategy == "neighbor":
                anchor = x.argmax(1, keepdim=True)
                ids = torch.cat([anchor, rest["neighbor_ids"][anchor[:, 0]]], dim=1)
                if not torch.equal(found.ids[fine], ids[fine]):
                    raise Wrong("other candidates than the anchor and its neighbors")
            near(found.weights[fine], softmax(z.gather(1, ids))[fine], torch.float32, "weights", size[fine, None])
        if strategy != "gaussian":
            w = torch.where(found.gate[:, None, None], found.weights.double()[:, :, None], 0.0)
            mixed = (w.nan_to_num() * table[found.ids]).sum(1)
            right = torch.where(found.gate[:, None], mixed, table[found.token_ids])
            near(
                found.embeddings[fine],
                right[fine],
                embedding.dtype,
                "embeddings",
                float(table.detach().abs().max()) * 9 + 1e-6,
            )

    return arguments, check


def gaussian_noise(d: Draw) -> tuple[dict, Callable]:
    m, width = d.size(4), 64
    arguments = {
        "mixed": d.numbers(m, width, hostile=0.0), "noise_scale": d.one([0.0, 0.3, 2.0]), "seed": d.size(99),
        "row_ids": d.ids(m, high=99), "steps": d.ids(m, high=99),
    }  # fmt: skip

    def check(found: Tensor, mixed: Tensor, noise_scale: float, **_: Any) -> None:
        noise = found.double() - mixed.double()
        size = mixed.double().square().mean(1).sqrt()
        if mixed.dtype in (torch.float16, torch.bfloat16):
            return
        ratio = noise.square().mean(1).sqrt() / size
        wrong = (size > 1e-3) & ((ratio - noise_scale).abs() > 0.5 * noise_scale + 1e-3)  # 64 normal numbers
        if bool(wrong.any()):
            raise Wrong(f"noise of {ratio.tolist()} times the mix, asked for {noise_scale}")

    return arguments, check


def mix_record(d: Draw) -> tuple[dict, Callable]:
    b, t, k = d.size(4), d.size(6), d.size(3)
    arguments = {
        "gate": torch.rand(b, t, generator=d.torch) < 0.5, "ids": d.ids(b, t, k, high=9),
        "weights": torch.rand(b, t, k, generator=d.torch), "prompt_length": d.size(5), "logprobs": torch.zeros(b, t),
    }  # fmt: skip

    def check(found: Any, gate: Tensor, ids: Tensor, **_: Any) -> None:
        again = ngrpo_ops.MixRecord.from_bytes(found.to_bytes()).fit(t + 3)
        if not (torch.equal(again.gate[:, :t], gate) and torch.equal(again.ids[:, :t], ids)):
            raise Wrong("a record comes back otherwise")
        if bool(again.gate[:, t:].any()) or len(ngrpo_ops.MixRecord.cat([found, again])) != 2 * len(found):
            raise Wrong("a padded record is mixed, or joined wrongly")

    return arguments, check


CALLS: dict[str, tuple[Callable[..., Any], Callable[[Draw], tuple[dict, Callable]]]] = {
    "candidate_weights": (lambda **a: ngrpo_ops.candidate_weights(**a), candidate_weights),
    "mix_embeddings": (lambda **a: ngrpo_ops.mix_embeddings(**a), mix_embeddings),
    "selective_log_softmax": (lambda **a: ngrpo_ops.selective_log_softmax(**a), selective_log_softmax),
    "group_advantages": (lambda **a: ngrpo_ops.group_advantages(**a), group_advantages),
    "nearest_neighbors": (lambda **a: ngrpo_ops.nearest_neighbors(**a), nearest_neighbors),
    "NeighborTable": (run_table, neighbor_table),
    "decode_step": (lambda **a: ngrpo_ops.decode_step(**a), decode_step),
    "gaussian_noise": (lambda **a: ngrpo_ops.gaussian_noise(**a), gaussian_noise),
    "MixRecord": (lambda **a: ngrpo_ops.MixRecord(**a), mix_record),
}


def shown(arguments: dict[str, Any]) -> str:
    def one(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"{value.dtype} {tuple(value.shape)}" + (
                f" {value.tolist()}" if value.numel() < 60 and not value.is_meta else ""
            )
        return repr(value)

    return ", ".join(f"{name}={one(value)}" for name, value in arguments.items())


def may_refuse(name: str, arguments: dict[str, Any]) -> bool:
    """Whether a call may be refused though no argument was spoiled: numbers without a score, or too few rows."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor) and value.is_floating_point()]
    extreme = any(bool((~(value.detach().abs() < 1e15)).any()) for value in tensors)
    return extreme or (name in ("nearest_neighbors", "NeighborTable") and arguments.get("allowed") is not None)


def run(name: str, number: int, seed: int) -> str:
    """One call. Returns how it ended.

    Raises:
        Wrong: it is a finding.
    """
    call, make = CALLS[name]
    draw = Draw(seed * 1_000_003 + number)
    arguments, check = make(draw)
    ordinary = dict(arguments)
    spoiled = draw.spoil(arguments)
    try:
        found = call(**arguments)
    except (TypeError, ValueError) as error:
        text = str(error)
        names = {argument for argument in ordinary if argument in text}
        if not names and "unexpected keyword" not in text:
            raise Wrong(f"an error that names no argument: {type(error).__name__}: {text}") from error
        if spoiled is None and not may_refuse(name, ordinary):
            raise Wrong(f"ordinary arguments are refused: {text}") from error
        return "refused"
    except NotImplementedError as error:
        raise Wrong(f"NotImplementedError: {error}") from error
    if spoiled is not None:
        return "answered"  # None, True or -1 may be an answer to what was asked
    check(found, **ordinary)
    return "right"


def fuzz(
    seconds: float, seed: int, only: int | None = None, progress: bool = False, calls: int | None = None
) -> Counter:
    """Calls until the time is over, or `calls` of them.

    Raises:
        SystemExit: a finding, with what to run to see it again.
    """
    ends: Counter = Counter()
    start = time.monotonic()
    numbers = (itertools.count() if calls is None else range(calls)) if only is None else [only]
    for number in numbers:
        if time.monotonic() - start > seconds:
            break
        name = list(CALLS)[number % len(CALLS)]
        try:
            ends[run(name, number, seed)] += 1
        except Exception as error:
            draw = Draw(seed * 1_000_003 + number)
            arguments, _ = CALLS[name][1](draw)
            spoiled = draw.spoil(arguments)
            if not isinstance(error, Wrong):
                traceback.print_exc()
            raise SystemExit(
                f"{name}: {type(error).__name__}: {error}\n  {'hostile ' + spoiled if spoiled else 'ordinary'}: "
                f"{shown(arguments)}\n  again: python tests/fuzz.py --seed {seed} --only {number}"
            ) from error
        if progress and number % 500 == 0:
            print(f"\r{number:,} calls, {time.monotonic() - start:.0f} of {seconds:.0f} s", end="", file=sys.stderr)
    return ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ends = fuzz(arguments.seconds, arguments.seed, arguments.only, progress=True)
    print(f"\n{sum(ends.values()):,} calls: {dict(ends)}")


if __name__ == "__main__":
    main()
