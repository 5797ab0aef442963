"""The fuzz itself: two minutes of it with a fixed seed, and a fault that is planted for it to find."""

from __future__ import annotations

import fuzz
import pytest
import torch

import ngrpo_ops


@pytest.mark.slow
def test_two_minutes_of_public_calls() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ends = fuzz.fuzz(seconds=120, seed=20, calls=25_000)  # no more on a faster machine: the same calls everywhere
    finally:
        torch.set_num_threads(threads)
    assert ends["right"] > 1000 and ends["refused"] > 100


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        ("candidate_weights", lambda found: found * 1.001),
        ("mix_embeddings", lambda found: found + 1e-3 * found.detach().abs().max()),
        ("selective_log_softmax", lambda found: (found[0], found[1] * 1.01)),
        ("group_advantages", lambda found: found * 1.001),
        ("nearest_neighbors", lambda found: found._replace(ids=found.ids.flip(1))),
        ("decode_step", lambda found: found._replace(token_ids=found.token_ids * 0)),
        ("gaussian_noise", lambda found: found * 1.5),
    ],
)
def test_a_planted_fault_is_found(name: str, plant, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(ngrpo_ops, name)
    monkeypatch.setattr(fuzz, "CALLS", {name: fuzz.CALLS[name]})
    monkeypatch.setattr(ngrpo_ops, name, lambda **arguments: plant(right(**arguments)))
    with pytest.raises(SystemExit, match=f"^{name}: .*again: python tests/fuzz.py --seed 0 --only|^{name}: "):
        fuzz.fuzz(seconds=30, seed=0)
