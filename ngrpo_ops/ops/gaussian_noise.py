"""The noise of strategy "gaussian" on mixed embeddings. A record stores its counters, by which it is drawn again."""

from __future__ import annotations

import torch
from torch import Tensor

from ..random import normal
from ._checks import require_counter, require_floating, require_ids, require_number, require_same_device, require_shape
from ._library import Operation, choose_backend, load_kernels
from ._precision import compute_dtype, power_of_two


def gaussian_noise(
    mixed: Tensor,
    noise_scale: float | Tensor,
    *,
    seed: int | Tensor,
    row_ids: Tensor,
    steps: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Mixed embeddings with the noise of strategy "gaussian" (STHT, arXiv 2509.19170), drawn again from its counters.

    Args:
        mixed: [M, d], floating point, of `mix_embeddings`.
        noise_scale: the noise's size over that of each row of `mixed` (root mean square), for all rows or [M].
        seed: int or int64, 0-d or [M], as it was in the decode step.
        row_ids: int64 [M], as they were in the decode step.
        steps: int64 [M], likewise.
        backend: None, "eager" or "triton".

    Returns:
        [M, d] in the dtype of `mixed`: mixed + noise. Differentiable in `mixed`, the noise being a constant.

    Raises:
        TypeError, ValueError: an argument of another dtype or shape, by name; a backend that cannot be used.

    Examples:
        >>> import torch
        >>> from ngrpo_ops import gaussian_noise
        >>> counters = {"seed": 0, "row_ids": torch.tensor([4, 5]), "steps": torch.tensor([0, 0])}
        >>> noised = gaussian_noise(torch.ones(2, 8), 0.33, **counters)
        >>> torch.equal(noised, gaussian_noise(torch.ones(2, 8), 0.33, **counters)), bool((noised != 1).all())
        (True, True)
    """
    require_floating(mixed, "mixed")
    if mixed.dim() != 2:
        raise ValueError(f"mixed must be [M, d], got shape {tuple(mixed.shape)}")
    rows = mixed.shape[:1]
    for name, tensor in (("row_ids", row_ids), ("steps", steps)):
        require_ids(tensor, name)
        require_shape(tensor, tuple(rows), name, "[M]")
        require_same_device(name, tensor, "mixed", mixed)
    if isinstance(noise_scale, Tensor):
        require_floating(noise_scale, "noise_scale")
        require_shape(noise_scale, tuple(rows), "noise_scale", "[M]")
        require_same_device("noise_scale", noise_scale, "mixed", mixed)
    else:
        require_number(noise_scale, "noise_scale", least=0)
        noise_scale = torch.full(rows, noise_scale, dtype=torch.float32, device=mixed.device)
    if not isinstance(seed, Tensor) or seed.dim() == 0:
        seed = require_counter(seed, "seed", "mixed", mixed).to(mixed.device).expand(rows)
    require_ids(seed, "seed")
    require_shape(seed, tuple(rows), "seed", "[M]")
    require_same_device("seed", seed, "mixed", mixed)
    if not mixed.numel():
        return mixed
    noise = _gaussian_noise(mixed.detach(), noise_scale, seed, row_ids, steps, choose_backend(backend, mixed))
    return (mixed.to(noise.dtype) + noise).to(mixed.dtype)


def gaussian_noise_reference(mixed: Tensor, scale: Tensor, seed: Tensor, row_ids: Tensor, steps: Tensor) -> Tensor:
    """[M, d], float32 (float64 for float64): scale times the root mean square of each row of `mixed`, times N(0, I)."""
    x = mixed.to(compute_dtype(mixed))
    if not x.numel():
        return x
    unit = power_of_two(x.abs().amax(-1, keepdim=True))  # its squares neither overflow nor vanish
    size = unit * (x / unit).square().mean(-1, keepdim=True).sqrt() * scale[:, None]
    return size.to(x.dtype) * normal(seed, row_ids, steps, mixed.shape[1]).to(x.dtype)


@Operation
def _gaussian_noise(mixed: Tensor, scale: Tensor, seed: Tensor, row_ids: Tensor, steps: Tensor, backend: str) -> Tensor:
    if backend == "triton":
        return load_kernels("gaussian_noise").gaussian_noise(mixed, scale, seed, row_ids, steps)
    return gaussian_noise_reference(mixed, scale, seed, row_ids, steps)


@_gaussian_noise.register_fake
def _(mixed: Tensor, *_: object) -> Tensor:
    return mixed.new_empty(mixed.shape, dtype=compute_dtype(mixed))
