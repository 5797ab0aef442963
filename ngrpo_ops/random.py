"""Counter-based random numbers: Philox 4x32-10 (Salmon et al., SC 2011) in integer torch arithmetic.

The key is the seed, the counter is (step, row id): the same bits on every device, for every batch size and order of
the rows, and torch's global generators are never touched. A stream other than 0 has a key of its own: stream 0 draws
the gate and the sample of a step, the streams from 1 on its noise, or the further draws of "multiplex".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_STREAM = 0x85EBCA6B  # odd: no two streams share a key


def philox(
    seed: Tensor, row_ids: Tensor, step: Tensor, stream: Tensor | int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four independent 32-bit words for every row.

    Args:
        seed: int64, the key.
        row_ids: int64, the high 64 bits of the counter.
        step: int64, the low 64 bits of the counter.
        stream: int64 in [0, 2^31), xored into the key's high word times an odd constant.

    Returns:
        Four int64 tensors of the shape that the arguments broadcast to, with values in [0, 2^32).
    """
    words = [step & _MASK, (step >> 32) & _MASK, row_ids & _MASK, (row_ids >> 32) & _MASK]
    x0, x1, x2, x3 = torch.broadcast_tensors(*words)
    key0, key1 = seed & _MASK, ((seed >> 32) ^ (stream * _STREAM)) & _MASK
    for _ in range(10):
        # A 32 x 32 bit product wraps in int64, but its 64 bits are the right ones: >> 32 and the mask undo the sign.
        product0, product1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            ((product1 >> 32) & _MASK) ^ x1 ^ key0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ x3 ^ key1,
            product0 & _MASK,
        )
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return x0, x1, x2, x3


def drawn_words(probability: float) -> int:
    """How many of the 2^32 words `bernoulli` takes for True: 0 for a probability below its resolution, 2^32 for 1."""
    return round(probability * 2**32)


def bernoulli(word: Tensor, probability: float) -> Tensor:
    """True with the given probability: an integer comparison, so that no device rounds it differently.

    Args:
        word: int64 in [0, 2^32), from `philox`.
        probability: in [0, 1]; 0 never and 1 always gives True.
    """
    return word < drawn_words(probability)


def gates(seed: Tensor, row_ids: Tensor, step: Tensor, rate: float) -> Tensor:
    """bool: which rows the rate draws at a step, over the shape that seed, row ids and step broadcast to."""
    return bernoulli(philox(seed, row_ids, step)[0], rate)


def uniform(high: Tensor, low: Tensor) -> Tensor:
    """float64 in [0, 1) with 53 random bits, from two words of `philox`."""
    return ((high << 21) | (low >> 11)).double() * 2.0**-53


def uniforms(seed: Tensor, row_ids: Tensor, step: Tensor, count: int, first_stream: int = 1) -> list[Tensor]:
    """`count` of them for every row, [B] each: the first that of the step's sample, the others of further streams."""
    _, high, low, _ = philox(seed, row_ids, step)
    pairs = [(high, low)]
    for stream in range(first_stream, first_stream + count // 2):
        words = philox(seed, row_ids, step, stream)
        pairs += [words[:2], words[2:]]
    return [uniform(*pair) for pair in pairs[:count]]


def open_uniform(word: Tensor) -> Tensor:
    """float64 strictly within (0, 1), from one word: 23 bits, so that float32 holds it and its logarithm exists."""
    return ((word >> 9).double() + 0.5) * 2.0**-23


def gumbel(seed: Tensor, row_ids: Tensor, step: Tensor, count: int, first_stream: int = 1) -> Tensor:
    """Standard Gumbel numbers [..., count], float32, over the shape that the arguments broadcast to."""
    return -(-_noise_uniforms(seed, row_ids, step, count, first_stream).log()).log().float()


def normal(seed: Tensor, row_ids: Tensor, step: Tensor, count: int, first_stream: int = 1) -> Tensor:
    """Standard normal numbers [..., count], float32: the inverse of their distribution function at a word's uniform."""
    return (math.sqrt(2) * torch.erfinv(2 * _noise_uniforms(seed, row_ids, step, count, first_stream) - 1)).float()


def _noise_uniforms(seed: Tensor, row_ids: Tensor, step: Tensor, count: int, first_stream: int) -> Tensor:
    streams = first_stream + torch.arange(-(-count // 4), device=row_ids.device)
    words = philox(seed[..., None], row_ids[..., None], step[..., None], streams)
    return open_uniform(torch.stack(words, dim=-1).flatten(-2)[..., :count])
