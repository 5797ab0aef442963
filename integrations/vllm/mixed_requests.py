"""Which requests are mixed, and which entry of the pool belongs to which token. Runs in the engine's workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from ngrpo_ops import MixingConfig
from ngrpo_ops.rollout import gate_schedule

from .pool import EntryPool

_GATE_STEPS = 256  # drawn at a time


class ScheduledTokens(NamedTuple):
    """The tokens of a forward that were chosen at drawn steps. Every field is an integer array [M] on the host.

    Attributes:
        places: the tokens' places in the batch.
        entries: their entries in the pool.
        steps: the completion steps at which they were chosen.
        row_ids: the row ids of their requests.
    """

    places: np.ndarray
    entries: np.ndarray
    steps: np.ndarray
    row_ids: np.ndarray


@dataclass(frozen=True)
class SampledSteps:
    """The steps of mixed requests whose tokens are sampled now. Every field is an array [M] on the host.

    Attributes:
        rows: the requests' rows in the batch.
        slots: their slots.
        entries: the entries in the pool that the steps write.
        steps: the completion steps.
        row_ids: the row ids of the requests.
        drawn: bool; whether the mixing rate has drawn the step.
    """

    rows: np.ndarray
    slots: np.ndarray
    entries: np.ndarray
    steps: np.ndarray
    row_ids: np.ndarray
    drawn: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which: np.ndarray) -> SampledSteps:
        return SampledSteps(*(column[which] for column in vars(self).values()))


@dataclass
class _Kept:
    """The entries of a request without a slot: it has finished, or was preempted and will be resumed."""

    req_id: str
    entries: np.ndarray


class MixedRequests:
    """The host's state of a worker's mixed requests.

    A slot is the number that vLLM gives a running request. Positions are absolute, prompt included. The entry at
    position p says how the token at p was chosen and, if the entry's gate is set, what is embedded at p.

    The steps that the mixing rate draws are known on the host ahead of time, so no step waits for the device.

    Args:
        slots: the number of slots.
        length: the number of positions of a slot.
        pool: where entries are reserved and freed.
    """

    def __init__(self, config: MixingConfig, slots: int, length: int, pool: EntryPool) -> None:
        self.config, self.pool = config, pool
        self.slots: dict[str, int] = {}  # by request id
        self.kept: dict[int, _Kept] = {}  # by row id
        self._req_ids: dict[int, str] = {}  # by slot
        self._replaced: dict[str, int] = {}  # row ids by request id, where a later request has the row
        self._mixed = np.zeros(slots, dtype=bool)
        self._row_ids = np.zeros(slots, dtype=np.int64)
        self._first = np.zeros(slots, dtype=np.int64)  # the position of the first completion token
        self._drawn = np.zeros((slots, length), dtype=bool)
        self._drawn_until = np.zeros(slots, dtype=np.int64)
        self._entries = np.full((slots, length), -1, dtype=np.int32)

    def add(self, slot: int, request: Any, row_id: int | None, replaces: bool = False) -> None:
        """A request gets a slot: a new request, or one that was preempted.

        Args:
            request: vLLM's `NewRequestData`.
            row_id: None: the request is not mixed.
            replaces: whether the row is the new request's alone from now on, as where a client sends a request again.
                The earlier request may still be running. Its record is dropped.
        """
        self._mixed[slot] = False
        if row_id is None:
            return
        kept = None if request.req_id in self._replaced else self.kept.pop(row_id, None)
        if kept is not None and kept.req_id != request.req_id:  # of an earlier request, whose record was never taken
            self.pool.free(kept.entries)
            if replaces:
                self._replaced[kept.req_id] = row_id  # it may have been preempted, and go on
            kept = None
        if replaces and request.req_id not in self._replaced:
            for other in np.flatnonzero(self._mixed & (self._row_ids == row_id)).tolist():
                self._replaced[self._req_ids[other]] = row_id
        self._mixed[slot] = True
        first = request.prompt_len
        self.slots[request.req_id], self._req_ids[slot] = slot, request.req_id
        self._row_ids[slot], self._first[slot] = row_id, first
        self._drawn[slot] = False
        self._drawn_until[slot] = first
        self._entries[slot] = -1
        if kept is not None:
            self._entries[slot, first : first + len(kept.entries)] = kept.entries
        self._draw(np.array([slot]), len(request.prefill_token_ids))

    def remove(self, req_id: str) -> None:
        """A request, mixed or not, loses its slot. The entries of a mixed request are kept."""
        slot = self.slots.pop(req_id, None)
        if slot is None:
            return
        del self._req_ids[slot]
        self._mixed[slot] = False
        row_id = int(self._row_ids[slot])
        if req_id in self._replaced:
            self.pool.free(self._written(slot))
            return
        if row_id in self.kept:  # never taken
            self.pool.free(self.kept[row_id].entries)
        self.kept[row_id] = _Kept(req_id, self._written(slot).copy())

    def any_mixed(self, batch: Any) -> bool:
        """Whether a request of the batch is mixed."""
        return bool(self._mixed[batch.idx_mapping_np].any())

    # The steps of a batch

    def scheduled(self, batch: Any) -> ScheduledTokens:
        """The scheduled tokens that were chosen at drawn steps, in decoding and in a prefill after a preemption."""
        slots, starts = batch.idx_mapping_np, batch.num_computed_tokens_np
        counts = batch.num_scheduled_tokens
        offsets = batch.query_start_loc_np[: len(slots)]
        single = self._mixed[slots] & (counts == 1) & (starts >= self._first[slots])
        parts = [(slots[single], starts[single], offsets[single])]
        for row in np.flatnonzero(self._mixed[slots] & (counts > 1) & (starts + counts > self._first[slots])):
            inside = np.arange(counts[row])
            parts.append((np.full(len(inside), slots[row]), starts[row] + inside, offsets[row] + inside))
        slot, position, place = (np.concatenate(arrays).astype(np.int64) for arrays in zip(*parts, strict=True))
        entries = self._entries[slot, position]
        mixed = self._drawn[slot, position] & (entries >= 0)
        slot, position = slot[mixed], position[mixed]
        return ScheduledTokens(place[mixed], entries[mixed], position - self._first[slot], self._row_ids[slot])

    def sampled(self, batch: Any) -> SampledSteps:
        """The steps whose tokens are sampled now, each with an entry."""
        slots = batch.idx_mapping_np
        positions = batch.num_computed_tokens_np + batch.num_scheduled_tokens  # of the tokens to be sampled
        rows = np.flatnonzero(
            self._mixed[slots] & (positions >= batch.prefill_len_np) & (positions < self._entries.shape[1])
        )
        slots, positions = slots[rows], positions[rows].astype(np.int64)
        if len(rows):
            self._draw(slots, int(positions.max()))
        entries = self._entries[slots, positions]
        entries[entries < 0] = self.pool.reserve(int((entries < 0).sum()))
        self._entries[slots, positions] = entries
        steps = positions - self._first[slots]
        return SampledSteps(rows, slots, entries, steps, self._row_ids[slots], self._drawn[slots, positions])

    def _draw(self, slots: np.ndarray, position: int) -> None:
        """Draws the gates of slots, at least up to a position."""
        limit = self._drawn.shape[1]
        while True:
            behind = slots[(self._drawn_until[slots] <= position) & (self._drawn_until[slots] < limit)]
            if not len(behind):
                return
            steps = torch.from_numpy((self._drawn_until - self._first)[behind])
            drawn = gate_schedule(self.config, torch.from_numpy(self._row_ids[behind]), steps, _GATE_STEPS).numpy()
            for slot, gates in zip(behind, drawn, strict=True):
                start = int(self._drawn_until[slot])
                stop = min(start + _GATE_STEPS, limit)
                self._drawn[slot, start:stop] = gates[: stop - start]
                self._drawn_until[slot] = stop

    # Records

    def find(self, row_ids: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
        """The entries of finished requests.

        Returns:
            int64 [B, T], T the largest length; -1 after a request's end.

        Raises:
            ValueError: several requests have the row id, or a request has fewer entries than its length.
        """
        running = self._running()
        in_flight = Counter(
            int(self._row_ids[slot]) for req_id, slot in self.slots.items() if req_id not in self._replaced
        )
        for row_id in row_ids:
            if in_flight[row_id] + (row_id in self.kept) > 1:
                raise ValueError(
                    f"row {row_id}: the engine has several requests of this row_id, and no two may share one"
                )
        place = np.full((len(row_ids), max(lengths, default=0)), -1, dtype=np.int64)
        for row, (row_id, length) in enumerate(zip(row_ids, lengths, strict=True)):
            entries = self._entries_of(row_id, running)
            if len(entries) < length:
                raise ValueError(
                    f"row {row_id}: the engine has a record of {len(entries)} steps, asked for {length}: was the "
                    "request sent with request_kwargs(row_id), is it finished, and were its records not taken before?"
                )
            place[row, :length] = entries[:length]
        return place

    def steps(self, row_ids: Sequence[int]) -> dict[int, int]:
        """The number of entries of those of these rows that have some."""
        running = self._running()
        found = {row_id: len(self._entries_of(row_id, running)) for row_id in row_ids}
        return {row_id: count for row_id, count in found.items() if count}

    def _entries_of(self, row_id: int, running: dict[int, int]) -> np.ndarray:
        if row_id in self.kept:
            return self.kept[row_id].entries
        if row_id in running:  # finished; vLLM removes it from its slot with the next step
            return self._written(running[row_id])
        return np.zeros(0, dtype=np.int32)

    def forget_outside(self, rows: range) -> None:
        """Frees what is kept of finished requests, but of these rows."""
        for row_id in [row_id for row_id in self.kept if row_id not in rows]:
            self.pool.free(self.kept.pop(row_id).entries)
        self._replaced = {req_id: row_id for req_id, row_id in self._replaced.items() if row_id in rows}

    def forget(self, row_ids: Sequence[int]) -> None:
        """Frees all entries of these requests."""
        running = self._running()
        for row_id in row_ids:
            if row_id in self.kept:
                self.pool.free(self.kept.pop(row_id).entries)
            elif row_id in running:
                slot = running[row_id]
                self.pool.free(self._written(slot))
                self._entries[slot] = -1
                self._mixed[slot] = False
                del self.slots[self._req_ids.pop(slot)]

    def _running(self) -> dict[int, int]:
        """The slots of the mixed requests by row id."""
        return {int(self._row_ids[slot]): slot for req_id, slot in self.slots.items() if req_id not in self._replaced}

    def _written(self, slot: int) -> np.ndarray:
        """The entries of a slot's completion, as far as it has come."""
        entries = self._entries[slot, self._first[slot] :]
        ends = np.flatnonzero(entries < 0)
        return entries[: ends[0]] if len(ends) else entries
