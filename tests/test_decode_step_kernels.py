"""The kernels of decode_step against the oracle."""

from __future__ import annotations

import pytest
import torch
from decode_steps import INT64, on, plain, settings_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ngrpo_ops import (
    decode_step,
)
from ngrpo_ops.kernels.primitives import forced_int64, recording
from ngrpo_ops.ops._library import load_kernels as kernels
from ngrpo_ops.random import bernoulli, philox
from ngrpo_ops.testing import (
    DEVICE,
    FLOATS,
    STRATEGIES,
    assert_within,
    generators,
    lay_out,
    layouts,
    rounding,
)


@st.composite
def wide_steps(draw: st.DrawFn) -> dict:
    """Steps over several pieces of the vocabulary, with ties at the cuts and every setting."""
    generator, b, v, d = (
        draw(generators),
        draw(st.integers(1, 6)),
        draw(st.integers(900, 3300)),
        draw(st.integers(1, 150)),
    )
    k = draw(st.integers(1, 6))
    strategy = draw(st.sampled_from(STRATEGIES))
    scale = draw(st.sampled_from([0.0, 0.3, 3.0, 30.0]))
    logits = (torch.randn(b, v, generator=generator, dtype=torch.float64) * scale).round(
        decimals=draw(st.integers(0, 3))
    )
    if draw(st.booleans()):
        cut = torch.rand(b, v, generator=generator) < draw(st.sampled_from([0.3, 0.999]))
        cut[:, draw(st.integers(0, v - 1))] = False
        logits = logits.masked_fill(cut, -torch.inf)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    per_row = st.booleans()

    def setting(values: list) -> object:
        if draw(per_row):
            chosen = [draw(st.sampled_from(values)) for _ in range(b)]
            return None if None in chosen else torch.tensor(chosen)
        return draw(st.sampled_from([None, *values]))

    temperature, table = setting([1.0, 0.7, 2.5, 0.0]), torch.randn(v, d, generator=generator)
    return {
        "logits": lay_out(logits.to(dtype), draw(layouts)),
        "embedding": lay_out(table.to(draw(st.sampled_from(FLOATS[1:]))), draw(layouts)),
        "neighbor_ids": torch.randint(v, (v, k - 1), generator=generator) if strategy == "neighbor" else None,
        "strategy": strategy,
        "k": None if strategy in ("neighbor", "anchor") else k,
        "moi_beta": draw(st.sampled_from([None, 0.0, 3.0])) if strategy == "moi" else None,
        "mixing_rate": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "temperature": 1.0 if temperature is None else temperature,
        "mixing_temperature": draw(st.sampled_from([None, 0.5])),
        "top_k": setting([1, 3, 50, v]),
        "top_p": setting([0.3, 0.9, 1.0]),
        "min_p": setting([0.001, 0.2]),
        "enabled": torch.rand(b, generator=generator) < 0.8 if draw(per_row) else None,
        "seed": draw(INT64),
        "step": draw(st.integers(0, 2**40)),
        "row_ids": torch.randint(2**62, (b,), generator=generator),
    }  # fmt: skip


near_a_boundary = [0, 0]  # draws whose token differs from the oracle's, and draws


@given(arguments=wide_steps())
@settings(max_examples=30)
def test_kernel_against_oracle(arguments):
    """Gates, candidates and faults the same; tokens too, unless the draw lies within rounding of a token's edge."""
    ours, oracle = (decode_step(**on(backend, arguments)) for backend in ("triton", "eager"))
    a = on("triton", arguments)
    double = decode_step(**{**a, "backend": "eager", "logits": a["logits"].double()})
    assert torch.equal(ours.gate, oracle.gate) and torch.equal(ours.fault, oracle.fault)
    same = ours.token_ids == oracle.token_ids
    if arguments["strategy"] == "multiplex":  # each candidate is a draw
        same = (ours.ids == oracle.ids).all(1)
    elif arguments["strategy"] != "gumbel":  # of which two may weigh the same to the last bit
        assert torch.equal(ours.ids[same], oracle.ids[same])
    near_a_boundary[0] += int((~same).sum())
    near_a_boundary[1] += same.numel()
    assert near_a_boundary[0] <= 1 + near_a_boundary[1] // 100
    for row in (~same).nonzero()[:, 0].tolist():
        draws = [[step.token_ids[row], *(step.ids[row] if arguments["strategy"] == "multiplex" else [])]
                 for step in (ours, oracle)]  # fmt: skip
        for one, other in zip(*draws, strict=True):
            if one != other:
                assert_neighboring_draws(a, row, int(one), int(other))
    z = torch.where(a["logits"].isinf(), 0, a["logits"].double()).abs().amax(1).clamp(min=1)
    roundoff = 4e-7 * z[same] / 0.3
    if arguments["strategy"] != "gumbel":
        assert_within(ours.weights[same], double.weights[same], 1e-6 + roundoff[:, None])
    assert_within(ours.entropy[same], double.entropy[same], 2e-5 + 20 * roundoff)
    assert_within(ours.logprobs[same], double.logprobs[same], 2e-5 + 2 * roundoff)
    exact = torch.where(
        ours.gate[:, None],
        (ours.weights.double()[..., None] * a["embedding"].double()[ours.ids]).sum(1),
        a["embedding"].double()[ours.token_ids],
    )
    if arguments["strategy"] != "gaussian":
        assert_within(ours.embeddings, exact, 4e-6 + rounding(exact, a["embedding"].dtype, "triton"))


def assert_neighboring_draws(a: dict, row: int, one: int, other: int) -> None:
    """Between the two tokens there is next to no mass, so either edge is within rounding of the draw."""
    low, high = sorted((one, other))
    t = a["temperature"]
    t = float(t[row] if isinstance(t, Tensor) else t)
    p = (a["logits"][row].double() / t).softmax(0)
    assert p[low + 1 : high].sum() < 1e-4 and p[one] > 0 and p[other] > 0


@pytest.mark.slow
def test_words_of_the_kernel_are_philox():
    """Through the gate: at every rate the same rows, for keys and counters of all 64 bits."""
    generator = torch.Generator().manual_seed(0)
    for seed, step in ((0, 0), (-1, 2**40 + 5), (2**63 - 1, 3), (-(2**63), -1)):
        rows = torch.randint(-(2**63), 2**63 - 1, (64,), generator=generator)
        word = philox(torch.tensor(seed), rows, torch.tensor(step))[0]
        for rate in (0.1, 0.5, 0.9):
            out = decode_step(
                torch.zeros(64, 3, device=DEVICE), None, strategy="anchor", mixing_rate=rate, backend="triton",
                seed=torch.tensor(seed, device=DEVICE), step=torch.tensor(step, device=DEVICE), row_ids=rows.to(DEVICE),
            )  # fmt: skip
            assert torch.equal(out.gate.cpu(), bernoulli(word, rate))


@pytest.mark.slow
@given(generator=generators, dtype=st.sampled_from(FLOATS[1:]), layout=layouts)
def test_64_bit_kernels_agree(generator, dtype, layout):
    a = plain(3, 1500, top_p=0.8)
    a["logits"], a["embedding"] = (lay_out(a[name].to(dtype), layout) for name in ("logits", "embedding"))
    a["seed"] = int(torch.randint(1000, (), generator=generator))
    for strategy in ({}, {"strategy": "multiplex", "neighbor_ids": None, "k": 3}):
        narrow = decode_step(**on("triton", a | strategy))
        with forced_int64():
            wide = decode_step(**on("triton", a | strategy))
        assert all(torch.equal(x, y) for x, y in zip(wide, narrow, strict=True))


def test_offsets_are_64_bits_wide_where_they_must_be():
    """On meta tensors: too many logits, a table too large, a neighbor table too large."""

    def launched(b: int = 4, v: int = 1000, d: int = 8, k: int = 3, strategy: str = "neighbor") -> list[bool]:
        meta = {"device": "meta"}
        zero = torch.tensor(0)
        neighbors = torch.empty(v, k - 1, dtype=torch.int64, **meta) if strategy == "neighbor" else None
        with recording() as launches:
            settings = settings_of(
                neighbor_ids=neighbors, k=k, strategy=strategy, temperature=zero + 1.0, top_k=zero + 5, mixing_rate=0.1
            )
            kernels("decode_step").decode_step(torch.empty(b, v, **meta), torch.empty(v, d, **meta), settings)
        return [launch.arguments["INT64"] for launch in launches]

    assert launched() == [False] * 4  # partials, gather, filter, choice
    assert launched(b=20_000, v=262_144) == [True] * 4
    assert launched(v=262_144, d=8200) == [False, False, False, True]
    assert launched(strategy="moi") == [False] * 5
    assert launched(b=20_000, v=262_144, strategy="multiplex") == [True] * 5


@pytest.mark.slow
def test_two_launches_four_with_a_cut_and_no_other_work():
    """The launches of a step, and that nothing depends on the values: a CUDA graph could hold it."""
    a = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in plain(4, 1000).items()}
    tensors = {"seed": torch.empty((), dtype=torch.int64, device="meta")}
    tensors["step"] = tensors["seed"]
    for cut, names in (
        ({}, ["partials", "choice"]),
        ({"top_k": 5, "top_p": 0.5}, ["partials", "gather", "filter", "choice"]),
    ):
        with recording() as launches:
            filters = {name: torch.tensor(value) for name, value in cut.items()}
            settings = settings_of(neighbor_ids=a["neighbor_ids"], mixing_rate=0.1, **filters, **tensors)
            kernels("decode_step").decode_step(a["logits"], a["embedding"], settings)
        assert [launch.kernel.__name__ for launch in launches] == [f"decode_{name}_kernel" for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("cuts", [{"top_k": 300}, {"top_p": 0.9}, {"min_p": 0.01}, {"top_k": 9, "top_p": 0.5}], ids=str)
@pytest.mark.parametrize("scale", [0.0, 2.5, 40.0])
def test_too_many_candidates_are_searched_for_in_the_row(cuts, scale, monkeypatch):
    """With room for a few candidates, with room for all of them and without the kernel: the same tokens."""
    a = plain(6, 2500, strategy="anchor", neighbor_ids=None, mixing_rate=0.0, seed=3, **cuts)
    a["logits"] = (scale * a["logits"]).to(torch.bfloat16)
    a["logits"][0, ::3], a["logits"][1, 7] = -torch.inf, 100.0  # a token far above all others of its piece
    tokens = []
    for room in (16, 16384):
        monkeypatch.setattr(kernels("decode_step"), "CANDIDATES", room)
        tokens.append([decode_step(**on("triton", a | {"step": step})).token_ids for step in range(2)])
    tokens.append([decode_step(**on("eager", a | {"step": step})).token_ids for step in range(2)])
    assert all(torch.equal(x, y) for found in tokens[1:] for x, y in zip(tokens[0], found, strict=True))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="a CUDA graph needs a GPU (NGRPO_OPS_TEST_DEVICE=cuda)")
@pytest.mark.parametrize("cuts", [{}, {"top_k": 20, "top_p": 0.9, "min_p": 0.01}])
def test_a_captured_graph_goes_on_with_its_step(cuts):
    a = on("triton", plain(32, 5000, mixing_rate=0.3, **cuts))
    a["seed"], a["step"] = (torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(2))
    decode_step(**a)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_step(**a)
    for step in range(5):
        a["step"].fill_(step)
        a["logits"].normal_()
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(out, decode_step(**a), strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("fault", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_a_row_at_fault_writes_into_its_own_row_alone(
    strategy: str, fault: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the launcher allocates lies between two guards, and rows at fault come first, between and last."""
    size, guards = 64, []
    empty = torch.empty

    def guarded(*shape: object, **keywords: object) -> Tensor:
        count = empty(*shape, device="meta").numel()  # type: ignore[call-overload]
        whole = torch.full((count + 2 * size,), 77, **keywords)  # type: ignore[call-overload]
        guards.extend((guard, guard.clone()) for guard in (whole[:size], whole[size + count :]))
        return whole[size : size + count].view(empty(*shape, device="meta").shape)  # type: ignore[call-overload]

    torch.manual_seed(0)
    logits, k = torch.randn(5, 40), 1 if strategy == "anchor" else 3
    logits[torch.tensor([0, 2, 4])] = fault
    neighbor_ids = torch.randint(40, (40, k - 1)) if strategy == "neighbor" else None
    arguments = {
        "logits": logits, "embedding": torch.eye(40), "neighbor_ids": neighbor_ids, "strategy": strategy, "k": k,
        "seed": 1, "step": 2, "mixing_rate": 1.0,
    }  # fmt: skip
    expected = decode_step(**arguments, backend="eager")
    monkeypatch.setattr(torch, "empty", guarded)
    found = decode_step(**on("triton", arguments))
    monkeypatch.undo()
    assert len(guards) > 3
    assert all(torch.equal(guard, before) for guard, before in guards)
    assert torch.equal(found.ids.cpu()[[1, 3]], expected.ids[[1, 3]])
    assert found.fault.cpu().ne(0).tolist() == [True, False, True, False, True]
