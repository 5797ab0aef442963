"""gaussian_noise: drawn again from its counters."""

from __future__ import annotations

import pytest
import torch

from ngrpo_ops import (
    decode_step,
    gaussian_noise,
    mix_embeddings,
)
from ngrpo_ops.random import normal
from ngrpo_ops.testing import (
    DEVICE,
    assert_within,
    rounding,
)


def test_the_device_of_noise_seeds_is_named():
    mixed, rows = torch.ones(3, 4), torch.zeros(3).long()
    for seed in (torch.zeros((), device="meta").long(), torch.zeros(3, device="meta").long()):
        with pytest.raises(ValueError, match="seed is on meta"):
            gaussian_noise(mixed, 0.1, seed=seed, row_ids=rows, steps=rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gaussian_noise_is_drawn_again(backend, dtype):
    """The embedding of a step and the same noise put on its mix: what a replay does."""
    generator = torch.Generator().manual_seed(0)
    b, v, d, scale = 6, 50, 301, 0.5
    table = torch.randn(v, d, generator=generator).to(dtype).to(DEVICE)
    rows = torch.arange(b, device=DEVICE) + 2**40
    out = decode_step(
        torch.randn(b, v, generator=generator).to(DEVICE), table, strategy="gaussian", k=3, mixing_rate=0.6,
        noise_scale=scale, seed=-3, step=7, row_ids=rows, backend=backend,
    )  # fmt: skip
    gate = out.gate
    assert gate.any() and not gate.all() and torch.equal(out.embeddings[~gate], table[out.token_ids[~gate]])
    mixed = mix_embeddings(table, out.ids, out.weights, backend=backend)[gate]
    steps = torch.full_like(rows[gate], 7)
    again = gaussian_noise(mixed, scale, seed=-3, row_ids=rows[gate], steps=steps, backend=backend)
    by_hand = normal(torch.tensor(-3), rows[gate].cpu(), steps.cpu(), d).to(DEVICE).double()
    by_hand = mixed.double() + scale * mixed.double().square().mean(1, keepdim=True).sqrt() * by_hand
    for embedded in (out.embeddings[gate], again):
        assert_within(embedded, by_hand, 4e-6 + 2 * rounding(by_hand, dtype, backend))
    shifted = gaussian_noise(mixed, scale, seed=-3, row_ids=rows[gate], steps=steps + 1, backend=backend)
    assert (shifted != again).float().mean() > 0.9


def test_gaussian_noise_is_a_constant_to_the_gradient(backend):
    mixed = torch.randn(3, 7, device=DEVICE, requires_grad=True)
    ids = torch.arange(3, device=DEVICE)
    scales, seeds = torch.tensor([0.0, 0.5, 1.0], device=DEVICE), torch.tensor([1, 2, 3], device=DEVICE)
    out = gaussian_noise(mixed, scales, seed=seeds, row_ids=ids, steps=ids, backend=backend)
    assert torch.equal(out[0], mixed[0]) and not torch.equal(out[1], mixed[1])
    out.sum().backward()
    assert torch.equal(mixed.grad, torch.ones_like(mixed))
    assert gaussian_noise(mixed[:0], 1.0, seed=0, row_ids=ids[:0], steps=ids[:0]).shape == (0, 7)
