"""What a rollout leaves behind: the record of its mixed steps, dense or sparse; how it is cut, padded, serialized."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .ops._checks import (
    require_floating,
    require_ids,
    require_integer,
    require_mask,
    require_same_device,
    require_shape,
    require_tensor,
)

_NOISE = ("noise_scale", "noise_seed", "row_ids")
_Record = TypeVar("_Record")


@dataclass
class MixRecord:
    """The mixed steps of B rollouts, all a trainer needs to rebuild their input embeddings (section 3.4 of the paper).

    Column t belongs to completion token t, whose input column is ``prompt_length + t``. The gate decided that token and
    replaced its input, so it changes log-probabilities from t + 1 on.

    Args:
        gate: bool [B, T]; False after a row has ended.
        ids: int64 [B, T, k]; the candidates, ids[..., 0] the anchor. Only gated entries mean anything.
        weights: float32 [B, T, k].
        prompt_length: columns before the first completion token, padding included.
        logprobs: float32 [B, T] or None: the policy's log-softmax of logits / rollout temperature at each emitted
            token when it was emitted, 0 after a row has ended; what a replay is checked against.
        noise_scale: float32 [B], or None with the two that follow: the noise on the mixed embeddings, which is not
            stored but drawn again (`gaussian_noise`, with the column as the step).
        noise_seed: int64 [B].
        row_ids: int64 [B].

    Raises:
        TypeError, ValueError: a tensor of another dtype, shape or device; a negative prompt_length; noise in part.

    Examples:
        >>> import torch
        >>> from ngrpo_ops import MixRecord
        >>> gate = torch.tensor([[True, False], [False, False]])
        >>> record = MixRecord(gate, torch.zeros(2, 2, 3, dtype=torch.int64), torch.ones(2, 2, 3) / 3, prompt_length=4)
        >>> len(record), record.length, len(record[:1])
        (2, 2, 1)
    """

    gate: Tensor
    ids: Tensor
    weights: Tensor
    prompt_length: int
    logprobs: Tensor | None = None
    noise_scale: Tensor | None = None
    noise_seed: Tensor | None = None
    row_ids: Tensor | None = None

    def __post_init__(self) -> None:
        require_tensor(self.gate, "gate")
        if self.gate.dim() != 2:
            raise ValueError(f"gate must be [B, T], got shape {tuple(self.gate.shape)}")
        require_mask(self.gate, tuple(self.gate.shape), "gate", "[B, T]")
        require_ids(self.ids, "ids")
        if self.ids.dim() != 3 or self.ids.shape[:2] != self.gate.shape:
            raise ValueError(f"ids must be [B, T, k] over gate {tuple(self.gate.shape)}, got {tuple(self.ids.shape)}")
        require_floating(self.weights, "weights")
        require_shape(self.weights, tuple(self.ids.shape), "weights", "that of ids")
        require_integer(self.prompt_length, "prompt_length", least=0)
        if self.logprobs is not None:
            require_floating(self.logprobs, "logprobs")
            require_shape(self.logprobs, tuple(self.gate.shape), "logprobs", "that of gate")
        noise = {name: getattr(self, name) for name in _NOISE}
        if any(tensor is not None for tensor in noise.values()):
            for name, tensor in noise.items():
                (require_floating if name == "noise_scale" else require_ids)(tensor, name)
                require_shape(tensor, (len(self),), name, "[B]")
        for name, tensor in self.tensors().items():
            require_same_device(name, tensor, "gate", self.gate)

    def __len__(self) -> int:
        return self.gate.shape[0]

    @property
    def length(self) -> int:
        """T, the completion columns."""
        return self.gate.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by field name, each with B rows: what a trainer may shuffle and split with its own batch."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in named if isinstance(value, Tensor)}

    def _with(self, tensors: dict[str, Tensor], prompt_length: int | None = None) -> MixRecord:
        return MixRecord(**tensors, prompt_length=self.prompt_length if prompt_length is None else prompt_length)

    def __getitem__(self, rows: slice | Tensor) -> MixRecord:
        """The record of some rows: a slice, a permutation, a bool mask."""
        return self._with({name: value[rows] for name, value in self.tensors().items()})

    def to(self, device: torch.device | str) -> MixRecord:
        return self._with({name: value.to(device) for name, value in self.tensors().items()})

    def cut(self, length: int) -> MixRecord:
        """The record of the first `length` completion columns, or of all of them where there are fewer.

        Examples:
            >>> import torch
            >>> from ngrpo_ops import MixRecord
            >>> record = MixRecord(torch.zeros(1, 3).bool(), torch.zeros(1, 3, 2).long(), torch.ones(1, 3, 2), 4)
            >>> record.cut(2).length, record.cut(9).length
            (2, 3)
        """
        return self._with(
            {name: value if name in _NOISE else value[:, :length] for name, value in self.tensors().items()}
        )

    def fit(self, length: int, prompt_length: int | None = None) -> MixRecord:
        """The record with T = `length`: cut, or padded with ungated columns, as a batch's completions are.

        Raises:
            ValueError: a cut that would drop a gated column.
        """
        if bool(self.gate[:, length:].any()):
            raise ValueError(f"length must keep every gated column, got {length} with T = {self.length}")
        grown = self.cut(length).tensors()
        for name, value in grown.items():
            if name not in _NOISE:
                blank = value.new_zeros(value.shape[0], length - value.shape[1], *value.shape[2:])
                grown[name] = torch.cat([value, blank], dim=1)
        return self._with(grown, prompt_length)

    @staticmethod
    def cat(records: Sequence[MixRecord]) -> MixRecord:
        """The rows of several records, one after the other, fitted to the longest.

        Raises:
            ValueError: no records, or records of different prompt_length, k or contents.
        """
        if not records:
            raise ValueError("records must not be empty")
        if len({(r.prompt_length, r.ids.shape[2], *r.tensors()) for r in records}) > 1:
            raise ValueError("records must agree in prompt_length, k and in having logprobs and noise")
        length = max(r.length for r in records)
        parts = [r.fit(length).tensors() for r in records]
        return records[0]._with({name: torch.cat([part[name] for part in parts]) for name in parts[0]})

    def sparse(self, row: int, first: int) -> SparseRecord:
        """The mixed steps of one row alone.

        Args:
            row: which one.
            first: position of the row's first generated token among its own tokens, without padding.

        Raises:
            ValueError: a record without log-probabilities.

        Examples:
            >>> import torch
            >>> from ngrpo_ops import MixRecord
            >>> gate = torch.tensor([[False, True, False]])
            >>> ids, weights, logprobs = torch.ones(1, 3, 2, dtype=torch.int64), torch.ones(1, 3, 2), torch.zeros(1, 3)
            >>> MixRecord(gate, ids, weights, prompt_length=4, logprobs=logprobs).sparse(0, first=4).steps
            tensor([1])
        """
        (steps,) = self.gate[row].nonzero(as_tuple=True)
        noise = None
        if self.row_ids is not None:
            assert self.noise_scale is not None and self.noise_seed is not None
            noise = float(self.noise_scale[row]), int(self.noise_seed[row]), int(self.row_ids[row])
        if self.logprobs is None:
            raise ValueError("logprobs must be there for a sparse record, got None")
        return SparseRecord(first, steps, self.ids[row, steps], self.weights[row, steps], self.logprobs[row], noise)

    def to_bytes(self) -> bytes:
        """The record as bytes, for `from_bytes`; on the CPU.

        Examples:
            >>> import torch
            >>> from ngrpo_ops import MixRecord
            >>> record = MixRecord(torch.ones(1, 1).bool(), torch.zeros(1, 1, 2).long(), torch.ones(1, 1, 2), 4)
            >>> MixRecord.from_bytes(record.to_bytes()).prompt_length
            4
        """
        return _to_bytes({"prompt_length": self.prompt_length, **self.tensors()})

    @staticmethod
    def from_bytes(content: bytes) -> MixRecord:
        """The record that `to_bytes` made bytes of. Nothing in the bytes is executed.

        Raises:
            ValueError: bytes that are not a record's.
        """
        return _from_bytes(content, MixRecord)


@dataclass(frozen=True)
class SparseRecord:
    """One rollout's record by the positions of its own tokens, prompt first and without padding.

    Args:
        first: position of the first generated token.
        steps: int64 [M], the mixed steps, ascending; step t's token is at position first + t.
        ids: int64 [M, k]; weights: float32 [M, k]; see `MixRecord`.
        logprobs: float32 [T], of every generated token.
        noise: scale, seed and row id, of a strategy that adds noise.
    """

    first: int
    steps: Tensor
    ids: Tensor
    weights: Tensor
    logprobs: Tensor
    noise: tuple[float, int, int] | None = None

    def cut(self, length: int) -> SparseRecord:
        """The record of the first `length` generated tokens, or of all of them where there are fewer.

        Examples:
            >>> import torch
            >>> from ngrpo_ops.record import SparseRecord
            >>> ids, weights = torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2) / 2
            >>> record = SparseRecord(5, torch.tensor([1, 3]), ids, weights, logprobs=torch.zeros(4))
            >>> record.cut(2).steps.tolist(), len(record.cut(2).logprobs)
            ([1], 2)
        """
        kept = self.steps < length
        return replace(
            self,
            steps=self.steps[kept],
            ids=self.ids[kept],
            weights=self.weights[kept],
            logprobs=self.logprobs[:length],
        )

    def to_bytes(self) -> bytes:
        """The record as bytes, for `from_bytes`; on the CPU.

        Examples:
            >>> import torch
            >>> from ngrpo_ops.record import SparseRecord
            >>> ids, weights = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2) / 2
            >>> record = SparseRecord(5, torch.tensor([1]), ids, weights, logprobs=torch.zeros(4))
            >>> SparseRecord.from_bytes(record.to_bytes()).first
            5
        """
        return _to_bytes({one.name: getattr(self, one.name) for one in fields(self)})

    @staticmethod
    def from_bytes(content: bytes) -> SparseRecord:
        """The record that `to_bytes` made bytes of. Nothing in the bytes is executed.

        Raises:
            ValueError: bytes that are not a record's.
        """
        return _from_bytes(content, SparseRecord)


def _to_bytes(content: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    # A copy: torch.save would write all of the storage that a slice shares.
    torch.save({name: x.cpu().clone() if isinstance(x, Tensor) else x for name, x in content.items()}, file)
    return file.getvalue()


def _from_bytes(content: bytes, kind: type[_Record]) -> _Record:
    try:
        return kind(**torch.load(io.BytesIO(content), weights_only=True))
    except Exception as error:
        raise ValueError(f"content must be what {kind.__name__}.to_bytes returned: {error}") from error
