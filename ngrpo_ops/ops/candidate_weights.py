"""The weights of given candidates: a softmax over the candidates alone."""

from __future__ import annotations

from typing import get_args

from torch import Tensor

from ..config import Variant
from ._checks import require_choice, require_floating, require_ids, require_positive, require_same_device
from ._precision import compute_dtype


def candidate_weights(logits: Tensor, ids: Tensor, *, temperature: float = 1.0, variant: Variant = "paper") -> Tensor:
    """Weights of the candidates: a softmax of logits / temperature over the candidates alone (equation 9).

    Args:
        logits: [..., V], floating point; computed in float32 (float64 for float64).
        ids: int64 [..., k], the candidates of each row.
        temperature: tau > 0.
        variant: "released" applies what the published code does: the softmax over the candidates' probabilities.

    Returns:
        weights [..., k], float32 (float64 for float64 logits); each row sums to 1. Differentiable in `logits`.

    Raises:
        TypeError: ids that are not int64, logits that are not floating point. ValueError: shapes that do not fit,
            temperature <= 0, an unknown variant.

    Examples:
        >>> import torch
        >>> from ngrpo_ops import candidate_weights
        >>> logits = torch.tensor([[0.0, 2.0, 2.0, 5.0]])
        >>> candidate_weights(logits, torch.tensor([[1, 2]])).tolist()
        [[0.5, 0.5]]
    """
    require_floating(logits, "logits")
    require_ids(ids, "ids")
    require_same_device("ids", ids, "logits", logits)
    if ids.dim() != logits.dim() or ids.shape[:-1] != logits.shape[:-1] or ids.shape[-1] == 0:
        raise ValueError(
            f"ids must be [..., k >= 1] over the rows of logits {tuple(logits.shape)}, got {tuple(ids.shape)}"
        )
    require_positive(temperature, "temperature")
    require_choice(variant, get_args(Variant), "variant")
    return candidate_scores(logits, ids, temperature, variant).softmax(-1)


def candidate_scores(logits: Tensor, ids: Tensor, temperature: float | Tensor, variant: str) -> Tensor:
    """What the weights are a softmax of: the candidates' logits / temperature, or their probabilities ("released")."""
    dtype = compute_dtype(logits)
    if variant == "released":
        return (logits.to(dtype) / temperature).softmax(-1).gather(-1, ids)
    return logits.gather(-1, ids).to(dtype) / temperature
