"""decode_step: every promise of the contract, bad input, registration."""

from __future__ import annotations

import math

import pytest
import torch
from decode_steps import cut_by_hand, on, plain, settings_of, steps
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ngrpo_ops import (
    candidate_weights,
    decode_step,
)
from ngrpo_ops.testing import (
    DEVICE,
    assert_within,
    compute_roundoff,
    generators,
    rounding,
    unit_roundoff,
)


@given(arguments=steps())
def test_contract(backend, arguments):
    arguments = on(backend, arguments)
    logits, table, neighbors = arguments["logits"], arguments["embedding"], arguments["neighbor_ids"]
    b, v = logits.shape
    state = torch.get_rng_state()
    out = decode_step(**arguments)
    assert torch.equal(torch.get_rng_state(), state)
    assert (out.token_ids.dtype, out.gate.dtype, out.ids.dtype) == (torch.int64, torch.bool, torch.int64)
    assert (out.weights.dtype, out.logprobs.dtype) == (torch.float32, torch.float32)
    assert out.embeddings.dtype == table.dtype and out.embeddings.shape == (b, table.shape[1])
    if arguments["mixing_rate"] in (0.0, 1.0):
        assert bool((out.gate == bool(arguments["mixing_rate"])).all())

    z = logits.double() / arguments["temperature"]
    size = torch.where(z.isinf(), 0, z).abs().amax(1)
    u = compute_roundoff(logits.dtype)
    for row in range(b):
        values = logits[row].tolist()
        anchor = values.index(max(values))
        assert out.ids[row].tolist() == [anchor, *neighbors[anchor].tolist()]
        want = z[row, out.ids[row]].softmax(0)
        assert_within(out.weights[row], want, 1e-6 + 8 * u * size[row])
        token = int(out.token_ids[row])
        mix = (out.weights[row].double()[:, None] * table[out.ids[row]].double()).sum(0)
        if out.gate[row]:
            terms = (out.weights[row].double()[:, None] * table[out.ids[row]].double()).abs().sum(0)
            assert token == anchor
            assert_within(
                out.embeddings[row],
                mix,
                8 * unit_roundoff(torch.float32) * terms + rounding(mix, table.dtype, backend),
            )
        else:
            assert torch.equal(out.embeddings[row], table[token])
            assert cut_by_hand(z[row].softmax(0).tolist(), arguments["top_k"], None)[token] > 0
        exact = z[row].log_softmax(0)[token]
        assert_within(out.logprobs[row], exact, u * (4 * size[row] + v + 8) + 2.0**-23 * exact.abs() + 1e-44)


@given(arguments=steps(), generator=generators, size=st.integers(1, 4))
def test_a_row_does_not_know_its_batch(backend, arguments, generator, size):
    """Order, batch size and the other rows leave a row's result as it is; the gate ignores even its own logits."""
    arguments = on(backend, arguments)
    b = arguments["logits"].shape[0]
    whole = decode_step(**arguments)
    rows = torch.randperm(b, generator=generator)[:size].to(DEVICE)
    part = decode_step(**{**arguments, "logits": arguments["logits"][rows], "row_ids": arguments["row_ids"][rows]})
    for name in ("token_ids", "gate", "ids"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[rows])
    for name in ("weights", "embeddings", "logprobs"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[rows])
    other = torch.randn(arguments["logits"].shape, generator=generator).to(DEVICE)
    assert torch.equal(decode_step(**{**arguments, "logits": other}).gate, whole.gate)
    tensors = {name: torch.tensor(arguments[name]) for name in ("seed", "step")}
    assert all(torch.equal(x, y) for x, y in zip(decode_step(**{**arguments, **tensors}), whole, strict=True))


@pytest.mark.parametrize("options", [{}, {"top_k": 40, "top_p": 0.9}, {"strategy": "gumbel", "k": 3}])
def test_alone_and_among_64(backend, options):
    a = on(backend, {**plain(64, 2000), "mixing_rate": 0.3, "temperature": 0.8, **options})
    if "strategy" in options:
        a["neighbor_ids"] = None
    rows = torch.randint(2**62, (64,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    whole = decode_step(**a, row_ids=rows)
    for row in (0, 17, 63):
        one = {**a, "logits": a["logits"][row : row + 1], "row_ids": rows[row : row + 1]}
        assert all(torch.equal(x[0], y[row]) for x, y in zip(decode_step(**one), whole, strict=True))


def test_default_rows_and_the_keys_matter():
    arguments = plain(64, mixing_rate=0.5)
    base = decode_step(**arguments)
    assert torch.equal(base.gate, decode_step(**arguments, row_ids=torch.arange(64)).gate)
    for change in ({"seed": 1}, {"step": 1}, {"seed": 2**32}, {"step": 2**32}, {"row_ids": torch.arange(64) + 2**32}):
        assert not torch.equal(base.gate, decode_step(**{**arguments, **change}).gate)


def test_released_variant_and_no_gradient():
    arguments = plain(logits=torch.randn(4, 5, requires_grad=True), variant="released", temperature=0.5)
    out = decode_step(**arguments)
    assert not out.embeddings.requires_grad and not out.logprobs.requires_grad
    p = (arguments["logits"].detach().double() / 0.5).softmax(1)
    assert_within(out.weights, p.gather(1, out.ids).softmax(1), 1e-6)


def test_a_row_of_nan_is_its_own_affair():
    arguments = plain()
    clean = decode_step(**arguments)
    arguments["logits"][2] = torch.nan
    out = decode_step(**arguments)
    keep = torch.tensor([0, 1, 3])
    assert out.logprobs[2].isnan() and torch.equal(out.token_ids[keep], clean.token_ids[keep])


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"logits": 1}, TypeError, "logits"),
        ({"logits": torch.ones(5)}, ValueError, "logits"),
        ({"logits": torch.ones(4, 5).long()}, ValueError, "logits"),
        ({"logits": torch.ones(0, 5)}, ValueError, "logits"),
        ({"embedding": 1}, TypeError, "embedding"),
        ({"embedding": torch.ones(0, 3)}, ValueError, "embedding"),
        ({"embedding": torch.ones(6, 3)}, ValueError, "embedding"),
        ({"embedding": torch.ones(5, 3, device="meta")}, ValueError, "embedding"),
        ({"neighbor_ids": [0]}, TypeError, "neighbor_ids"),
        ({"neighbor_ids": torch.zeros(5, 2)}, TypeError, "neighbor_ids"),
        ({"neighbor_ids": torch.zeros(5).long()}, ValueError, "neighbor_ids"),
        ({"neighbor_ids": torch.zeros(4, 2).long()}, ValueError, "neighbor_ids"),
        ({"neighbor_ids": torch.zeros(5, 2, device="meta").long()}, ValueError, "neighbor_ids"),
        ({"mixing_rate": -0.1}, ValueError, "mixing_rate"),
        ({"mixing_rate": 1.5}, ValueError, "mixing_rate"),
        ({"mixing_rate": math.nan}, ValueError, "mixing_rate"),
        ({"temperature": -0.1}, ValueError, "temperature"),
        ({"temperature": math.inf}, ValueError, "temperature"),
        ({"top_k": 0}, ValueError, "top_k"),
        ({"top_p": 0.0}, ValueError, "top_p"),
        ({"top_p": 1.1}, ValueError, "top_p"),
        ({"top_p": math.nan}, ValueError, "top_p"),
        ({"variant": "official"}, ValueError, "variant"),
        ({"backend": "cuda"}, ValueError, "backend"),
        ({"temperature": -0.1}, ValueError, "temperature"),
        ({"temperature": torch.ones(3)}, ValueError, "temperature"),
        ({"temperature": torch.tensor([1.0, 1.0, -1.0, 1.0])}, ValueError, "temperature"),
        ({"temperature": torch.ones(4).long()}, TypeError, "temperature"),
        ({"temperature": "1"}, TypeError, "temperature"),
        ({"top_k": 1.5}, TypeError, "top_k"),
        ({"top_k": torch.ones(4)}, TypeError, "top_k"),
        ({"top_p": torch.tensor([0.5, 0.5, 1.5, 0.5])}, ValueError, "top_p"),
        ({"min_p": -0.1}, ValueError, "min_p"),
        ({"min_p": 1.1}, ValueError, "min_p"),
        ({"enabled": torch.ones(4)}, TypeError, "enabled"),
        ({"enabled": torch.ones(3, dtype=torch.bool)}, ValueError, "enabled"),
        ({"strategy": "neighbour"}, ValueError, "strategy"),
        ({"strategy": "topk", "k": 2}, ValueError, "neighbor_ids"),
        ({"neighbor_ids": None}, ValueError, "neighbor_ids"),
        ({"neighbor_ids": None, "strategy": "topk"}, TypeError, "k must"),
        ({"neighbor_ids": None, "strategy": "topk", "k": 6}, ValueError, "k must"),
        ({"neighbor_ids": None, "strategy": "anchor", "k": 2}, ValueError, "k must"),
        ({"neighbor_ids": None, "strategy": "gumbel", "k": 2, "variant": "released"}, ValueError, "variant"),
        ({"neighbor_ids": None, "strategy": "moi", "k": 2, "variant": "released"}, ValueError, "variant"),
        ({"neighbor_ids": None, "strategy": "multiplex", "k": 2, "moi_beta": 1.0}, ValueError, "moi_beta"),
        ({"neighbor_ids": None, "strategy": "moi", "k": 2, "moi_beta": -1.0}, ValueError, "moi_beta"),
        ({"k": 2}, ValueError, "k must"),
        ({"mixing_temperature": 0.0}, ValueError, "mixing_temperature"),
        ({"noise_scale": 0.1}, ValueError, "noise_scale"),
        ({"entropy_threshold": -1.0}, ValueError, "entropy_threshold"),
        ({"seed": 1.5}, TypeError, "seed"),
        ({"seed": 2**64}, ValueError, "seed"),
        ({"step": "0"}, TypeError, "step"),
        ({"seed": torch.tensor(1.0)}, TypeError, "seed"),
        ({"seed": torch.tensor([1])}, ValueError, "seed"),
        ({"step": torch.tensor(1).int()}, TypeError, "step"),
        ({"step": torch.tensor([1])}, ValueError, "step"),
        ({"seed": torch.zeros((), device="meta").long()}, ValueError, "seed"),
        ({"step": torch.zeros((), device="meta").long()}, ValueError, "step"),
        ({"step": torch.zeros(4, device="meta").long()}, ValueError, "step"),
        ({"row_ids": [0, 1, 2, 3]}, TypeError, "row_ids"),
        ({"row_ids": torch.zeros(4)}, TypeError, "row_ids"),
        ({"row_ids": torch.zeros(3).long()}, ValueError, "row_ids"),
        ({"row_ids": torch.zeros(4, device="meta").long()}, ValueError, "row_ids"),
    ],
)
def test_bad_input_is_named(change, error, name):
    with pytest.raises(error, match=name):
        decode_step(**plain(**change))


@pytest.mark.parametrize("name", ["decode_step", "mixing_candidates", "nearest_neighbors"])
def test_what_reads_numbers_on_the_host_stays_out_of_graphs_of_the_compiler(name):
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.ngrpo, name).default.tags


@pytest.mark.parametrize("neighbor", [-1, 5])
def test_neighbors_out_of_range_are_refused(neighbor):
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        decode_step(**plain(neighbor_ids=torch.full((5, 2), neighbor)))
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        candidate_weights(torch.ones(1, 5), torch.tensor([[neighbor]]))


def test_shapes_on_meta():
    arguments = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in plain().items()}
    out = decode_step(**{**arguments, "embedding": arguments["embedding"].half()})
    assert [tuple(x.shape) for x in out] == [(4,), (4,), (4, 3), (4, 3), (4, 3), (4,), (4,), (4,)]
    want = [torch.int64, torch.bool, torch.int64, *[torch.float32, torch.float16], *[torch.float32] * 2, torch.int32]
    assert [x.dtype for x in out] == want


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, implementation):
    a = plain()
    logits, table = a["logits"].to(dtype).T.contiguous().T, a["embedding"].to(dtype)
    counter = {"seed": torch.tensor(3), "step": torch.tensor(4)}
    rows = {"row_ids": torch.arange(4), "temperature": torch.full((4,), 0.7)}
    filters = {
        "top_k": torch.tensor([1, 3, 9, 0]), "top_p": torch.tensor(0.9), "min_p": torch.tensor([0.0, 0.1, 0.5, 1.0]),
    }  # fmt: skip
    gate = {"mixing_rate": 0.5, "enabled": torch.ones(4, dtype=torch.bool)}
    for changes in (
        {
            "neighbor_ids": a["neighbor_ids"],
            "entropy_threshold": 0.1,
            "mixing_temperature": 0.5,
            **rows,
            **filters,
            **gate,
        },
        {"k": 2, "strategy": "gaussian", "variant": "released", "mixing_rate": 1.0, "temperature": torch.tensor(0.7)},
        {"k": 2, "strategy": "moi", **rows, **filters, **gate},
    ):
        settings = settings_of(**counter, **changes)
        torch.library.opcheck(torch.ops.ngrpo.decode_step.default, (logits, table, *settings, implementation))
    for changes, entropy in (
        ({"k": 2, "strategy": "gumbel", "mixing_temperature": 0.5, **rows}, True),
        ({"k": 1, "strategy": "anchor", **rows}, False),
        ({"strategy": "multiplex", **rows, **filters}, True),
    ):
        settings = settings_of(**counter, **changes)
        arguments = (logits, *settings, entropy, implementation)
        torch.library.opcheck(torch.ops.ngrpo.mixing_candidates.default, arguments)
    noise = (table[:4], torch.ones(4), *(torch.arange(4) for _ in range(3)), implementation)
    torch.library.opcheck(torch.ops.ngrpo.gaussian_noise.default, noise)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "triton"])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "mixing_rate": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.01}]
)
def test_compiles(options, implementation):
    torch._dynamo.reset()
    options = {**options, "backend": implementation}

    def call(logits: Tensor, table: Tensor, neighbors: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        return (*decode_step(logits, table, neighbors, seed=1, step=step, **options), step)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for b, v in ((4, 5), (7, 9)):
        a = plain(b, v)
        arguments = (a["logits"], a["embedding"], a["neighbor_ids"], torch.tensor(b))
        assert all(torch.equal(x, y) for x, y in zip(compiled(*arguments), call(*arguments), strict=True))
