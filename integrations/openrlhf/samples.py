"""The records of OpenRLHF's samples: what a forward embeds, what is logged. Runs in Ray's workers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ngrpo_ops.metrics import (
    REPLAY_ERROR,
    REPLAY_OUTLIERS,
    replay_errors,
    replay_tolerance,
    rollout_metrics,
    rollout_sums,
    sample_replay_sums,
)
from ngrpo_ops.record import SparseRecord
from ngrpo_ops.rollout import Overlay, replay_overlay


def make_overlay(
    records: Sequence[SparseRecord], attention_mask: Tensor, packed: bool, group: Any = None
) -> Overlay | None:
    """What a forward of B samples embeds at its mixed positions, which count through its flattened ids; None: none.

    Args:
        records: the records of the B rows.
        attention_mask: [B, L], of rows padded on the right.
        packed: whether the forward has all rows in one, without the padding.
        group: the process group that shares a packed forward (ring attention); each rank has a slice. None: the whole
            forward runs in this process.

    Examples:
        >>> import torch
        >>> from ngrpo_ops.integrations.openrlhf.samples import make_overlay
        >>> from ngrpo_ops.record import SparseRecord
        >>> ids, weights, logprobs = torch.tensor([[7, 8]]), torch.tensor([[0.5, 0.5]]), torch.zeros(2)
        >>> records = [SparseRecord(1, torch.tensor([step]), ids, weights, logprobs) for step in (0, 1)]
        >>> attention_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])
        >>> make_overlay(records, attention_mask, packed=False).positions.tolist()
        [1, 7]
        >>> make_overlay(records, attention_mask, packed=True).positions.tolist()
        [1, 5]
    """
    lengths = attention_mask.sum(1)
    rows = torch.arange(len(records), device=lengths.device)
    starts = lengths.cumsum(0) - lengths if packed else rows * attention_mask.shape[1]
    overlay = replay_overlay(records, starts)
    if overlay is None or not packed or group is None:
        return overlay
    # OpenRLHF pads the packed row to a multiple of the group's size and gives each rank a slice.
    size = torch.distributed.get_world_size(group)
    return overlay.in_slice(torch.distributed.get_rank(group), length=-(-int(lengths.sum()) // size))


def action_ranges(record: SparseRecord) -> list[tuple[int, int]]:
    """The generated tokens that were not mixed, as OpenRLHF's ranges of tokens that enter the loss.

    Examples:
        >>> import torch
        >>> from ngrpo_ops.integrations.openrlhf.samples import action_ranges
        >>> from ngrpo_ops.record import SparseRecord
        >>> ids, weights = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2) / 2
        >>> action_ranges(SparseRecord(5, torch.tensor([1]), ids, weights, logprobs=torch.zeros(4)))
        [(5, 6), (7, 9)]
    """
    bounds = [-1, *record.steps.tolist(), len(record.logprobs)]
    ranges = [(record.first + a + 1, record.first + b) for a, b in itertools.pairwise(bounds)]
    return [(start, end) for start, end in ranges if start < end]


def experience_metrics(experiences: Sequence[Any]) -> dict[str, float]:
    """The metrics of a whole rollout, once the policy has scored it; `ngrpo_ops.metrics` says what they mean.

    Args:
        experiences: OpenRLHF's, with records in `mm_train_inputs` and the policy's log-probabilities in
            `action_log_probs`.

    Examples:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> from ngrpo_ops.integrations.openrlhf.samples import experience_metrics
        >>> from ngrpo_ops.record import SparseRecord
        >>> ids, weights = torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[0.75, 0.25]])
        >>> record = SparseRecord(1, torch.tensor([0]), ids, weights, logprobs=torch.zeros(2))
        >>> scored = torch.tensor([[0.0, -0.5]])
        >>> experience = SimpleNamespace(
        ...     mm_train_inputs=[record], action_log_probs=scored, action_mask=torch.ones(1, 2)
        ... )
        >>> for name, value in experience_metrics([experience]).items():
        ...     print(name, value)
        mix/gated_share 0.5
        mix/anchor_differs 0.0
        mix/anchor_weight 0.75
        mix/replay_error 0.5
        mix/replay_outliers 1.0
    """
    sums = torch.zeros(4, dtype=torch.float64, device="cpu")
    replayed = []
    tolerance = replay_tolerance(torch.bfloat16)  # OpenRLHF's default; its engine rounds so in any case
    for experience in experiences:
        for row, record in enumerate(experience.mm_train_inputs):
            tokens = len(record.logprobs)
            sums += rollout_sums(record, tokens)
            # Column j of OpenRLHF's scores belongs to the token at position j + 1.
            columns = slice(record.first - 1, record.first - 1 + tokens)
            scored, compared = experience.action_log_probs[row, columns], experience.action_mask[row, columns]
            replayed.append(sample_replay_sums(record, scored, compared, tolerance))
    errors = replay_errors(torch.stack(replayed))
    return {**rollout_metrics(sums), REPLAY_ERROR: errors.largest, REPLAY_OUTLIERS: errors.outliers}
