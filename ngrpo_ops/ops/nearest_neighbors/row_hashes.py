"""Which rows of a table have the values of another row."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...random import philox

_HASHED_ELEMENTS = 2**22  # elements of the table hashed together
_SAMPLED_COLUMNS = 16  # of every row; only rows that agree in them are hashed
_MULTIPLIER = 0x2545F4914F6CDD1D  # odd, so that multiplying by it loses nothing
_SEED = 20  # of the hash's constants, which must be the same on every rank


def row_hashes(rows: Tensor) -> Tensor:
    """int64 [n, 2]: 128 bits of each row's values in float32, as which rows are scored. 0.0 and -0.0 are one value.

    Integer arithmetic alone is done with the values' bits, so that devices and ranks agree. Two different rows have one
    hash with a probability of about 2^-124.

    Args:
        rows: [n, d], floating point.
    """
    keys = _keys(rows.shape[1], rows.device)
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
    group = _groups(hashes)
    counts = torch.zeros_like(group).scatter_add_(0, group, torch.ones_like(group))  # bincount would wait for a GPU
    return (counts > 1)[group]


def _groups(hashes: Tensor) -> Tensor:
    """int64 [n]: a number for each hash [n, 2], the same for equal ones. Many times faster than unique with a dim."""
    order = hashes[:, 1].argsort()
    order = order[hashes[order, 0].argsort(stable=True)]
    is_new = (hashes[order[1:]] != hashes[order[:-1]]).any(1)
    number = torch.nn.functional.pad(is_new.long().cumsum(0), (1, 0))
    return torch.empty_like(order).index_copy_(0, order, number)


def suspected_rows(rows: Tensor) -> Tensor:
    """bool [n]: the rows that agree with another row in a few columns. All equal rows are among them."""
    d = rows.shape[1]
    chosen = torch.arange(_SAMPLED_COLUMNS, device=rows.device) * d // _SAMPLED_COLUMNS
    return equal_rows(row_hashes(rows[:, chosen]))


def first_equal_rows(rows: Tensor, suspected: Tensor) -> Tensor | None:
    """int64 [n]: the first row with the values of each row; None: no two rows are equal.

    The suspected rows are hashed, and compared with the row that they seem equal to.

    Args:
        rows: [n, d], floating point.
        suspected: bool [n], as `suspected_rows` returns it.
    """
    n, d = rows.shape
    suspects = suspected.nonzero().squeeze(1)
    if not suspects.numel():
        return None
    group = _groups(row_hashes(rows[suspects]))
    first = torch.full((suspects.numel(),), n, device=rows.device).scatter_reduce(0, group, suspects, "amin")[group]
    is_equal = first != suspects
    for part in is_equal.nonzero().squeeze(1).split(max(1, _HASHED_ELEMENTS // max(1, d))):
        is_equal[part] = (rows[suspects[part]].float() == rows[first[part]].float()).all(1)
    if not bool(is_equal.any()):
        return None
    return torch.arange(n, device=rows.device).index_copy(0, suspects, torch.where(is_equal, first, suspects))


@functools.lru_cache(maxsize=8)
def _keys(width: int, device: torch.device) -> Tensor:
    """int64 [2, 2, d]: for both halves of a hash a mask and an odd factor of each column."""
    columns = torch.arange(width, device="cpu")
    keys = []
    for half in range(2):
        words = philox(torch.tensor(_SEED, device="cpu"), torch.tensor(half, device="cpu"), columns)
        keys.append(torch.stack([words[0] << 32 | words[1], words[2] << 32 | words[3] | 1]))
    return torch.stack(keys).to(device)
