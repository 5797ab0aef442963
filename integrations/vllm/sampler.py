"""What each row's request asks of vLLM's sampler: penalties and filters. Runs in the engine's workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from ngrpo_ops._patching import replaced


@contextmanager
def keep_unscaled_logits(states: Any, row: Tensor) -> Iterator[list[Tensor]]:
    """Within it vLLM's sampler runs once, and the logits of some rows are kept before temperature and filters.

    Penalties, biases and the logits processors of a user have changed the logits by then. A processor may count its
    calls, so none is run a second time for the mixed rows.

    Args:
        states: vLLM's sampling states, which divide by the temperature.
        row: int64 [M], on the device.

    Yields:
        A list that gains the logits [M, V]. It stays empty where vLLM samples from the model's own logits.
    """
    kept: list[Tensor] = []

    def apply_temperature(logits: Tensor, *args: Any, **kwargs: Any) -> None:
        kept.append(logits[row])
        original(logits, *args, **kwargs)

    with replaced(states, "apply_temperature", apply_temperature) as original:
        yield kept


def filters(states: Any, slots: np.ndarray, slot: Tensor) -> dict[str, Tensor]:
    """The filters of some rows as `decode_step` takes them. A filter that no row sets is left out.

    Args:
        states: vLLM's sampling states.
        slots, slot: the rows' slots [M], on the host and on the device.
    """
    found: dict[str, Tensor] = {}
    if (states.top_k.np[slots] != states.vocab_size).any():
        found["top_k"] = states.top_k.gpu[slot].long()
    if (states.top_p.np[slots] != 1.0).any():
        found["top_p"] = states.top_p.gpu[slot]
    if (states.min_p.np[slots] != 0.0).any():
        found["min_p"] = states.min_p.gpu[slot]
    return found
