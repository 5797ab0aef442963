"""candidate_weights: values, gradients, errors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ngrpo_ops import (
    candidate_weights,
)
from ngrpo_ops.testing import (
    assert_within,
    dtypes,
    generators,
    lay_out,
    layouts,
)


@given(
    shape=st.sampled_from([(), (1,), (4,), (2, 3)]),
    v=st.integers(1, 20),
    k=st.integers(1, 6),
    temperature=st.sampled_from([1.0, 0.7, 0.1, 4.0]),
    variant=st.sampled_from(["paper", "released"]),
    dtype=dtypes,
    layout=layouts,
    generator=generators,
)
def test_candidate_weights(shape, v, k, temperature, variant, dtype, layout, generator):
    logits = lay_out((torch.randn(*shape, v, generator=generator) * 3).to(dtype), layout)
    ids = lay_out(torch.randint(v, (*shape, k), generator=generator), layout)
    got = candidate_weights(logits, ids, temperature=temperature, variant=variant)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for z, c, weights in zip(logits.reshape(-1, v), ids.reshape(-1, k), got.reshape(-1, k), strict=True):
        powers = [math.exp(float(x - z.max()) / temperature) for x in z.double()]
        if variant == "released":
            powers = [math.exp(x / math.fsum(powers)) for x in powers]
        picked = [powers[i] for i in c.tolist()]
        want = torch.tensor([x / math.fsum(picked) for x in picked], dtype=torch.float64)
        if math.fsum(picked) > 1e-30:
            assert_within(weights, want, 1e-6)
    assert_within(got.sum(-1), torch.ones(shape), 1e-6)


def test_candidate_weights_where_the_rest_outweighs_them():
    """Candidates far below the maximum are still compared with each other, and a cut one weighs nothing."""
    logits = torch.tensor([[1e4, 0.0, 1.0, -torch.inf]])
    got = candidate_weights(logits, torch.tensor([[1, 2, 3]]))
    assert_within(got, torch.tensor([[0.0, 1.0, -torch.inf]]).double().softmax(1), 1e-6)
    leaf = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: candidate_weights(z, torch.tensor([[0, 1], [4, 4]])), (leaf,))


@pytest.mark.parametrize(
    ("change", "error", "name"),
    [
        ({"logits": [1.0]}, TypeError, "logits"),
        ({"ids": [0]}, TypeError, "ids"),
        ({"ids": torch.zeros(2, 1)}, TypeError, "ids"),
        ({"ids": torch.zeros(2).long()}, ValueError, "ids"),
        ({"ids": torch.zeros(3, 1).long()}, ValueError, "ids"),
        ({"ids": torch.zeros(2, 0).long()}, ValueError, "ids"),
        ({"ids": torch.zeros(2, 1, device="meta").long()}, ValueError, "ids"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"temperature": math.nan}, ValueError, "temperature"),
        ({"variant": "official"}, ValueError, "variant"),
    ],
)
def test_candidate_weights_bad_input_is_named(change, error, name):
    with pytest.raises(error, match=name):
        candidate_weights(**{"logits": torch.ones(2, 4), "ids": torch.zeros(2, 1).long(), **change})


@pytest.mark.slow
def test_candidate_weights_compiles():
    torch._dynamo.reset()
    compiled = torch.compile(candidate_weights, fullgraph=True, dynamic=True, backend="aot_eager")
    for b, v, temperature in ((4, 5, 1.0), (7, 9, 0.7)):
        logits, ids = torch.randn(b, v), torch.randint(v, (b, 2))
        got = compiled(logits, ids, temperature=temperature)
        torch.testing.assert_close(got, candidate_weights(logits, ids, temperature=temperature))
