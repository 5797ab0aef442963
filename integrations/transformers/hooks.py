"""The hook pair on an input-embedding module. Runs in the process of the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ngrpo_ops import MixRecord
from ngrpo_ops.rollout import Noise, Overlay


class _Turn:
    """Who uses the hooks of a module: one rollout or replay at a time, in one thread."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.use: str | None = None
        self.has_rollouts = threading.Lock()


# Not an attribute of the mixer: a model is copied with its hooks, and a lock cannot be.
_turns: WeakKeyDictionary[nn.Module, _Turn] = WeakKeyDictionary()


class EmbeddingMixer:
    """A pair of hooks that writes mixes over what an input-embedding module returns.

    The first hook appends the candidates to the ids, so that one native lookup embeds both. The second hook cuts the
    candidates off, mixes them, and writes the mixes. Without an overlay the hooks change nothing.

    Attributes:
        module: the input-embedding module.
        cosines: cos(mix, anchor) at each position of the last replay, one tensor for each forward.

    Examples:
        >>> import torch
        >>> from ngrpo_ops.integrations.transformers import EmbeddingMixer
        >>> from ngrpo_ops.rollout import Overlay
        >>> embedding = torch.nn.Embedding.from_pretrained(torch.eye(3))
        >>> mixer = EmbeddingMixer(embedding)
        >>> half = Overlay(positions=torch.tensor([1]), ids=torch.tensor([[0, 2]]), weights=torch.tensor([[0.5, 0.5]]))
        >>> with mixer.replaying_at(half):
        ...     embedding(torch.tensor([[1, 0]]))
        tensor([[[0.0000, 1.0000, 0.0000],
                 [0.5000, 0.0000, 0.5000]]])
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.cosines: list[Tensor] = []
        self._make_overlay: Callable[[Tensor], Overlay | None] | None = None  # for the ids of a coming forward
        self._current: tuple[Tensor, Overlay] | None = None  # ids and overlay of the forward under way
        self._thread: int | None = None  # whose forwards are meant
        self._foreign_with_grad = False  # whether another thread ran a forward that may be differentiated
        self._decoding: int | None = None  # the rows of a rollout whose prompt has been read
        self._handles = [
            module.register_forward_pre_hook(self._append_candidates, with_kwargs=True),
            module.register_forward_hook(self._write_mixes),
        ]

    def remove(self) -> None:
        """Takes the hooks off the module."""
        for handle in self._handles:
            handle.remove()

    @property
    def armed(self) -> bool:
        """Whether an overlay waits for a forward."""
        return self._make_overlay is not None

    def disarm(self) -> None:
        """Drops the overlay that waits for a forward, and what `expect_decode_steps` expects."""
        self._make_overlay = self._current = self._decoding = None

    @contextmanager
    def turn(self, use: str, *, wait: bool = False) -> Iterator[None]:
        """Within it the calling thread alone uses the hooks of this module, for one thing.

        Args:
            use: what it does, for the messages.
            wait: whether to wait for another thread to end.

        Raises:
            RuntimeError: the module's hooks are in use.
        """
        turn = _turns.setdefault(self.module, _Turn())
        if not turn.lock.acquire(blocking=wait):
            raise RuntimeError(f"{use} cannot begin: another thread is in {turn.use} of this model; take turns")
        try:
            if turn.use is not None:
                raise RuntimeError(f"{use} cannot begin within {turn.use} of the same model")
            turn.use, self._thread = use, threading.get_ident()
            try:
                yield
            finally:
                turn.use = self._thread = None
        finally:
            turn.lock.release()

    @contextmanager
    def only_rollouts(self) -> Iterator[None]:
        """Within it no other `rollouts` of this model may begin: each replaces the model's generate, and restores it.

        Raises:
            RuntimeError: one is under way.
        """
        rollouts = _turns.setdefault(self.module, _Turn()).has_rollouts
        if not rollouts.acquire(blocking=False):
            raise RuntimeError("rollouts() cannot begin within rollouts() of the same model")
        try:
            yield
        finally:
            rollouts.release()

    def expect_decode_steps(self, batch: int) -> None:
        """From now on until `disarm`, every forward must be a decode step: ids [batch, 1]."""
        self._decoding = batch

    def arm_step(self, batch: int, overlay: Overlay) -> None:
        """Arms the next forward, which must be a decode step: ids [batch, 1].

        Args:
            batch: the number of rows.
            overlay: its positions are rows.
        """

        def make_overlay(input_ids: Tensor) -> Overlay:
            _require_decode_step(input_ids, batch)
            self._make_overlay = None
            return overlay

        self._make_overlay = make_overlay

    @contextmanager
    def replaying(self, record: MixRecord) -> Iterator[None]:
        """Within it forwards replay the rows of `record` in their order: all in one forward, or spread over several.

        Raises:
            RuntimeError: a forward has other columns than the record, or other tokens than the record's anchors; a row
                was not replayed exactly once.
        """
        done = 0

        def make_overlay(input_ids: Tensor) -> Overlay | None:
            nonlocal done
            rows, columns = input_ids.shape
            if columns != record.prompt_length + record.length:
                raise RuntimeError(
                    f"the record has {record.prompt_length} prompt and {record.length} completion columns, "
                    f"but the forward has {columns}"
                )
            if done + rows > len(record):
                raise RuntimeError(
                    f"the record has {len(record)} rows, {done} of them already replayed; this forward has {rows} more"
                )
            part = record[done : done + rows].to(input_ids.device)
            done += rows
            overlay = _overlay(part, columns)
            if overlay is not None:
                _require_anchors(input_ids, overlay)
            return overlay

        with self._replay(make_overlay):
            yield
        if done != len(record):
            raise RuntimeError(
                f"only {done} of the record's {len(record)} rows were replayed: the model's forward did not go through "
                "its input embeddings (inputs_embeds, or another model?)"
            )

    @contextmanager
    def replaying_at(self, overlay: Overlay | None) -> Iterator[None]:
        """Within it one forward replays `overlay`, whose positions count through the flattened ids, packed or not.

        None: nothing is mixed.

        Raises:
            RuntimeError: a token at one of the positions is not the anchor, or there was not exactly one forward.
        """
        with self.replaying_with(lambda input_ids: overlay):
            yield

    @contextmanager
    def replaying_with(self, make_overlay: Callable[[Tensor], Overlay | None]) -> Iterator[None]:
        """Within it one forward replays the overlay that `make_overlay` returns for its input ids.

        Raises:
            RuntimeError: see `replaying_at`.
        """
        forwards = 0

        def counted(input_ids: Tensor) -> Overlay | None:
            nonlocal forwards
            forwards += 1
            overlay = make_overlay(input_ids)
            if overlay is None or not overlay.positions.numel():
                return None
            overlay = overlay.to(input_ids.device)
            _require_anchors(input_ids, overlay)
            return overlay

        with self._replay(counted):
            yield
        if forwards != 1:
            raise RuntimeError(
                f"the model's input embeddings were called {forwards} times, expected once (inputs_embeds, or another "
                "model?): the record was not replayed"
            )

    @contextmanager
    def _replay(self, make_overlay: Callable[[Tensor], Overlay | None]) -> Iterator[None]:
        with self.turn("a replay"):
            self.cosines, self._foreign_with_grad = [], False
            self._make_overlay = make_overlay
            try:
                yield
            finally:
                self.disarm()
        if self._foreign_with_grad:
            raise RuntimeError(
                "another thread ran a forward of the model within the replay, with gradients: if autograd recomputed a "
                "checkpoint of the whole model, it embedded plain ids; checkpoint its layers"
            )

    def _append_candidates(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._make_overlay is None and self._decoding is None:
            return None
        if self._thread != threading.get_ident():
            # A forward that has nothing to do with it, unless it is a checkpoint that autograd computes again.
            self._foreign_with_grad |= torch.is_grad_enabled()
            return None
        if self._decoding is not None:
            _require_decode_step(args[0] if args else next(iter(kwargs.values())), self._decoding)
        if self._make_overlay is None:
            return None
        name = None if args else next(iter(kwargs))
        input_ids = args[0] if name is None else kwargs[name]
        overlay = self._make_overlay(input_ids)
        if overlay is None:
            return None
        overlay = overlay.to(input_ids.device)
        self._current = input_ids, overlay
        extended = overlay.extend(input_ids)[None]
        return ((extended, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: extended})

    def _write_mixes(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if self._current is None or self._thread != threading.get_ident():
            return None
        (input_ids, overlay), self._current = self._current, None
        embedded, mixed, anchors = overlay.mix(output[0])
        if overlay.gate is None:  # a replay
            with torch.no_grad():
                self.cosines.append(torch.cosine_similarity(mixed.float(), anchors.float(), dim=-1))
        # Out of place: the embedding's output may be a leaf that requires grad (enable_input_require_grads).
        return embedded.index_copy(0, overlay.positions, mixed).view(*input_ids.shape, -1)


def _require_decode_step(input_ids: Tensor, batch: int) -> None:
    if input_ids.shape != (batch, 1):
        raise RuntimeError(
            f"a mixed decode step expects input ids of shape {(batch, 1)}, got {tuple(input_ids.shape)}: mixing needs "
            "the key-value cache and one token a step"
        )


def _require_anchors(input_ids: Tensor, overlay: Overlay) -> None:
    if bool((input_ids.flatten()[overlay.positions] != overlay.ids[:, 0]).any()):
        raise RuntimeError("the tokens at a record's positions are not its anchors: the record is of other sequences")


def _overlay(record: MixRecord, columns: int) -> Overlay | None:
    """What a forward of a record's sequences [B, columns] embeds; None: nothing is mixed."""
    row, step = record.gate.nonzero(as_tuple=True)
    if not row.numel():
        return None
    noise = None
    if record.row_ids is not None:
        assert record.noise_scale is not None and record.noise_seed is not None
        noise = Noise(record.noise_scale[row], record.noise_seed[row], record.row_ids[row], step)
    positions = row * columns + record.prompt_length + step
    return Overlay(positions, record.ids[row, step], record.weights[row, step], noise=noise)
