"""The counter-based generator: its words, and what is made of them."""

from __future__ import annotations

import pytest
import torch
from decode_steps import INT64
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from ngrpo_ops.random import bernoulli, gumbel, normal, philox, uniform


def signed(word: int, bits: int = 64) -> int:
    return word - 2**bits if word >= 2 ** (bits - 1) else word


def philox_by_hand(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10 in unbounded integers."""
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [(b >> 32) ^ counter[1] ^ key[0], b % 2**32, (a >> 32) ^ counter[3] ^ key[1], a % 2**32]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter, key, words):
    c, k, want = ([int(w, 16) for w in x.split()] for x in (counter, key, words))
    seed, step, row = (torch.tensor(signed(lo + (hi << 32))) for lo, hi in (k, c[:2], c[2:]))
    assert [int(w) for w in philox(seed, row[None], step)] == want == philox_by_hand(c, k)


@given(seed=INT64, step=INT64, rows=st.lists(INT64, min_size=1, max_size=4))
def test_philox_is_philox(seed, step, rows):
    words = torch.stack(philox(torch.tensor(seed), torch.tensor(rows), torch.tensor(step)), dim=1)
    for row, got in zip(rows, words.tolist(), strict=True):
        counter = [step % 2**32, (step % 2**64) >> 32, row % 2**32, (row % 2**64) >> 32]
        assert got == philox_by_hand(counter, [seed % 2**32, (seed % 2**64) >> 32])


def test_uniform_and_bernoulli_at_their_ends():
    ends = torch.tensor([0, 2**32 - 1])
    assert uniform(ends, ends).tolist() == [0.0, 1 - 2.0**-53]
    assert uniform(torch.tensor(1 << 31), torch.tensor(0)).item() == 0.5
    assert uniform(torch.tensor(0), torch.tensor(1 << 11)).item() == 2.0**-53
    assert bernoulli(ends, 0.0).tolist() == [False, False]
    assert bernoulli(ends, 1.0).tolist() == [True, True]
    assert bernoulli(torch.tensor([2**31 - 1, 2**31]), 0.5).tolist() == [True, False]


@pytest.mark.parametrize(("draw", "name"), [(normal, "norm"), (gumbel, "gumbel_r")])
def test_noise_distribution(draw, name):
    x = draw(torch.tensor(3), torch.arange(1000), torch.tensor(5), 1001)
    assert x.dtype == torch.float32 and x.shape == (1000, 1001) and x.isfinite().all()
    assert kstest(x.flatten().numpy(), name).pvalue > 1e-6
    # Columns, rows, steps and seeds are independent.
    others = [x[:, 1:].flatten(), x[1:].flatten(), draw(torch.tensor(3), torch.arange(1000), torch.tensor(6), 1001)]
    others.append(draw(torch.tensor(4), torch.arange(1000), torch.tensor(5), 1001))
    first = [x[:, :-1].flatten(), x[:-1].flatten(), x.flatten(), x.flatten()]
    for one, other in zip(first, others, strict=True):
        assert abs(torch.corrcoef(torch.stack([one, other.flatten()]))[0, 1]) < 6e-3
