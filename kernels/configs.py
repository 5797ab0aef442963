"""Launch configurations: one pinned for each kernel and row width, and what the opt-in autotuner may try.

A pinned configuration is chosen by the width of a row alone, so that results do not depend on timings. Under the
interpreter, whose time goes by tile operations, tiles are as large as the input.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from triton import Config, next_power_of_2

HIP_STAGES = 2


def _config(num_warps: int, num_stages: int = 2, registers: int | None = None, **blocks: int) -> Config:
    """`registers` a thread, at most: ptxas otherwise spills a few bytes for an occupancy that a short kernel has no use
    for. AMD's compiler has no such setting, and its shared memory room for two stages."""
    if torch.version.hip:
        return Config(blocks, num_warps=num_warps, num_stages=min(num_stages, HIP_STAGES))
    return Config(blocks, num_warps=num_warps, num_stages=num_stages, maxnreg=registers)


# kernel: ((largest width, configuration), ...), the last for every wider row.
PINNED: dict[str, tuple[tuple[int, Config], ...]] = {
    "mix_forward_kernel": (
        (256, _config(4, BLOCK_N=8, BLOCK_D=256)),
        (1024, _config(4, BLOCK_N=2, BLOCK_D=1024)),
        (2**31, _config(4, BLOCK_N=1, BLOCK_D=1024)),
    ),
    "mix_grad_weights_kernel": (
        (256, _config(4, BLOCK_N=4, BLOCK_D=256)),
        (2**31, _config(4, BLOCK_N=2, BLOCK_D=512)),
    ),
    "mix_keys_kernel": ((2**31, _config(4, BLOCK_M=1024)),),
    "mix_offsets_kernel": ((2**31, _config(4, BLOCK_V=256)),),
    "mix_grad_embedding_kernel": ((2**31, _config(4, BLOCK_V=8, BLOCK_D=256)),),
    "mix_grad_long_segments_kernel": ((2**31, _config(4, BLOCK_M=16, BLOCK_D=256)),),
    "mix_grad_merge_kernel": ((2**31, _config(4, BLOCK_M=32, BLOCK_D=128)),),
    "mix_grad_atomic_kernel": (
        (256, _config(4, BLOCK_N=8, BLOCK_D=256)),
        (2**31, _config(4, BLOCK_N=1, BLOCK_D=1024)),
    ),
    # How the vocabulary is cut, as of a decode step.
    "selective_log_softmax_partials_kernel": (
        (4096, _config(4, BLOCK_V=1024)),
        (2**31, _config(4, BLOCK_V=4096)),
    ),
    "selective_log_softmax_forward_kernel": ((2**31, _config(1)),),
    "selective_log_softmax_backward_kernel": (
        (4096, _config(4, BLOCK_V=1024)),
        (2**31, _config(4, BLOCK_V=4096)),
    ),
    # The width is the size of a group.
    "group_advantages_kernel": (
        (16, _config(4, registers=80, BLOCK_G=32, BLOCK_R=16)),
        (128, _config(4, registers=64, BLOCK_G=4, BLOCK_R=128)),
        (2**31, _config(8, registers=64, BLOCK_G=1, BLOCK_R=2048)),
    ),
    "group_advantages_backward_kernel": (
        (16, _config(4, registers=64, BLOCK_G=8, BLOCK_R=16)),
        (128, _config(4, registers=64, BLOCK_G=4, BLOCK_R=128)),
        (2**31, _config(8, registers=64, BLOCK_G=1, BLOCK_R=2048)),
    ),
    # How the vocabulary is cut: never by the batch. The choice goes by d, the filter by V.
    "decode_partials_kernel": (
        (16384, _config(4, BLOCK_V=1024)),
        (2**31, _config(4, BLOCK_V=4096)),
    ),
    "decode_gather_kernel": ((2**31, _config(4)),),
    "decode_filter_kernel": ((2**31, _config(8, registers=168, BLOCK_C=64, BLOCK_V=2048)),),
    "decode_draws_kernel": ((2**31, _config(8)),),
    "decode_choice_kernel": ((2**31, _config(8, BLOCK_D=1024)),),
    "gaussian_noise_kernel": ((2**31, _config(4, BLOCK_D=1024)),),
    # The width is the number of queries, and 0 for l1, which has no matrix product and so no use for large tiles.
    # 8 warps, which tcgen05 takes and 16 do not; a tile of 128 x 256 would spill.
    "append_pairs_kernel": (
        (64, _config(4, 4, BLOCK_N=128, BLOCK_K=64, BLOCK_M=16)),
        (2**31, _config(8, 3, BLOCK_N=128, BLOCK_K=64, BLOCK_M=128)),
    ),
    "append_pairs_symmetric_kernel": (
        (0, _config(8, BLOCK_N=64, BLOCK_K=64, BLOCK_M=64)),
        (2**31, _config(8, 3, BLOCK_N=128, BLOCK_K=64, BLOCK_M=128)),
    ),
    # The width is the number of queries. The rows are the operand of the product that may stay in registers.
    "score_few_kernel": (
        (16, _config(4, 4, registers=255, BLOCK_N=64, BLOCK_K=32, BLOCK_Q=16)),
        (32, _config(4, 4, registers=255, BLOCK_N=64, BLOCK_K=32, BLOCK_Q=32)),
        (2**31, _config(4, 4, registers=255, BLOCK_N=64, BLOCK_K=32, BLOCK_Q=64)),
    ),
    # The width is the places of a query.
    "keep_best_kernel": (
        (128, _config(4, BLOCK_J=4, BLOCK_N=4)),
        (512, _config(4, BLOCK_J=4, BLOCK_N=1)),
        (2**31, _config(8, BLOCK_J=2, BLOCK_N=1)),
    ),
    "pair_scores_kernel": ((2**31, _config(4, BLOCK_P=8, BLOCK_D=256)),),
    "row_statistics_kernel": (
        (256, _config(4, BLOCK_N=8, BLOCK_D=256)),
        (2**31, _config(4, BLOCK_N=4, BLOCK_D=512)),
    ),
    "prepare_rows_kernel": (
        (256, _config(4, BLOCK_N=8, BLOCK_D=256)),
        (2**31, _config(4, BLOCK_N=4, BLOCK_D=512)),
    ),
    "row_movements_kernel": (
        (256, _config(4, BLOCK_N=8, BLOCK_D=256)),
        (2**31, _config(4, BLOCK_N=4, BLOCK_D=512)),
    ),
}

# Where an architecture needs other tiles, instead of the kernel's entry above.
PINNED_FOR: dict[tuple[str, str], tuple[tuple[int, Config], ...]] = {
    # ptxas aims at an occupancy there, and takes a few bytes of stack for it.
    ("decode_choice_kernel", "cuda:100"): ((2**31, _config(8, registers=168, BLOCK_D=1024)),),
    ("decode_choice_kernel", "cuda:89"): ((2**31, _config(8, registers=168, BLOCK_D=1024)),),
    ("decode_gather_kernel", "cuda:89"): ((2**31, _config(4, registers=168)),),
    ("mix_grad_weights_kernel", "cuda:89"): (
        (256, _config(4, BLOCK_N=4, BLOCK_D=256)),
        (2**31, _config(4, registers=168, BLOCK_N=2, BLOCK_D=512)),
    ),
}

# Under the interpreter: rows a program, columns a program (at most; a row narrower than that is one tile).
_INTERPRETED: dict[str, dict[str, int]] = {
    "mix_forward_kernel": {"BLOCK_N": 64, "BLOCK_D": 128},
    "mix_grad_weights_kernel": {"BLOCK_N": 64, "BLOCK_D": 128},
    "mix_keys_kernel": {"BLOCK_M": 4096},
    "mix_offsets_kernel": {"BLOCK_V": 4096},
    "mix_grad_embedding_kernel": {"BLOCK_V": 64, "BLOCK_D": 128},
    "mix_grad_long_segments_kernel": {"BLOCK_M": 32, "BLOCK_D": 128},
    "mix_grad_merge_kernel": {"BLOCK_M": 32, "BLOCK_D": 128},
    "mix_grad_atomic_kernel": {"BLOCK_N": 64, "BLOCK_D": 128},
    "selective_log_softmax_partials_kernel": {"BLOCK_V": 1024},
    "selective_log_softmax_forward_kernel": {},
    "selective_log_softmax_backward_kernel": {"BLOCK_V": 1024},
    "group_advantages_kernel": {"BLOCK_G": 256, "BLOCK_R": 128},
    "group_advantages_backward_kernel": {"BLOCK_G": 256, "BLOCK_R": 128},
    "decode_partials_kernel": {"BLOCK_V": 1024},
    "decode_gather_kernel": {},
    "decode_filter_kernel": {"BLOCK_C": 1024, "BLOCK_V": 2048},
    "decode_draws_kernel": {},
    "decode_choice_kernel": {"BLOCK_D": 128},
    "gaussian_noise_kernel": {"BLOCK_D": 128},
    "append_pairs_kernel": {"BLOCK_N": 128, "BLOCK_K": 64, "BLOCK_M": 256},
    "append_pairs_symmetric_kernel": {"BLOCK_N": 128, "BLOCK_K": 64, "BLOCK_M": 256},
    "score_few_kernel": {"BLOCK_N": 1024, "BLOCK_K": 64, "BLOCK_Q": 64},
    "keep_best_kernel": {"BLOCK_J": 8, "BLOCK_N": 64},
    "pair_scores_kernel": {"BLOCK_P": 1024, "BLOCK_D": 128},
    "row_statistics_kernel": {"BLOCK_N": 64, "BLOCK_D": 128},
    "prepare_rows_kernel": {"BLOCK_N": 64, "BLOCK_D": 128},
    "row_movements_kernel": {"BLOCK_N": 64, "BLOCK_D": 128},
}

# What changes the best configuration of a kernel, by the names of its arguments (element types always do). The others
# are not tuned: the shape of their outputs or the bits of their sums follow from their tiles.
TUNING_KEYS: dict[str, tuple[str, ...]] = {
    "mix_forward_kernel": ("d", "K"),
    "mix_grad_weights_kernel": ("d", "K"),
    "mix_grad_embedding_kernel": ("d", "v"),
    "mix_grad_atomic_kernel": ("d", "K"),
    "selective_log_softmax_backward_kernel": ("v", "ENTROPY"),
    "group_advantages_kernel": ("group_size", "columns"),
    "group_advantages_backward_kernel": ("group_size", "columns"),
}

# Outputs that a kernel adds to, which the tuner must clear between trials.
ACCUMULATED: dict[str, list[str]] = {"mix_grad_atomic_kernel": ["out"]}


def pinned(kernel: str, width: int, *, interpreted: bool = False) -> Config:
    """The configuration for rows of `width` elements on the current device."""
    if interpreted:
        blocks = dict(_INTERPRETED[kernel])
        for columns in list(blocks)[-1:]:
            blocks[columns] = min(blocks[columns], max(16, next_power_of_2(width)))
        return Config(blocks)
    return next(config for limit, config in pinned_for(kernel) if width <= limit)


def pinned_for(kernel: str) -> tuple[tuple[int, Config], ...]:
    """A kernel's entry of `PINNED` for the current device."""
    return PINNED_FOR.get((kernel, _architecture_given or _architecture()), PINNED[kernel])


_architecture_given: str | None = None


@contextmanager
def for_architecture(name: str) -> Iterator[None]:
    """Configurations are those of a GPU that is not here: "cuda:90"."""
    global _architecture_given
    before, _architecture_given = _architecture_given, name
    try:
        yield
    finally:
        _architecture_given = before


def _architecture() -> str:
    return _of_device(torch.cuda.current_device()) if torch.cuda.is_initialized() else ""


@functools.cache
def _of_device(device: int) -> str:
    """Of a family whose members differ in nothing that concerns a tile, the first: "cuda:100" for 103 too."""
    if torch.version.hip:
        return f"hip:{torch.cuda.get_device_properties(device).gcnArchName.split(':')[0]}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda:{major}0" if major == 10 else f"cuda:{major}{minor}"


def candidates(kernel: str) -> tuple[Config, ...]:
    """The pinned configurations and, of each, the same tile with half and twice the warps."""
    found = []
    for _, config in PINNED[kernel]:
        for warps in (config.num_warps // 2, config.num_warps, config.num_warps * 2):
            found.append(_config(max(1, warps), config.num_stages, config.maxnreg, **config.kwargs))
    return tuple(found)
