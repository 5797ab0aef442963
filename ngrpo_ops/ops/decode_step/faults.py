"""What can be wrong with a row of a decode step: bits that the device sets and the host reads once, at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import require_ids, require_shape, require_tensor

NOT_A_NUMBER, NO_TOKEN, NO_SUCH_CANDIDATE, BAD_IDS, BAD_WEIGHTS = 1, 2, 4, 8, 16
FAULTS = {
    NOT_A_NUMBER: "its logits hold NaN or +inf",
    NO_TOKEN: "all of its logits are -inf",
    NO_SUCH_CANDIDATE: "a neighbor of its anchor is outside the vocabulary",
    BAD_IDS: "its strategy returned ids outside the vocabulary",
    BAD_WEIGHTS: "its strategy returned weights that are negative, not finite or do not sum to 1",
}


def raise_faults(fault: Tensor, *, row_ids: Tensor | None = None) -> None:
    """Raises if a decode step had a row for which no token could be chosen. Reads `fault` once: the host waits here.

    Args:
        fault: int32 [B] or [B, T], the faults of one step or of all steps of a generation.
        row_ids: int64 [B], to name the rows by; None: their place.

    Raises:
        TypeError, ValueError: an argument of another dtype or shape, by name.
        RuntimeError: the first faulty row and step of those there are, and what is wrong with it.

    Examples:
        >>> import torch
        >>> from ngrpo_ops import raise_faults
        >>> raise_faults(torch.tensor([0, 0]))
        >>> raise_faults(torch.tensor([0, 2]), row_ids=torch.tensor([10, 11]))
        Traceback (most recent call last):
        RuntimeError: no token could be chosen at row 11: all of its logits are -inf
    """
    require_tensor(fault, "fault")
    if fault.dtype not in (torch.int32, torch.int64) or fault.dim() not in (1, 2) or fault.is_meta:
        got = f"{fault.dtype} of shape {tuple(fault.shape)} on {fault.device}"
        raise TypeError(f"fault must be int32 [B] or [B, T], with values, got {got}")
    if row_ids is not None:
        require_ids(row_ids, "row_ids")
        require_shape(row_ids, tuple(fault.shape[:1]), "row_ids", "[B]")
        if row_ids.is_meta:
            raise ValueError("row_ids must have values, got a tensor on device meta")
    steps = fault[:, None] if fault.dim() == 1 else fault
    faulty = steps.nonzero().tolist()
    if not faulty:
        return
    row, step = min(faulty, key=lambda place: place[::-1])
    reasons = "; ".join(text for bit, text in FAULTS.items() if int(steps[row, step]) & bit)
    where = f"row {row if row_ids is None else int(row_ids[row])}" + (f", step {step}" if fault.dim() == 2 else "")
    more = f" (and {len(faulty) - 1} more)" if len(faulty) > 1 else ""
    raise RuntimeError(f"no token could be chosen at {where}{more}: {reasons}")
