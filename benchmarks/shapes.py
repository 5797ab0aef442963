"""The shapes that are measured: vocabularies and widths of models people train."""

from __future__ import annotations

import os

# Vocabularies are divided by this where nothing is timed, and the question is whether a case runs at all.
DIVISOR = int(os.environ.get("NGRPO_OPS_VOCABULARY_DIVISOR", "1"))

QWEN2_5_0_5B = (151_936 // DIVISOR, 896)
QWEN2_5_1_5B = (151_936 // DIVISOR, 1536)
SMALL_VOCABULARY = (32_768 // DIVISOR, 896)
SMOLLM2 = (49_152 // DIVISOR, 576)
TIED_TABLE = (16_384 // DIVISOR, 576)
QUERIES = 2048 // DIVISOR

# Positions of a batch that are mixed, by device: a CPU's share, and a training batch.
POSITIONS = {"cpu": (4096, QWEN2_5_0_5B), "cuda": (131_072, QWEN2_5_1_5B)}
LOGITS_ROWS = {"cpu": 64, "cuda": 8192}
REWARDS = 65_536

# Rows of a decode step.
BATCHES = (1, 64, 256, 1024)


def mix_bytes(n: int, k: int, d: int, itemsize: int) -> int:
    """What a mix must read and write: its rows, ids of 8 bytes and weights of 4, and the mixes."""
    return n * (k + 1) * d * itemsize + n * k * 12


def mix_backward_bytes(n: int, k: int, v: int, d: int, itemsize: int) -> int:
    """What its gradients must: every candidate's row, the gradient twice, and the gradient of the table."""
    return (n * (k + 1) * d + n * d + v * d) * itemsize
