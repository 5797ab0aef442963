"""The records of all tokens of mixed requests, on the device. Runs in the engine's workers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ngrpo_ops.rollout import Decision

_FIELDS = ("ids", "weights", "gate", "fault", "logprobs", "tokens")
_SMALLEST = 4096  # entries; each growth doubles the pool


class EntryPool:
    """One entry for each sampled token of a mixed request: the token, its step's decision and its log-probability.

    The host reserves and frees entries by number. The pool grows when it has too few free entries.

    Attributes:
        ids: int64 [N, k].
        weights: float32 [N, k].
        gate: bool [N]; False in a reserved entry whose decision has not been written.
        fault: int32 [N].
        logprobs: float32 [N].
        tokens: int32 [N].

    Examples:
        >>> import numpy as np
        >>> import torch
        >>> from ngrpo_ops.integrations.vllm.pool import EntryPool
        >>> pool = EntryPool(k=3, device=torch.device("cpu"))
        >>> entries = np.array(pool.reserve(2))
        >>> pool.gate[torch.from_numpy(entries)] = True
        >>> pool.read(np.array([[entries[0], entries[1]], [-1, -1]]))["gate"].tolist()
        [[True, True], [False, False]]
        >>> pool.free(entries)
        >>> bool(pool.gate.any())
        False
    """

    def __init__(self, k: int, device: torch.device) -> None:
        self.ids = torch.zeros(0, k, dtype=torch.int64, device=device)
        self.weights = torch.zeros(0, k, dtype=torch.float32, device=device)
        self.gate = torch.zeros(0, dtype=torch.bool, device=device)
        self.fault = torch.zeros(0, dtype=torch.int32, device=device)
        self.logprobs = torch.zeros(0, dtype=torch.float32, device=device)
        self.tokens = torch.zeros(0, dtype=torch.int32, device=device)
        self._free: list[int] = []

    def reserve(self, count: int) -> list[int]:
        """The numbers of `count` free entries."""
        if count > len(self._free):
            old = len(self.gate)
            more = max(_SMALLEST, old, count)
            for name in _FIELDS:
                tensor = getattr(self, name)
                setattr(self, name, torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])]))
            self._free.extend(range(old + more - 1, old - 1, -1))
        reserved = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return reserved

    def free(self, entries: np.ndarray) -> None:
        """Gives entries back. Reserved again, they hold no mix and no fault."""
        if not len(entries):
            return
        at = torch.from_numpy(entries.astype(np.int64)).to(self.gate.device)
        self.gate[at] = False
        self.fault[at] = 0
        self._free.extend(entries.tolist())

    def write(self, entries: Tensor, decision: Decision) -> None:
        """Stores the decision of M steps.

        Args:
            entries: int64 [M], on the device.
        """
        self.ids[entries], self.weights[entries] = decision.ids, decision.weights
        self.gate[entries], self.fault[entries] = decision.gate, decision.fault

    def read(self, entries: np.ndarray) -> dict[str, Tensor]:
        """The entries' fields on the CPU, as `MixRecord` has them, `fault` and `tokens`. The host waits for the device.

        Args:
            entries: int [B, T]; -1 where there is no entry.
        """
        at = torch.from_numpy(entries.astype(np.int64)).to(self.gate.device)
        inside = at >= 0
        at = at.clamp(min=0)
        gate = self.gate[at] & inside
        content = {
            "gate": gate,
            "ids": self.ids[at] * inside[..., None],
            "weights": torch.where(gate[..., None], self.weights[at], 0),
            "logprobs": torch.where(inside, self.logprobs[at], 0),
            "fault": self.fault[at] * inside,
            "tokens": self.tokens[at],
        }
        return {name: tensor.cpu() for name, tensor in content.items()}
