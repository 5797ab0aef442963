"""group_advantages against the trainers' formulas, written out group by group in float64."""

from __future__ import annotations

import inspect
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ngrpo_ops import ADVANTAGE_PRESETS, Whitening, group_advantages
from ngrpo_ops.kernels import group_advantages as kernels
from ngrpo_ops.kernels.primitives import forced_int64, recording
from ngrpo_ops.ops.group_advantages import reference
from ngrpo_ops.ops.group_advantages.reference import GroupSettings
from ngrpo_ops.testing import (
    DEVICE,
    assert_as_accurate,
    assert_within,
    compute_roundoff,
    dtypes,
    for_backend,
    generators,
    integers,
    lay_out,
    normal,
    rounding,
)

CENTRED = ("mean", "leave_one_out")
BASELINES = (*CENTRED, "none")
SCALES = ("std", "batch_std", "mean", "none")


def by_hand(
    rewards: list[float], labels: list[int], baseline: str, scale: str, ddof: int, eps: float, keep: list[bool]
) -> list[float]:
    """One row at a time, from the definitions; equal rewards and single rows give 0."""
    batch = [r for r, k in zip(rewards, keep, strict=True) if k]
    out = []
    for reward, label, kept in zip(rewards, labels, keep, strict=True):
        group = [r for r, other, k in zip(rewards, labels, keep, strict=True) if k and other == label]
        alone = len(group) < 2 and (baseline != "none" or scale == "std")
        if not kept or alone or (baseline != "none" and len(set(group)) < 2):
            out.append(0.0)
            continue
        mean = math.fsum(group) / len(group)
        others = {"mean": mean, "none": 0.0}.get(baseline)
        if others is None:
            others = (math.fsum(group) - reward) / (len(group) - 1)
        advantage = reward - others
        if scale in ("std", "batch_std"):
            values = group if scale == "std" else batch
            center = math.fsum(values) / len(values)
            deviation = math.sqrt(math.fsum((r - center) ** 2 for r in values) / max(len(values) - ddof, 1)) + eps
            advantage = advantage / deviation if deviation else 0.0
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
    as_offsets=st.booleans(),
)
def test_definition(
    backend, n, groups, baseline, scale, ddof, eps, dtype, kind, use_mask, sliced, generator, as_offsets
):
    labels = integers(generator, groups, n) * 1000 - 7
    if as_offsets:
        labels = labels.sort().values
    rewards = normal(generator, n).abs() + 0.1
    rewards = {"binary": rewards.round().clamp(max=1), "normal": rewards, "large": rewards * 1e4}[kind].to(dtype)
    rewards = for_backend(rewards, backend)
    mask = normal(generator, n) < 0.5 if use_mask else None
    keep = [True] * n if mask is None else mask.tolist()
    layout: dict[str, Tensor] = {"group_ids": labels}
    if as_offsets:  # with groups that have no rows
        layout = {"offsets": torch.searchsorted(labels, torch.arange(-1, groups + 1, device=DEVICE) * 1000 - 7)}
        layout["offsets"][-1] = n
    got = group_advantages(
        lay_out(rewards, "sliced" if sliced else "contiguous"),
        **layout, baseline=baseline, scale=scale, ddof=ddof, eps=eps, mask=mask, backend=backend,
    )  # fmt: skip
    assert got.dtype == rewards.dtype
    exact = by_hand(rewards.tolist(), labels.tolist(), baseline, scale, ddof, eps, keep)
    want = torch.tensor(exact, dtype=torch.float64)
    # Centring errs by (n + 3) u times the largest reward; the scale by that and (n + 3) u of itself.
    u, size = compute_roundoff(rewards.dtype), float(rewards.double().abs().max())
    plain = by_hand(rewards.tolist(), labels.tolist(), baseline, "none", 0, 0.0, keep)
    divisor = torch.where(want != 0, torch.tensor(plain, dtype=torch.float64) / want, 1.0).abs()
    budget = (n + 3) * u * (4 * size * (1 + want.abs()) / divisor + 4 * want.abs())
    assert_within(got, want, budget + rounding(want, rewards.dtype, backend))


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize(
    "size", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(150, marks=pytest.mark.slow)]
)
def test_kernel_against_oracle(baseline, size):
    """The kernel's layer of the fast tests: as accurate as plain torch, equal groups and ragged ones, both ways."""
    generator, n = torch.Generator().manual_seed(size), 300
    rewards, grad = normal(generator, n, 2, dtype=torch.float32), normal(generator, n, 2, dtype=torch.float32)
    weights = (normal(generator, n) > -1).float()
    rewards[7, 0] = torch.nan
    _, order = integers(generator, 5, n).sort()
    ragged = torch.tensor([0, 0, 1, 3, 120, n], device=DEVICE)
    for arrangement in ((None, None, size), (order, ragged, 1)):
        for scale, singleton_groups in (("std", "zero"), ("mean", "keep"), ("none", "nan")):
            settings = GroupSettings(weights, *arrangement, baseline, scale, 1, 1e-2, singleton_groups, True)
            got = kernels.forward(rewards, settings)
            want = reference.group_advantages(rewards, settings)
            exact = reference.group_advantages(rewards.double(), settings)
            for kernel, eager, truth in zip(got, want, exact, strict=True):
                assert_as_accurate(kernel, eager, truth)
            grad_scales = normal(generator, *got[1].shape, dtype=torch.float32)
            assert_as_accurate(
                kernels.backward(grad, grad_scales, rewards, settings),
                reference.group_advantages_backward(grad, grad_scales, rewards, settings),
                reference.group_advantages_backward(grad.double(), grad_scales.double(), rewards.double(), settings),
            )


GROUPS = torch.tensor([[0.0, 1.0, 1.0, 0.5], [3.0, -1.0, 0.0, 0.25], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)


def _tokenwise(advantages: Tensor, lengths: Tensor) -> Tensor:
    """OpenRLHF's last step over all tokens of the batch: (A - mean) / sqrt(max(var, 1e-8)), var by n."""
    tokens = advantages.flatten().repeat_interleave(lengths)
    return (advantages - tokens.mean()) / tokens.var(correction=0).clamp(min=1e-8).sqrt()


LENGTHS = torch.tensor([3, 1, 7, 2, 9, 4, 4, 1, 2, 30, 1, 5])


@pytest.mark.parametrize(
    ("preset", "formula"),
    [
        ("trl/grpo", lambda r: (r - r.mean(1, True)) / (r.std(1, keepdim=True) + 1e-4)),
        ("trl/grpo_batch", lambda r: (r - r.mean(1, True)) / (r.std() + 1e-4)),
        ("trl/dr_grpo", lambda r: r - r.mean(1, True)),
        ("trl/rloo", lambda r: r - (r.sum(1, keepdim=True) - r) / 3),
        ("verl/grpo", lambda r: (r - r.mean(1, True)) / (r.std(1, keepdim=True) + 1e-6)),
        ("verl/dr_grpo", lambda r: r - r.mean(1, True)),
        ("verl/rloo", lambda r: (4 * r - r.sum(1, keepdim=True)) / 3),
        ("openrlhf/group_norm", lambda r: (r - r.mean(1, True)) / (r.std(1, keepdim=True) + 1e-9)),
        ("openrlhf/rloo", lambda r: r - (r.sum(1, keepdim=True) - r) / 3),
        ("openrlhf/dr_grpo", lambda r: r - r.mean(1, True)),
        ("openrlhf/reinforce_baseline", lambda r: _tokenwise(r - r.mean(1, True), LENGTHS)),
        ("maxrl", lambda r: (r - r.mean(1, True)) / r.mean(1, True)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_presets(backend, preset, formula, dtype):
    """Each trainer's formula, written out (TRL's own code: test_group_advantages_trainers.py)."""
    rewards = for_backend(GROUPS.to(dtype).to(DEVICE), backend)
    lengths = {"lengths": LENGTHS.to(DEVICE)} if preset == "openrlhf/reinforce_baseline" else {}
    options = ADVANTAGE_PRESETS[preset]
    got = group_advantages(rewards.reshape(-1), group_size=4, backend=backend, **lengths, **options).view_as(GROUPS)
    assert_within(
        got, formula(GROUPS), (1e-14 if rewards.dtype == torch.float64 else 5e-7) * (1 + formula(GROUPS).abs())
    )


def test_presets_for_a_group_of_one(backend):
    """verl gives the reward itself, over 1 + eps where it scales; the others nothing."""
    rewards = torch.tensor([2.0, 1.0, 3.0], device=DEVICE)
    labels = torch.tensor([4, 9, 9], device=DEVICE)
    for name, options in ADVANTAGE_PRESETS.items():
        if options.get("whitening"):
            continue
        single = group_advantages(rewards, group_ids=labels, backend=backend, **options)[0]
        want = {"verl/grpo": 2 / (1 + 1e-6), "verl/dr_grpo": 2.0, "verl/rloo": 2.0}.get(name, 0.0)
        assert abs(float(single) - want) < 1e-6, name


def test_several_reward_functions(backend):
    """Weighted sum, then normalized; or each normalized, then summed and whitened; NaN left out of both."""
    nan = torch.nan
    rewards = torch.tensor(
        [[1.0, 4.0], [2.0, nan], [nan, nan], [0.0, 1.0], [5.0, 2.0], [1.0, 2.0], [1.0, 0.0], [nan, 3.0]]
    )
    weights = torch.tensor([2.0, 0.5])
    total = torch.tensor([4.0, 4.0, nan, 0.5, 11.0, 3.0, 2.0, 1.5]).double()
    options = {"group_size": 4, "reward_weights": weights.to(DEVICE), "backend": backend, "nan_policy": "omit"}
    got = group_advantages(rewards.to(DEVICE), **options)
    first, second = total[[0, 1, 3]], total[4:]
    want = torch.zeros(8).double()
    want[[0, 1, 3]] = (first - first.mean()) / (first.std() + 1e-4)
    want[4:] = (second - second.mean()) / (second.std() + 1e-4)
    assert_within(got, want, 1e-6)

    got = group_advantages(rewards.to(DEVICE), **{**options, **ADVANTAGE_PRESETS["trl/gdpo"]})
    each = torch.zeros(8, 2).double()
    for column, rows in ((0, [0, 1, 3]), (0, [4, 5, 6]), (1, [0, 3]), (1, [4, 5, 6, 7])):
        r = rewards[rows, column].double()
        each[rows, column] = (r - r.mean()) / (r.std() + 1e-4)
    scored = torch.arange(8) != 2
    summed = (each * weights)[scored].sum(1)
    want = torch.zeros(8).double()
    want[scored] = (summed - summed.mean()) / (summed.std() + 1e-4)
    assert_within(got, want, 2e-6)


def test_nan_rewards_by_policy(backend):
    rewards = torch.tensor([1.0, torch.nan, 2.0, 3.0, torch.nan, 7.0], device=DEVICE)
    propagated = group_advantages(rewards, group_size=2, backend=backend)
    assert propagated.isnan().tolist() == [True, True, False, False, True, True]
    omitted = group_advantages(rewards, group_size=3, nan_policy="omit", backend=backend)
    alone = group_advantages(rewards[[0, 2]], group_size=2, backend=backend)
    assert torch.equal(omitted[[0, 2]], alone) and omitted[1] == omitted[4] == 0
    infinite = group_advantages(torch.tensor([1.0, torch.inf, 2.0, 3.0], device=DEVICE), group_size=2, backend=backend)
    assert infinite[:2].isnan().all() and infinite[2:].isfinite().all()


def test_a_broken_reward_is_seen_after_whitening(backend):
    """Under "propagate" NaN reaches every row, as the mean of the batch does; it is not turned into 0."""
    for bad in (torch.nan, torch.inf):
        rewards = torch.tensor([1.0, bad, 2.0, 3.0, 5.0, 9.0], device=DEVICE)
        for options in (ADVANTAGE_PRESETS["openrlhf/reinforce_baseline"], {"whitening": Whitening()}):
            assert group_advantages(rewards, group_size=2, backend=backend, **options).isnan().all()
        options = {"baseline": "leave_one_out", "scale": "none", "whitening": Whitening()}
        assert group_advantages(rewards, group_size=2, backend=backend, **options).isnan().all()


def test_a_partner_without_one_of_the_rewards(backend):
    """Leave-one-out of each function, summed: a row whose partner lacks one reward keeps what the other gives it."""
    rewards = torch.tensor([[1.0, 1.0], [2.0, torch.nan], [4.0, 3.0], [0.0, 5.0]], device=DEVICE)
    options = {"baseline": "leave_one_out", "scale": "none", "aggregation": "normalize_then_sum", "nan_policy": "omit"}
    got = group_advantages(rewards, group_size=2, whitening=Whitening(), backend=backend, **options)
    plain = torch.tensor([-1.0, 1.0, 4.0 - 2.0, -4.0 + 2.0]).double()
    assert_within(got, (plain - plain.mean()) / (plain.std() + 1e-4), 1e-6)


def test_singleton_groups_are_kept_only_where_they_would_be_nothing(backend):
    rewards, labels = torch.tensor([7.0, 1.0, 2.0], device=DEVICE), torch.tensor([0, 1, 1], device=DEVICE)

    def first(**options):
        return float(
            group_advantages(rewards, group_ids=labels, singleton_groups="keep", backend=backend, **options)[0]
        )

    assert abs(first() - 7 / (1 + 1e-4)) < 1e-5
    assert abs(first(baseline="none", scale="mean") - 7 / (7 + 1e-4)) < 1e-5
    deviation = rewards.double().std().item()
    assert abs(first(scale="batch_std") - 7 / (deviation + 1e-4)) < 1e-5
    assert first(baseline="leave_one_out", scale="none", whitening=Whitening()) != 0


def test_the_old_name_of_singleton_groups_warns():
    rewards, labels = torch.tensor([7.0, 1.0, 2.0]), torch.tensor([0, 1, 1])
    want = group_advantages(rewards, group_ids=labels, singleton_groups="keep")
    with pytest.warns(DeprecationWarning, match="'singles' of group_advantages is called 'singleton_groups'") as seen:
        assert torch.equal(group_advantages(rewards, group_ids=labels, singles="keep"), want)
    assert seen[0].filename == __file__
    with pytest.raises(TypeError, match="both 'singleton_groups' and its old name 'singles'"):
        group_advantages(rewards, group_ids=labels, singles="keep", singleton_groups="zero")
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match="singleton_groups"):
        group_advantages(rewards, group_ids=labels, singles="nan")
    assert "singles" not in inspect.signature(group_advantages).parameters
    assert not any("singles" in options for options in ADVANTAGE_PRESETS.values())


def test_half_precision_is_rounded_once(backend):
    rewards = torch.tensor([60000.0, 50000.0], device=DEVICE).half()
    weights = torch.tensor([2.0], device=DEVICE)
    got = group_advantages(rewards, group_size=2, reward_weights=weights, backend=backend)
    assert_within(got, torch.tensor([1.0, -1.0]) / 2**0.5, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("offsets", [[0, 3], [0, 3, 8], [0, 5, 2, 6], [-2, 3, 6]])
def test_the_kernel_stays_inside_whatever_the_offsets_say(offsets):
    """On a GPU they are not looked at: rows of no group get 0, and nothing beyond the rewards is touched."""
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], device=DEVICE)[:, None]
    settings = GroupSettings(
        None, None, torch.tensor(offsets, device=DEVICE), 1, "mean", "none", 1, 0.0, "zero", False
    )  # fmt: skip
    out, scales = kernels.forward(rewards, settings)
    gradient = kernels.backward(torch.ones_like(out), scales, rewards, settings)
    assert bool(out.isfinite().all()) and bool(gradient.isfinite().all())
    if offsets == [0, 3]:
        assert out[:, 0].tolist() == [-1, 0, 1, 0, 0, 0]


@pytest.mark.parametrize("baseline", ["mean", "none"])
@pytest.mark.parametrize("offsets", [[0, 3], [0, 3, 8], [0, 5, 2, 6], [2, 3, 5]])
def test_rows_of_no_group_get_nothing_without_the_kernel_too(offsets, baseline, monkeypatch):
    monkeypatch.setattr(reference, "require_offsets", lambda *args: None)
    rewards = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])[:, None]
    settings = GroupSettings(None, None, torch.tensor(offsets), 1, baseline, "none", 1, 0.0, "zero", False)
    out, scales = reference.group_advantages(rewards, settings)
    gradient = reference.group_advantages_backward(torch.ones_like(out), scales, rewards, settings)
    assert bool(out.isfinite().all()) and bool(gradient.isfinite().all())
    if offsets == [0, 3]:
        assert out[:, 0].tolist() == [[-1, 0, 1], [1, 2, 3]][baseline == "none"] + [0, 0, 0]
        assert not gradient[3:].any()


def test_what_leave_one_out_cannot_score_is_left_out_of_the_whitening(backend):
    """As TRL's RLOOTrainer: a row that is alone, and one without a reward, have no part in mean and deviation."""
    rewards = torch.tensor([1.0, 2.0, 4.0, 9.0, torch.nan, torch.nan], device=DEVICE)
    got = group_advantages(rewards, group_size=3, backend=backend, **ADVANTAGE_PRESETS["trl/rloo_normalized"])
    r = rewards[:3].double().cpu()
    want = r - (r.sum() - r) / 2
    assert_within(got[:3], (want - want.mean()) / (want.std() + 1e-4), 1e-6)
    assert not got[3:].any()


@given(
    reward=st.floats(1e-6, 1e30) | st.floats(-1e30, -1e-6) | st.sampled_from([0.0, 0.1, 1e8 + 1, 0.7, -1 / 3]),
    n=st.integers(1, 9),
    eps=st.sampled_from([0.0, 1e-9, 1e-4]),
    dtype=dtypes,
    scale=st.sampled_from(SCALES),
    baseline=st.sampled_from(CENTRED),
)
def test_equal_rewards_give_exactly_nothing(backend, reward, n, eps, dtype, scale, baseline):
    dtype = torch.float32 if backend == "triton" and dtype == torch.float64 else dtype
    limit = torch.finfo(dtype).max
    rewards = torch.full((n,), reward, dtype=torch.float64).clamp(-limit, limit).to(dtype).to(DEVICE).requires_grad_()
    out = group_advantages(rewards, group_size=n, eps=eps, scale=scale, baseline=baseline, backend=backend)
    assert not out.any() and not out.isnan().any()
    out.sum().backward()
    assert rewards.grad is not None and bool(rewards.grad.isfinite().all())


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("reward", [0.1, 1e8 + 1])
def test_equal_groups_beside_others(scale, reward):
    rewards = torch.tensor([reward] * 7 + [0.0, 1.0, 2.0, 3.0, 0.0, 1.0, 2.0])
    out = group_advantages(rewards, group_size=7, eps=0.0, scale=scale)
    assert not out[:7].any() and bool((out[7:] != 0).any())


@pytest.mark.parametrize("baseline", CENTRED)
@pytest.mark.parametrize("scale", SCALES)
def test_a_group_of_one_is_nothing(backend, baseline, scale):
    rewards = torch.tensor([5.0, 1.0, 2.0, 9.0], device=DEVICE, requires_grad=True)
    labels, mask = torch.tensor([3, 8, 8, 3]).to(DEVICE), torch.tensor([True, True, True, False]).to(DEVICE)
    out = group_advantages(rewards, group_ids=labels, baseline=baseline, scale=scale, mask=mask, backend=backend)
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


@pytest.mark.parametrize("baseline", CENTRED)
@pytest.mark.parametrize("scale", ["std", "batch_std", "none"])
@pytest.mark.parametrize("shift", [-3.0, 2.0**10, 2.0**20, 2.0**23])
def test_shift_invariance(baseline, scale, shift):
    """The same spread at another level is the same advantage; every reward here is exact in float32."""
    rewards = torch.arange(64).float().mul(7).remainder(5)
    plain = group_advantages(rewards, group_size=8, baseline=baseline, scale=scale)
    assert_within(group_advantages(rewards + shift, group_size=8, baseline=baseline, scale=scale), plain, 1e-5)


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


def test_expanded_gradients():
    rewards = torch.randn(6, dtype=torch.float64, requires_grad=True)
    (one,) = torch.autograd.grad(group_advantages(rewards, group_size=3).sum(), rewards)  # a stride-0 gradient
    grad = torch.ones(12, dtype=torch.float64)[::2]
    (other,) = torch.autograd.grad(group_advantages(rewards, group_size=3), rewards, grad)
    assert torch.equal(one, other)


def test_a_second_derivative_is_refused(backend):
    half = torch.randn(6).bfloat16().to(DEVICE).requires_grad_()
    out = group_advantages(half, group_size=3, backend=backend)
    (first,) = torch.autograd.grad(out.square().sum(), half, create_graph=True)
    assert first.dtype == torch.bfloat16
    with pytest.raises(NotImplementedError, match="group_advantages can be differentiated once"):
        torch.autograd.grad(first.sum(), half)


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"rewards": [1.0]}, TypeError, "rewards"),
        ({"rewards": torch.ones(2, 2, 1)}, ValueError, "rewards"),
        ({"rewards": torch.ones(4).long()}, ValueError, "rewards"),
        ({"rewards": torch.ones(0)}, ValueError, "rewards"),
        ({"group_size": None}, ValueError, "group_size, group_ids and offsets"),
        ({"group_ids": torch.zeros(4).long()}, ValueError, "group_size, group_ids and offsets"),
        ({"group_size": 2.0}, TypeError, "group_size"),
        ({"group_size": None, "offsets": torch.tensor([0, 3])}, ValueError, "offsets"),
        ({"group_size": None, "offsets": torch.tensor([0, 3, 2, 4])}, ValueError, "offsets"),
        ({"group_size": None, "offsets": torch.tensor([4])}, ValueError, "offsets"),
        ({"group_size": None, "offsets": torch.tensor([0.0, 4.0])}, TypeError, "offsets"),
        ({"rewards": torch.ones(4, 2), "reward_weights": torch.ones(3)}, ValueError, "reward_weights"),
        ({"reward_weights": torch.ones(1).long()}, TypeError, "reward_weights"),
        ({"aggregation": "sum"}, ValueError, "aggregation"),
        ({"nan_policy": "raise"}, ValueError, "nan_policy"),
        ({"singleton_groups": "nan"}, ValueError, "singleton_groups"),
        ({"whitening": True}, TypeError, "whitening"),
        ({"lengths": torch.ones(4).long()}, ValueError, "lengths"),
        ({"lengths": torch.ones(4), "whitening": Whitening()}, TypeError, "lengths"),
        ({"ddof": 0.5}, TypeError, "ddof"),
        ({"ddof": 2**70}, ValueError, "ddof"),
        ({"eps": "1"}, TypeError, "eps"),
        ({"eps": None}, TypeError, "eps"),
        ({"eps": math.inf}, ValueError, "eps"),
        ({"lengths": torch.tensor([1, -1, 1, 1]), "whitening": Whitening()}, ValueError, "lengths"),
        ({"backend": "cuda"}, ValueError, "backend"),
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


@pytest.mark.parametrize("preset", ADVANTAGE_PRESETS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_of_presets(preset, masked):
    generator = torch.Generator().manual_seed(4)
    rewards = normal(generator, 8, 2).requires_grad_()
    options = {
        **ADVANTAGE_PRESETS[preset],
        "eps": 0.1,
        "reward_weights": torch.tensor([1.0, 0.3], device=DEVICE).double(),
    }
    if preset == "openrlhf/reinforce_baseline":
        options["lengths"] = torch.arange(1, 9, device=DEVICE)
    mask = (torch.arange(8) != 3).to(DEVICE) if masked else None
    assert torch.autograd.gradcheck(
        lambda r: group_advantages(r + 2.0, group_size=4, mask=mask, **options), (rewards,), atol=1e-4
    )


def test_whitening_over_tokens_is_that_of_repeated_rows():
    rewards, lengths = torch.randn(6, dtype=torch.float64), torch.tensor([1, 4, 2, 0, 3, 1])
    got = group_advantages(rewards, group_size=3, scale="none", whitening=Whitening(ddof=1), lengths=lengths)
    plain = group_advantages(rewards, group_size=3, scale="none")
    tokens = plain.repeat_interleave(lengths)
    counted = lengths > 0  # a completion without tokens has no part
    assert_within(got[counted], ((plain - tokens.mean()) / (tokens.std() + 1e-4))[counted], 1e-12)
    assert not got[~counted].any()
    for field, bad, error in (("eps", -1.0, ValueError), ("floor", math.inf, ValueError), ("ddof", 1.0, TypeError)):
        with pytest.raises(error, match=field):
            Whitening(**{field: bad})


@pytest.mark.slow
def test_64_bit_kernels_agree():
    generator = torch.Generator().manual_seed(1)
    rewards = normal(generator, 40, 2, dtype=torch.float32)
    order, offsets = torch.randperm(40).to(DEVICE), torch.tensor([0, 7, 7, 40], device=DEVICE)
    settings = GroupSettings(None, order, offsets, 1, "mean", "std", 1, 1e-4, "zero", False)

    def run() -> list[Tensor]:
        out, scales = kernels.forward(rewards, settings)
        return [out, kernels.backward(out, scales, rewards, settings)]

    narrow = run()
    with forced_int64():
        assert all(torch.equal(a, b) for a, b in zip(run(), narrow, strict=True))


def test_offsets_are_64_bits_wide_where_they_must_be():
    """Rewards whose rows lie far apart in memory, on meta."""
    for stride, wide in ((2**29, True), (2**20, False)):
        rewards = torch.empty(1, device="meta").as_strided((8, 1), (stride, 1))
        with recording() as launches:
            kernels.forward(rewards, GroupSettings(None, None, None, 4, "mean", "std", 1, 1e-4, "zero", False))
        assert [launch.arguments["INT64"] for launch in launches] == [wide]


@pytest.mark.slow
@pytest.mark.parametrize("scale", ["std", "mean", "none"])
@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_opcheck(scale, implementation):
    rewards, weights = torch.rand(6, 2).to(DEVICE), (torch.arange(6) != 1).to(DEVICE)
    order, offsets = torch.randperm(6).to(DEVICE), torch.tensor([0, 3, 3, 6], device=DEVICE)
    for layout, transposed in itertools.product(((None, None, 3), (order, offsets, 1)), (False, True)):
        rewards = lay_out(rewards, "transposed" if transposed else "contiguous")
        options = (weights, *layout, "leave_one_out", scale, 1, 1e-4, "zero", True, implementation)
        torch.library.opcheck(torch.ops.ngrpo.group_advantages.default, (rewards.clone().requires_grad_(), *options))
        out, scales = torch.ops.ngrpo.group_advantages(rewards, *options)
        torch.library.opcheck(torch.ops.ngrpo.group_advantages_backward.default, (out, scales, rewards, *options))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:'singles' of group_advantages:DeprecationWarning")
@pytest.mark.parametrize("layout", ["equal", "labels", "gdpo", "batch", "old name"])
@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_compiles(implementation, layout):
    torch._dynamo.reset()

    def call(rewards: Tensor) -> Tensor:
        if layout == "labels":
            labels = torch.arange(rewards.shape[0], device=rewards.device) % 3
            return group_advantages(rewards, group_ids=labels, backend=implementation)
        options = {
            "equal": {},
            "gdpo": ADVANTAGE_PRESETS["trl/gdpo"],
            "batch": {**ADVANTAGE_PRESETS["trl/rloo_normalized"], "scale": "batch_std"},
            "old name": {"singles": "keep"},
        }[layout]
        return group_advantages(rewards, group_size=4, backend=implementation, **options)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (8, 20):
        rewards, grad = torch.randn(n, device=DEVICE, requires_grad=True), torch.randn(n, device=DEVICE)
        got, want = compiled(rewards), call(rewards)
        assert torch.equal(got, want)
        gradients = [torch.autograd.grad(out, rewards, grad)[0] for out in (got, want)]
        assert torch.equal(*gradients)
