"""group_advantages against the trainers' formulas, written out group by group in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import assert_within, compute_roundoff, dtypes, generators, lay_out, rounding
from torch import Tensor

from ngrpo_ops import group_advantages

BASELINES = ("mean", "leave_one_out")
SCALES = ("std", "batch_std", "mean", "none")


def by_hand(
    rewards: list[float], labels: list[int], baseline: str, scale: str, ddof: int, eps: float, keep: list[bool]
) -> list[float]:
    """One row at a time, from the definitions; equal rewards and single rows give 0."""
    batch = [r for r, k in zip(rewards, keep, strict=True) if k]
    out = []
    for reward, label, kept in zip(rewards, labels, keep, strict=True):
        group = [r for r, other, k in zip(rewards, labels, keep, strict=True) if k and other == label]
        if not kept or len(group) < 2 or len(set(group)) == 1:
            out.append(0.0)
            continue
        mean = math.fsum(group) / len(group)
        others = mean if baseline == "mean" else (math.fsum(group) - reward) / (len(group) - 1)
        advantage = reward - others
        if scale in ("std", "batch_std"):
            values = group if scale == "std" else batch
            centre = math.fsum(values) / len(values)
            advantage /= math.sqrt(math.fsum((r - centre) ** 2 for r in values) / (len(values) - ddof)) + eps
        elif scale == "mean":
            advantage /= mean + eps
        out.append(advantage)
    return out


@given(
    n=st.integers(1, 24),
    groups=st.integers(1, 6),
    baseline=st.sampled_from(BASELINES),
    scale=st.sampled_from(SCALES),
    ddof=st.integers(0, 1),
    eps=st.sampled_from([0.0, 1e-9, 1e-6, 1e-4, 1.0]),
    dtype=dtypes,
    kind=st.sampled_from(["binary", "normal", "large"]),
    use_mask=st.booleans(),
    sliced=st.booleans(),
    generator=generators,
)
def test_definition(n, groups, baseline, scale, ddof, eps, dtype, kind, use_mask, sliced, generator):
    labels = torch.randint(groups, (n,), generator=generator) * 1000 - 7
    rewards = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    rewards = {"binary": rewards.round(), "normal": rewards, "large": rewards * 1e4}[kind].to(dtype)
    mask = torch.rand(n, generator=generator) < 0.7 if use_mask else None
    keep = torch.ones(n, dtype=torch.bool) if mask is None else mask
    got = group_advantages(
        lay_out(rewards, "sliced" if sliced else "contiguous"),
        group_ids=labels, baseline=baseline, scale=scale, ddof=ddof, eps=eps, mask=mask,
    )  # fmt: skip
    assert got.dtype == dtype
    exact = by_hand(rewards.tolist(), labels.tolist(), baseline, scale, ddof, eps, keep.tolist())
    want = torch.tensor(exact, dtype=torch.float64)
    # Centring errs by (n + 3) u times the largest reward; the scale by that and (n + 3) u of itself.
    u, size = compute_roundoff(dtype), float(rewards.double().abs().max())
    plain = by_hand(rewards.tolist(), labels.tolist(), baseline, "none", 0, 0.0, keep.tolist())
    divisor = torch.where(want != 0, torch.tensor(plain, dtype=torch.float64) / want, 1.0).abs()
    budget = (n + 3) * u * (4 * size * (1 + want.abs()) / divisor + 4 * want.abs())
    assert_within(got, want, budget + rounding(want, dtype))


GROUPS = torch.tensor([[0.0, 1.0, 1.0, 0.5], [3.0, -1.0, 0.0, 0.25], [0.7, 0.7, 0.7, 0.7]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("trainer", "options", "formula"),
    [
        ("TRL", {}, lambda r: (r - r.nanmean(1, True)) / (r.std(1, keepdim=True) + 1e-4)),
        ("TRL batch", {"scale": "batch_std"}, lambda r: (r - r.mean(1, True)) / (r.std() + 1e-4)),
        ("Dr. GRPO", {"scale": "none"}, lambda r: r - r.mean(1, True)),
        ("verl", {"eps": 1e-6}, lambda r: (r - r.mean(1, True)) / (r.std(1, keepdim=True) + 1e-6)),
        ("OpenRLHF", {"eps": 1e-9}, lambda r: (r - r.mean(1, True)) / (r.std(1, keepdim=True) + 1e-9)),
        ("RLOO", {"baseline": "leave_one_out", "scale": "none"}, lambda r: (4 * r - r.sum(1, keepdim=True)) / 3),
        ("RLOO of OpenRLHF", {"baseline": "leave_one_out", "scale": "none"},
         lambda r: r - (r.sum(1, keepdim=True) - r) / 3),
        ("MaxRL", {"scale": "mean", "eps": 0.0}, lambda r: (r - r.mean(1, True)) / r.mean(1, True)),
    ],
)  # fmt: skip
def test_trainers(trainer, options, formula):
    got = group_advantages(GROUPS.reshape(-1), group_size=4, **options).view_as(GROUPS)
    want = formula(GROUPS)
    want[2] = 0.0  # their residue of equal rewards, where it is one
    assert_within(got, want, 40 * 2**-53 * (1 + want.abs()))


@given(
    reward=st.floats(1e-6, 1e30) | st.floats(-1e30, -1e-6) | st.sampled_from([0.0, 0.1, 1e8 + 1, 0.7, -1 / 3]),
    n=st.integers(1, 9),
    eps=st.sampled_from([0.0, 1e-9, 1e-4]),
    dtype=dtypes,
    scale=st.sampled_from(SCALES),
    baseline=st.sampled_from(BASELINES),
)
def test_equal_rewards_give_exactly_nothing(reward, n, eps, dtype, scale, baseline):
    limit = torch.finfo(dtype).max
    rewards = torch.full((n,), reward, dtype=torch.float64).clamp(-limit, limit).to(dtype).requires_grad_()
    out = group_advantages(rewards, group_size=n, eps=eps, scale=scale, baseline=baseline)
    assert not out.any() and not out.isnan().any()
    out.sum().backward()
    assert rewards.grad is not None and bool(rewards.grad.isfinite().all())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("reward", [0.1, 1e8 + 1])
def test_equal_groups_beside_others(scale, reward):
    rewards = torch.tensor([reward] * 7 + [0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0])
    out = group_advantages(rewards, group_size=7, eps=0.0, scale=scale)
    assert not out[:7].any() and bool((out[7:] != 0).any())


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_a_group_of_one_is_nothing(baseline, scale):
    rewards = torch.tensor([5.0, 1.0, 2.0, 9.0], requires_grad=True)
    labels, mask = torch.tensor([3, 8, 8, 3]), torch.tensor([True, True, True, False])
    out = group_advantages(rewards, group_ids=labels, baseline=baseline, scale=scale, mask=mask)
    assert out[0] == out[3] == 0 and bool((out[1:3] != 0).all())
    (gradient,) = torch.autograd.grad(out[[0, 3]].sum(), rewards)
    assert not gradient.any()


@given(generator=generators, n=st.integers(2, 12), baseline=st.sampled_from(BASELINES), scale=st.sampled_from(SCALES))
def test_masked_rows_do_not_exist(generator, n, baseline, scale):
    labels = torch.randint(3, (n,), generator=generator)
    mask = torch.rand(n, generator=generator) < 0.7
    mask[0] = True
    rewards = torch.randn(n, generator=generator, dtype=torch.float64)
    rewards[~mask] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30]).double().repeat(3)[: int((~mask).sum())]
    rewards.requires_grad_()
    out = group_advantages(rewards, group_ids=labels, mask=mask, baseline=baseline, scale=scale)
    grad = torch.randn(n, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(out, rewards, grad)
    kept = rewards.detach()[mask].requires_grad_()
    alone = group_advantages(kept, group_ids=labels[mask], baseline=baseline, scale=scale)
    (want,) = torch.autograd.grad(alone, kept, grad[mask])
    assert not out[~mask].any() and not gradient[~mask].any()
    assert_within(out[mask].detach(), alone.detach(), 1e-13 * (1 + alone.detach().abs()))
    assert_within(gradient[mask], want, 1e-12 * (1 + want.abs().max()))


def test_labels_are_only_labels():
    """Interleaved, negative, huge: the same groups give the same numbers, in whatever order the rows come."""
    rewards = torch.randn(12, dtype=torch.float64)
    block = group_advantages(rewards, group_size=4)
    order = torch.randperm(12)
    labels = torch.tensor([2**62, -5, 0]).repeat_interleave(4)
    mixed = group_advantages(rewards[order], group_ids=labels[order])
    assert_within(mixed, block[order], 1e-14 * 12)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", ["std", "batch_std", "none"])
@pytest.mark.parametrize("shift", [-3.0, 2.0**10, 2.0**20, 2.0**23])
def test_shift_invariance(baseline, scale, shift):
    """The same spread at another level is the same advantage; every reward here is exact in float32."""
    rewards = torch.arange(64).float().mul(7).remainder(5)
    plain = group_advantages(rewards, group_size=8, baseline=baseline, scale=scale)
    assert_within(group_advantages(rewards + shift, group_size=8, baseline=baseline, scale=scale), plain, 1e-5)


def test_nan_stays_in_its_group():
    rewards = torch.tensor([1.0, torch.nan, 2.0, 3.0])
    out = group_advantages(rewards, group_size=2)
    assert out[:2].isnan().all() and out[2:].isfinite().all()


@pytest.mark.parametrize(("baseline", "scale", "ddof"), list(itertools.product(BASELINES, SCALES, (0, 1))))
def test_gradcheck(baseline, scale, ddof):
    rewards = torch.rand(9, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 1, 2, 0, 1, 0, 9])
    for mask in (None, torch.arange(9) != 2):
        assert torch.autograd.gradcheck(
            lambda r, m=mask: group_advantages(
                r + 0.5, group_ids=labels, baseline=baseline, scale=scale, ddof=ddof, eps=0.01, mask=m
            ),
            (rewards,),
        )


def test_gradients_expanded_and_once_only():
    rewards = torch.randn(6, dtype=torch.float64, requires_grad=True)
    (one,) = torch.autograd.grad(group_advantages(rewards, group_size=3).sum(), rewards)  # a stride-0 gradient
    grad = torch.ones(12, dtype=torch.float64)[::2]
    (other,) = torch.autograd.grad(group_advantages(rewards, group_size=3), rewards, grad)
    assert torch.equal(one, other)
    half = torch.randn(6).bfloat16().requires_grad_()
    (first,) = torch.autograd.grad(group_advantages(half, group_size=3).square().sum(), half, create_graph=True)
    assert first.dtype == torch.bfloat16
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.autograd.grad(first.sum(), half)


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"rewards": [1.0]}, TypeError, "rewards"),
        ({"rewards": torch.ones(2, 2)}, ValueError, "rewards"),
        ({"rewards": torch.ones(4).long()}, ValueError, "rewards"),
        ({"rewards": torch.ones(0)}, ValueError, "rewards"),
        ({"group_size": None}, ValueError, "group_size and group_ids"),
        ({"group_ids": torch.zeros(4).long()}, ValueError, "group_size and group_ids"),
        ({"group_size": 3}, ValueError, "group_size"),
        ({"group_size": 0}, ValueError, "group_size"),
        ({"group_size": -2}, ValueError, "group_size"),
        ({"group_size": None, "group_ids": [0] * 4}, TypeError, "group_ids"),
        ({"group_size": None, "group_ids": torch.zeros(4)}, TypeError, "group_ids"),
        ({"group_size": None, "group_ids": torch.zeros(3).long()}, ValueError, "group_ids"),
        ({"group_size": None, "group_ids": torch.zeros(4, device="meta").long()}, ValueError, "group_ids"),
        ({"baseline": "median"}, ValueError, "baseline"),
        ({"scale": "max"}, ValueError, "scale"),
        ({"ddof": -1}, ValueError, "ddof"),
        ({"eps": -1e-9}, ValueError, "eps"),
        ({"eps": math.nan}, ValueError, "eps"),
        ({"mask": torch.ones(4)}, TypeError, "mask"),
        ({"mask": [True] * 4}, TypeError, "mask"),
        ({"mask": torch.ones(3).bool()}, ValueError, "mask"),
        ({"mask": torch.ones(4, device="meta").bool()}, ValueError, "mask"),
    ],
)
def test_bad_input_is_named(change, error, name):
    with pytest.raises(error, match=name):
        group_advantages(**{"rewards": torch.ones(4), "group_size": 2, **change})


def test_shapes_on_meta():
    rewards = torch.empty(8, device="meta", dtype=torch.float16, requires_grad=True)
    out = group_advantages(rewards, group_size=4)
    assert out.shape == (8,) and out.dtype == torch.float16
    out.sum().backward()
    assert rewards.grad is not None and rewards.grad.shape == (8,)


@pytest.mark.slow
@pytest.mark.parametrize("scale", SCALES)
def test_opcheck(scale):
    rewards, labels, mask = torch.rand(6), torch.tensor([0, 0, 4, 4, 4, 0]), torch.arange(6) != 1
    options = (labels, "leave_one_out", scale, 1, 1e-4, mask)
    torch.library.opcheck(torch.ops.ngrpo.group_advantages.default, (rewards.clone().requires_grad_(), *options))
    torch.library.opcheck(torch.ops.ngrpo.group_advantages_backward.default, (torch.rand(6), rewards, *options))


@pytest.mark.slow
def test_compiles():
    torch._dynamo.reset()

    def call(rewards: Tensor) -> Tensor:
        return group_advantages(rewards, group_size=4)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (8, 20):
        rewards, grad = torch.randn(n, requires_grad=True), torch.randn(n)
        got, want = compiled(rewards), call(rewards)
        assert torch.equal(got, want)
        gradients = [torch.autograd.grad(out, rewards, grad)[0] for out in (got, want)]
        assert torch.equal(*gradients)
