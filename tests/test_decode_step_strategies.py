"""The strategies of decode_step and mixing_candidates, settings by row, faults."""

from __future__ import annotations

import math

import pytest
import torch
from decode_steps import assert_distributed, cut_by_hand, draws_by_hand, on, plain
from torch import Tensor

from ngrpo_ops import (
    decode_step,
    mixing_candidates,
    raise_faults,
)
from ngrpo_ops.random import gumbel
from ngrpo_ops.testing import (
    DEVICE,
    assert_within,
)


def exact_weights(z: Tensor, ids: Tensor) -> Tensor:
    return z.double().gather(1, ids).softmax(1)


@pytest.mark.parametrize("mixing_temperature", [None, 0.4])
def test_topk_mixes_the_likeliest(backend, mixing_temperature):
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0, -torch.inf]], device=DEVICE)
    table = torch.eye(5, device=DEVICE)
    out = decode_step(
        logits, table, strategy="topk", k=3, mixing_rate=1.0, temperature=0.5, mixing_temperature=mixing_temperature,
        seed=0, step=0, backend=backend,
    )  # fmt: skip
    assert out.ids.tolist() == [[1, 3, 4], [0, 1, 2]] and out.token_ids.tolist() == [1, 0]
    want = exact_weights(logits.double() / (mixing_temperature or 0.5), out.ids)
    assert_within(out.weights, want, 1e-6)
    mixed = torch.zeros(2, 5, device=DEVICE).scatter(1, out.ids, want.float())
    assert_within(out.embeddings, mixed, 1e-6)


@pytest.mark.parametrize("strategy", ["topk", "gumbel", "gaussian"])
def test_fewer_tokens_than_candidates(backend, strategy):
    """What is not there weighs nothing and is never NaN."""
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0, -torch.inf]], device=DEVICE)
    out = decode_step(
        logits, torch.eye(5, device=DEVICE), strategy=strategy, k=4, mixing_rate=1.0, seed=0, step=0, backend=backend
    )
    assert sorted(out.ids[0, :2].tolist()) == [1, 3] and not out.weights[0, 2:].any() and out.fault.item() == 0
    assert_within(out.weights.sum(1), torch.ones(1), 1e-6)
    assert out.embeddings.isfinite().all()


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_gumbel_weights_are_those_of_the_noised_logits(backend, temperature):
    generator = torch.Generator().manual_seed(0)
    b, v, k, tau = 40, 2100, 5, 0.3
    logits = (2 * torch.randn(b, v, generator=generator)).to(DEVICE)
    rows = torch.randint(2**62, (b,), generator=generator).to(DEVICE)
    out = mixing_candidates(
        logits, strategy="gumbel", k=k, temperature=temperature, mixing_temperature=tau, seed=5, step=9, row_ids=rows,
        backend=backend,
    )  # fmt: skip
    likeliest = logits.topk(k).indices
    noise = gumbel(torch.tensor(5), rows.cpu(), torch.tensor(9), k).to(DEVICE).double()
    weights = ((logits.double().gather(1, likeliest) / temperature + noise) / tau).softmax(1)
    where = (out.ids[:, :, None] == likeliest[:, None, :]).to(torch.uint8).argmax(2)
    assert torch.equal(likeliest.gather(1, where), out.ids)
    assert_within(out.weights, weights.gather(1, where), 3e-5)
    assert (out.weights.argmax(1) == 0).all() and (where[:, 0] != 0).any()


def test_gumbel_emits_draws_from_the_top_of_the_policy():
    n = 200_000
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5], device=DEVICE)
    out = decode_step(logits.expand(n, 5), None, strategy="gumbel", k=3, mixing_rate=1.0, seed=3, step=4)
    p = torch.tensor(cut_by_hand(logits.double().softmax(0).tolist(), 3, None), dtype=torch.float64)
    assert_distributed(out.token_ids.cpu().bincount(minlength=5), p)


@pytest.mark.parametrize("beta", [None, 0.0, 2.5])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_moi_mixes_the_sample_into_the_distribution(backend, beta, k):
    generator = torch.Generator().manual_seed(0)
    b, v, seed, step = 60, 2100, 5, 9
    logits = (3 * torch.randn(b, v, generator=generator)).to(DEVICE)
    rows = torch.randint(2**62, (b,), generator=generator).to(DEVICE)
    found = mixing_candidates(
        logits, strategy="moi", k=k, temperature=0.7, moi_beta=beta, seed=seed, step=step, row_ids=rows, backend=backend
    )
    p = (logits.double().cpu() / 0.7).softmax(1)
    share = -(p * p.log()).sum(1) / math.log(v)
    beta = 1.0 if beta is None else beta
    outside = 0
    for row, drawn in enumerate(draws_by_hand(p, seed, rows.cpu(), step, 1)[:, 0].tolist()):
        likeliest = p[row].topk(k).indices.tolist()
        if drawn not in likeliest:
            likeliest[-1], outside = drawn, outside + 1
        ids = [drawn, *(token for token in likeliest if token != drawn)]
        assert found.ids[row].tolist() == ids
        want = share[row] * p[row, ids] / p[row, ids].sum()
        want[0] += beta + 1 - share[row]
        assert_within(found.weights[row], want / (beta + 1), 3e-6)
    assert 0 < outside < b  # both cases were met
    assert_within(found.weights.sum(1), torch.ones(b), 1e-6)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_multiplex_mixes_what_it_draws(backend, k):
    generator = torch.Generator().manual_seed(0)
    b, v, seed, step = 60, 2100, 5, 9
    logits = (4 * torch.randn(b, v, generator=generator)).to(DEVICE)
    rows = torch.randint(2**62, (b,), generator=generator).to(DEVICE)
    found = mixing_candidates(
        logits, strategy="multiplex", k=k, temperature=0.7, seed=seed, step=step, row_ids=rows, backend=backend
    )
    p = (logits.double().cpu() / 0.7).softmax(1)
    draws = draws_by_hand(p, seed, rows.cpu(), step, k)
    assert torch.equal(found.ids.cpu(), draws)
    again = 0
    for row in range(b):
        distinct = [i for i in range(k) if draws[row, i] not in draws[row, :i]]
        want = torch.zeros(k, dtype=torch.float64)
        want[distinct] = p[row, draws[row, distinct]] / p[row, draws[row, distinct]].sum()
        assert_within(found.weights[row], want, 3e-6)
        again += len(distinct) < k
    assert k == 1 or again > 5


@pytest.mark.parametrize("strategy", ["moi", "multiplex"])
@pytest.mark.parametrize("cuts", [{}, {"top_k": 4, "top_p": 0.9}])
def test_drawing_strategies_emit_the_sample(backend, strategy, cuts):
    """Mixed or not the row's own sample, which the cuts hold for, and at temperature 0 the argmax."""
    a = on(backend, {**plain(64, 1300, mixing_rate=0.5), "neighbor_ids": None, "strategy": strategy, "k": 3, **cuts})
    a["temperature"] = torch.tensor([0.8, 0.0] * 32, device=DEVICE)
    out = decode_step(**a)
    sampled = decode_step(**a | {"strategy": "anchor", "k": None, "mixing_rate": 0.0}).token_ids
    assert out.gate.any() and not out.gate.all()
    assert torch.equal(out.token_ids, sampled) and torch.equal(out.ids[:, 0], sampled)
    assert torch.equal(out.token_ids[1::2], a["logits"][1::2].argmax(1))
    if strategy == "multiplex":
        assert torch.equal(out.weights[1::2].cpu(), torch.tensor([[1.0, 0.0, 0.0]]).expand(32, 3))
        assert not cuts or all(
            set(ids) <= set(row.topk(4).indices.tolist())
            for ids, row in zip(out.ids.tolist(), a["logits"], strict=True)
        )
    for name in ("embedding", "mixing_rate"):
        a.pop(name)
    found = mixing_candidates(**a)
    assert torch.equal(found.ids, out.ids) and torch.equal(found.weights, out.weights)


def test_draws_of_multiplex_are_independent():
    n = 200_000
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5], device=DEVICE)
    out = decode_step(logits.expand(n, 5), None, strategy="multiplex", k=4, mixing_rate=1.0, top_k=3, seed=3, step=4)
    p = torch.tensor(cut_by_hand(logits.double().softmax(0).tolist(), 3, None), dtype=torch.float64)
    for one in range(4):
        for other in range(one):
            pairs = (out.ids[:, one] * 5 + out.ids[:, other]).cpu()
            assert_distributed(pairs.bincount(minlength=25), (p[:, None] * p).flatten())


@pytest.mark.parametrize("strategy", ["moi", "multiplex"])
def test_drawing_strategies_of_few_tokens(backend, strategy):
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 0.0, -torch.inf], [-torch.inf] * 4 + [3.0]], device=DEVICE)
    for step in range(8):
        out = decode_step(
            logits, torch.eye(5, device=DEVICE), strategy=strategy, k=4, mixing_rate=1.0, seed=0, step=step,
            backend=backend,
        )  # fmt: skip
        assert not out.fault.any() and out.token_ids[0] in (1, 3) and out.token_ids[1] == 4
        assert_within(out.weights.sum(1), torch.ones(2), 1e-6)
        assert_within(out.embeddings[0, [1, 3]].sum(), torch.ones(()), 1e-6)
        assert torch.equal(out.embeddings[1].cpu(), torch.eye(5)[4])
    alone = decode_step(
        torch.ones(1, 1, device=DEVICE), None, strategy=strategy, k=1, mixing_rate=1.0, seed=0, step=0, backend=backend
    )
    assert alone.weights.item() == 1 and alone.token_ids.item() == 0


def test_cuts_of_candidates_are_refused_where_nothing_is_drawn():
    with pytest.raises(ValueError, match="top_p is read by the strategies"):
        mixing_candidates(torch.ones(1, 5), strategy="topk", k=2, top_p=0.9)


def test_the_anchor_alone(backend):
    a = on(backend, plain(8, mixing_rate=0.5))
    control = decode_step(**{**a, "neighbor_ids": None, "strategy": "anchor"})
    one = decode_step(**{**a, "neighbor_ids": a["neighbor_ids"][:, :0]})
    assert all(torch.equal(x, y) for x, y in zip(control, one, strict=True))
    assert torch.equal(control.token_ids[control.gate], a["logits"].argmax(1)[control.gate])
    assert torch.equal(control.embeddings, a["embedding"][control.token_ids]) and (control.weights == 1).all()


def test_settings_by_row_are_those_of_each_row_alone(backend):
    b, v = 12, 1500
    generator = torch.Generator().manual_seed(3)
    arguments = on(backend, {**plain(b, v), "logits": torch.randn(b, v, generator=generator) * 2, "mixing_rate": 0.3})
    settings = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 2.0] * 3),
        "top_k": torch.tensor([0, 1, 5, v, v + 3, 40] * 2),
        "top_p": torch.tensor([1.0, 0.9, 0.5, 1e-6] * 3),
        "min_p": torch.tensor([0.0, 0.01, 0.2, 1.0, 0.0, 0.5] * 2),
    }
    settings = {name: x.to(DEVICE) for name, x in settings.items()}
    rows = torch.arange(b, device=DEVICE)
    whole = decode_step(**arguments, row_ids=rows, **settings)
    for row in range(b):
        alone = {name: x[row].item() for name, x in settings.items()}
        alone["top_k"] = alone["top_k"] or None
        part = {**arguments, "logits": arguments["logits"][row : row + 1], "row_ids": rows[row : row + 1], **alone}
        for x, y in zip(decode_step(**part), whole, strict=True):
            assert torch.equal(x[0], y[row])
    greedy = settings["temperature"] == 0
    assert torch.equal(whole.token_ids[greedy], arguments["logits"][greedy].argmax(1))
    want = arguments["logits"][greedy].double().log_softmax(1).gather(1, whole.token_ids[greedy, None])[:, 0]
    assert_within(whole.logprobs[greedy], want, 4e-6)


def test_rows_switched_off_and_certain_rows_are_not_mixed(backend):
    a = on(backend, plain(64, 7, mixing_rate=1.0))
    enabled = (torch.arange(64) % 3 > 0).to(DEVICE)
    out = decode_step(**a, enabled=enabled)
    assert torch.equal(out.gate, enabled)
    assert torch.equal(out.token_ids[~enabled], decode_step(**{**a, "mixing_rate": 0.0}).token_ids[~enabled])
    entropy = -(a["logits"].double().softmax(1) * a["logits"].double().log_softmax(1)).sum(1)
    assert_within(out.entropy, entropy, 4e-6)
    threshold = float(entropy.sort().values[20:22].mean())
    by_entropy = decode_step(**a, entropy_threshold=threshold)
    assert torch.equal(by_entropy.gate, entropy >= threshold)
    both = decode_step(**{**a, "mixing_rate": 0.5}, entropy_threshold=threshold)
    assert torch.equal(both.gate, decode_step(**{**a, "mixing_rate": 0.5}).gate & by_entropy.gate)


def test_faulty_rows_are_flagged_and_nothing_is_sampled_from_them(backend):
    a = on(backend, plain(6, 2200, mixing_rate=1.0))
    clean = decode_step(**a)
    a["logits"][1, 2100] = torch.nan
    a["logits"][2] = -torch.inf
    a["logits"][4, 7] = torch.inf
    anchor = int(a["logits"][5].argmax())
    if backend == "triton":  # on the CPU plain torch raises at once
        a["neighbor_ids"][anchor, 1] = 2200
    for options in ({}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}, {"mixing_rate": 0.0}):
        out = decode_step(**{**a, **options})
        good = [0, 3] if backend == "triton" else [0, 3, 5]
        assert out.fault.tolist() == [0, 1, 2, 0, 1, 4 if backend == "triton" else 0]
        bad = out.fault != 0
        assert not out.gate[bad].any() and not out.token_ids[bad].any() and not out.ids[bad].any()
        for name in ("weights", "embeddings", "logprobs", "entropy"):
            assert getattr(out, name)[bad].isnan().all() and getattr(out, name)[~bad].isfinite().all()
        if not options:
            assert all(torch.equal(x[good], y[good]) for x, y in zip(out, clean, strict=True))
    found = mixing_candidates(a["logits"], a["neighbor_ids"], backend=backend)
    assert torch.equal(found.fault, out.fault) and torch.equal(found.ids, out.ids)
    for strategy in ("topk", "gumbel", "gaussian", "moi", "multiplex"):
        step = decode_step(
            a["logits"], a["embedding"], strategy=strategy, k=3, seed=0, step=0, mixing_rate=1.0, backend=backend
        )
        assert step.fault.tolist() == [0, 1, 2, 0, 1, 0] and step.embeddings[[0, 3, 5]].isfinite().all()


def test_faults_are_raised_with_row_and_step():
    raise_faults(torch.zeros(3, dtype=torch.int32))
    with pytest.raises(RuntimeError, match=r"row 1: its logits hold NaN"):
        raise_faults(torch.tensor([0, 1, 0]))
    steps = torch.tensor([[0, 0, 2], [0, 4, 0]])
    with pytest.raises(RuntimeError, match=r"row 70, step 1 \(and 1 more\): a neighbor of its anchor"):
        raise_faults(steps, row_ids=torch.tensor([60, 70]))
    with pytest.raises(RuntimeError, match=r"row 0, step 2: all of its logits are -inf"):
        raise_faults(steps[:1])


def test_candidates_are_those_of_the_step(backend):
    a = on(backend, plain(9, 1300, temperature=0.7, variant="released"))
    out = decode_step(**a)
    for name in ("seed", "step", "embedding"):
        a.pop(name)
    assert mixing_candidates(**a).entropy is None
    found = mixing_candidates(**a, return_entropy=True)
    assert all(torch.equal(x, getattr(out, name)) for name, x in found._asdict().items())


@pytest.mark.parametrize("strategy", ["neighbor", "gumbel", "gaussian", "moi", "multiplex"])
def test_rows_at_steps_of_their_own_are_those_of_each_step(backend, strategy):
    a = on(backend, plain(6, 1300, mixing_rate=0.5, k=3))
    a |= {"strategy": strategy, "row_ids": torch.arange(6, device=DEVICE) + 5}
    if strategy != "neighbor":
        a["neighbor_ids"] = None
    steps = torch.tensor([0, 9, 2**33, 0, 7, 1], device=DEVICE)
    out = decode_step(**a | {"step": steps})
    strided = torch.stack([steps, steps + 1], dim=1)[:, 0]
    assert all(torch.equal(x, y) for x, y in zip(out, decode_step(**a | {"step": strided}), strict=True))
    of_candidates = {name: x for name, x in a.items() if name not in ("embedding", "mixing_rate")}
    assert torch.equal(mixing_candidates(**of_candidates | {"step": steps}).weights, out.weights)
    for row, step in enumerate(steps.tolist()):
        alone = decode_step(**a | {"step": step})
        for name, value in alone._asdict().items():
            assert torch.equal(value[row], getattr(out, name)[row]), (name, row)
