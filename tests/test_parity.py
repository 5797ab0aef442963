"""A trainer's dry run: its mixes, and its verdict."""

from __future__ import annotations

import torch

from ngrpo_ops import MixingConfig
from ngrpo_ops.parity import PLAIN, PLAIN_IDS, REPLAYED, parity_table, strongly_mixed, verdict


def test_the_verdict_of_a_dry_run() -> None:
    far, near, none = torch.full((3,), 0.1), torch.full((3,), 1e-6), torch.empty(0)

    def of(plain: torch.Tensor, replayed: torch.Tensor, plain_ids: torch.Tensor, mixes: bool = True) -> tuple[int, str]:
        return verdict({PLAIN: plain, REPLAYED: replayed, PLAIN_IDS: plain_ids}, mixes)

    assert of(near, near, far)[0] == 0
    assert of(near, near, near, mixes=False)[0] == 0  # a mix of the anchor alone
    for differences, text in (
        ((near, far, far), "NO PARITY"),
        ((near, near * torch.nan, far), "NO PARITY"),
        ((near, near, near), "INCONCLUSIVE"),
        ((near, none, none), "nothing was compared"),
    ):
        status, said = of(*differences)
        assert status == 1 and text in said


def test_the_mixes_of_a_dry_run_are_strong() -> None:
    config = MixingConfig(k=5, mixing_rate=0.0, stop_token_ids=[3], entropy_threshold=9.0, loss_on_mixed_steps=False)
    strong = strongly_mixed(config)
    assert (strong.k, strong.mixing_rate, strong.temperature) == (5, 0.5, 4.0)
    assert strong.stop_token_ids == () and strong.entropy_threshold is None and strong.loss_on_mixed_steps
    assert strongly_mixed(MixingConfig(mixing_rate=1.0, temperature=9.0)).temperature == 9.0


def test_a_row_of_no_tokens_is_no_error() -> None:
    lines = parity_table({PLAIN: torch.tensor([1e-6, 3e-6]), REPLAYED: torch.empty(0)}).splitlines()
    assert lines[1].split()[-3:] == ["2", "2.00e-06", "3.00e-06"] and lines[2].split()[-3:] == ["0", "nan", "nan"]
