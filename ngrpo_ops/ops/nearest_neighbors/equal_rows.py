"""Which rows of a table have the values of another row. No pair is compared: rows are equal where their hashes are."""

from __future__ import annotations

import torch
from torch import Tensor

from ...random import philox

_HASHED_ELEMENTS = 2**22  # elements of the table hashed together
_MULTIPLIER = 0x2545F4914F6CDD1D  # odd, so that multiplying by it loses nothing
_SEED = 20  # of the hash's constants, which must be the same on every rank


def row_hashes(rows: Tensor) -> Tensor:
    """int64 [n, 2]: 128 bits of each row's values in float32, as which rows are scored. 0.0 and -0.0 are one value.

    Integer arithmetic alone is done with the values' bits, so that devices and ranks agree. Two different rows have one
    hash with a probability of about 2^-124.

    Args:
        rows: [n, d], floating point.
    """
    keys = _keys(rows.shape[1]).to(rows.device)
    hashes = torch.empty(rows.shape[0], 2, dtype=torch.int64, device=rows.device)
    size = max(1, _HASHED_ELEMENTS // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], size):
        values = rows[start : start + size].float()
        bits = torch.where(values == 0, 0.0, values).view(torch.int32).long()
        for half in range(2):
            mask, factor = keys[half]
            # Each element is spread over 64 bits one to one, so that a change of one element always changes the sum.
            words = (bits ^ mask) * _MULTIPLIER
            words ^= (words >> 32) & 0xFFFFFFFF
            hashes[start : start + size, half] = (words * factor).sum(1)
    return hashes


def equal_rows(hashes: Tensor) -> Tensor:
    """bool [V]: the rows whose hash another row has too. All rows of such a group are among them."""
    _, group, count = torch.unique(hashes, dim=0, return_inverse=True, return_counts=True)
    return count[group] > 1


def _keys(width: int) -> Tensor:
    """int64 [2, 2, d]: for both halves of a hash a mask and an odd factor of each column."""
    columns = torch.arange(width, device="cpu")
    keys = []
    for half in range(2):
        words = philox(torch.tensor(_SEED, device="cpu"), torch.tensor(half, device="cpu"), columns)
        keys.append(torch.stack([words[0] << 32 | words[1], words[2] << 32 | words[3] | 1]))
    return torch.stack(keys)
