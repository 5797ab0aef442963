"""One mixed `generate`: the logits processor that watches it and keeps its record. Runs in the process of the model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, StoppingCriteriaList

from ngrpo_ops import MixingConfig, MixRecord, raise_faults, selective_log_softmax
from ngrpo_ops._patching import replaced
from ngrpo_ops.rollout import Decision, Noise, Overlay, decide, gate_schedule

from .checks import require_cache, require_one_vocabulary
from .hooks import EmbeddingMixer

_SCHEDULED_STEPS = 64  # whose gates are drawn at a time


class MixedStep(NamedTuple):
    """The decision of a step for some rows [R]: those that the rate has drawn, or all rows."""

    step: int
    rows: Tensor
    decision: Decision


class LengthRecordingCriteria(StoppingCriteriaList):
    """The criteria of a generation, the user's and generate's own. They remember when each row first met one."""

    lengths: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        now = torch.where(done, input_ids.shape[1], torch.iinfo(torch.int64).max)
        self.lengths = now if self.lengths is None else torch.minimum(self.lengths, now)
        return done

    def padding_mask(self, completion: Tensor, prompt_length: int) -> Tensor:
        """bool [B, T]: what follows the end of a row. Without an end token, generate pads nothing."""
        if self.lengths is None or not any(hasattr(criterion, "eos_token_id") for criterion in self):
            return torch.zeros_like(completion, dtype=torch.bool)
        columns = torch.arange(completion.shape[1], device=completion.device)
        return columns >= (self.lengths.to(completion.device) - prompt_length)[:, None]


class RolloutProcessor(LogitsProcessor):
    """Decides every step of one `generate`, arms the mixer, and keeps the record on the device.

    generate calls the processor after the repetition penalties and before temperature and filters. A token is forced by
    leaving it alone above -inf, which no later filter undoes.

    With the sampler "native" only rows that the rate has drawn are looked at, and torch's generator still draws once a
    step, as without mixing. With "counter_based" every token is decided here, and generate must be told to be greedy.

    Args:
        config: how the rollout mixes.
        mixer: the hooks on the model's input embeddings.
        neighbor_ids: [V, k - 1], or None for a strategy that reads no neighbors.
        vocabulary: the number of token embeddings.
        generation: the resolved generation configuration, as the user asked for it.
        row_ids: int64 [B], what the rows are drawn by.
        prompt_length: columns before the first completion token.
    """

    def __init__(
        self,
        config: MixingConfig,
        mixer: EmbeddingMixer,
        neighbor_ids: Tensor | None,
        vocabulary: int,
        generation: GenerationConfig,
        row_ids: Tensor,
        prompt_length: int,
    ) -> None:
        self.config, self.mixer, self.generation, self.prompt_length = config, mixer, generation, prompt_length
        self.neighbor_ids, self.vocabulary = neighbor_ids, vocabulary
        self.row_ids = row_ids.cpu()
        # A greedy rollout has no temperature: generate does not read the setting then.
        temperature = generation.temperature if generation.do_sample else None
        self.temperature = 1.0 if temperature is None else float(temperature)
        self.filters = _filters(generation)
        self.criteria = LengthRecordingCriteria()
        self.step = 0
        self.thread = threading.get_ident()
        self.mixed_steps: list[MixedStep] = []
        self.logprobs: list[Tensor] = []
        self.logits: Tensor  # the model's own, of the step under way
        self._last_logits: Tensor  # of the last forward
        self._scheduled_rows: list[Tensor] = []  # the rows that the rate draws, for each step of the current block

    @contextmanager
    def watching(self, model: PreTrainedModel) -> Iterator[None]:
        """Within it the processor sees the model's logits and when its rows end."""

        def recording_criteria(*args: Any, **kwargs: Any) -> StoppingCriteriaList:
            if threading.get_ident() != self.thread:  # of another generate on the same model
                return make_criteria(*args, **kwargs)
            self.criteria = LengthRecordingCriteria(make_criteria(*args, **kwargs))
            return self.criteria

        with replaced(model, "_get_stopping_criteria", recording_criteria) as make_criteria:
            hook = model.register_forward_hook(self._keep_logits, with_kwargs=True)
            try:
                yield
            finally:
                hook.remove()
                self.mixer.disarm()  # the mix of the last step is never embedded

    def _keep_logits(self, module: nn.Module, args: tuple, arguments: dict[str, Any], output: Any) -> None:
        """Forward hook on the model: a replay computes the logits before any processor."""
        if threading.get_ident() != self.thread:
            return
        self._last_logits = output.logits[:, -1].detach()
        if not self.step:
            require_cache(arguments, output)

    def _begin(self, device: torch.device) -> None:
        """Puts what every step reads where the logits are, which need not be where the model begins."""
        self.device_row_ids = self.row_ids.to(device)
        self.stop_token_ids = torch.tensor(self.config.stop_token_ids, dtype=torch.int64, device=device)
        self.all_rows = torch.arange(len(self.row_ids), device=device)
        self.stopped = torch.zeros(len(self.row_ids), dtype=torch.bool, device=device)
        if self.neighbor_ids is not None:
            self.neighbor_ids = self.neighbor_ids.to(device)
        self.mixer.expect_decode_steps(len(self.row_ids))

    # A step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.step:
            if self.mixer.armed:
                raise RuntimeError(
                    "the last mix was not embedded: the model's input embeddings were replaced, or remove() was called"
                )
            self._finish_step(input_ids[:, -1])
        else:
            self._begin(scores.device)
        self.logits = self._last_logits.to(scores.device)
        require_one_vocabulary(self.vocabulary, scores.shape[1])
        if self.config.sampler == "counter_based":
            token_ids = self._decide(self.all_rows, scores).token_ids
            scores = torch.full_like(scores, -torch.inf).scatter_(1, token_ids[:, None], 0.0)
        elif (rows := self._drawn_rows()).numel():
            scores = self._force_anchors(rows, scores)
        self.step += 1
        return scores

    def _finish_step(self, token_ids: Tensor) -> None:
        """Takes up what the last step has emitted."""
        self.logprobs.append(selective_log_softmax(self.logits, token_ids, temperature=self.temperature).float())
        if self.stop_token_ids.numel():
            self.stopped = self.stopped | torch.isin(token_ids, self.stop_token_ids)

    def _drawn_rows(self) -> Tensor:
        """The rows that the rate draws at this step. They are known ahead, so that the device is not asked."""
        place = self.step % _SCHEDULED_STEPS
        if place == 0:
            drawn = gate_schedule(self.config, self.row_ids, torch.tensor(self.step, device="cpu"), _SCHEDULED_STEPS).T
            rows = drawn.nonzero()[:, 1].to(self.stopped.device)
            self._scheduled_rows = list(rows.split(drawn.sum(1).tolist()))
        return self._scheduled_rows[place]

    def _decide(self, rows: Tensor, logits: Tensor) -> Decision:
        """Decides the step for `rows` [R] by their `logits` [R, V], keeps the decision and arms the mixer."""
        row_ids = self.device_row_ids[rows]
        decision = decide(
            self.config, logits, self.neighbor_ids, temperature=self.temperature if self.generation.do_sample else 0.0,
            step=self.step, row_ids=row_ids, stopped=self.stopped[rows], filters=self.filters,
        )  # fmt: skip
        self.mixed_steps.append(MixedStep(self.step, rows, decision))
        noise = Noise.of(self.config, row_ids, torch.full_like(row_ids, self.step))
        overlay = Overlay(rows, decision.ids, decision.weights, decision.gate, noise)
        self.mixer.arm_step(len(self.row_ids), overlay)
        return decision

    def _force_anchors(self, rows: Tensor, scores: Tensor) -> Tensor:
        logits = scores[rows]
        decision = self._decide(rows, logits)
        anchors = decision.token_ids[:, None]
        forced = torch.full_like(logits, -torch.inf).scatter_(1, anchors, logits.gather(1, anchors))
        # generate's scores are a copy of the logits, made for the processors; with output_logits it is returned too.
        if self.generation.output_logits or _share_storage(scores, self.logits):
            scores = scores.clone()
        return scores.index_copy_(0, rows, torch.where(decision.gate[:, None], forced, logits))

    # The record

    def record(self, sequences: Tensor) -> MixRecord:
        """The record of the sequences [B, P + T] that generate returned.

        Raises:
            RuntimeError: logits that nothing can be sampled from, a strategy that broke its promise, a mixed step that
                did not emit its anchor, or a `generate` that is not that of transformers.
        """
        if not self.step:
            raise RuntimeError(
                "generate did not call its logits processors: the model's generate is not that of transformers, and "
                "nothing would be mixed"
            )
        completion = sequences[:, self.prompt_length :]
        length = completion.shape[1]
        if self.step <= length:  # generate may have undone the last steps
            self._finish_step(completion[:, self.step - 1])
        logprobs = torch.stack(self.logprobs, dim=1)[:, :length]
        mixed = [step for step in self.mixed_steps if step.step < length]
        if mixed:
            rows = torch.cat([step.rows for step in mixed])
            steps = torch.cat([torch.full_like(step.rows, step.step) for step in mixed])

        def dense(name: str, dtype: torch.dtype, *last: int) -> Tensor:
            """[B, T, *last]: a field of the decisions, by row and step."""
            out = torch.zeros(*completion.shape, *last, dtype=dtype, device=completion.device)
            if mixed:
                out[rows, steps] = torch.cat([getattr(step.decision, name) for step in mixed]).to(dtype)
            return out

        padding = self.criteria.padding_mask(completion, self.prompt_length)
        gate = dense("gate", torch.bool) & ~padding
        ids, weights = dense("ids", torch.int64, self.config.k), dense("weights", torch.float32, self.config.k)
        raise_faults(dense("fault", torch.int32).masked_fill(padding, 0), row_ids=self.row_ids)
        self._require_logprobs(logprobs, padding)
        if bool(((completion != ids[:, :, 0]) & gate).any()):
            raise RuntimeError("a mixed step did not emit its anchor: another logits processor overruled it")
        noise = Noise.of(self.config, self.device_row_ids, torch.zeros_like(self.device_row_ids))
        of_rows = {}  # a record has no steps of its own: a column is its step
        if noise is not None:
            of_rows = {"noise_scale": noise.scale, "noise_seed": noise.seed, "row_ids": noise.row_ids}
        return MixRecord(gate, ids, weights, self.prompt_length, logprobs.masked_fill(padding, 0.0), **of_rows)

    def _require_logprobs(self, logprobs: Tensor, padding: Tensor) -> None:
        unknown = (logprobs.isnan() & ~padding).nonzero().tolist()
        if unknown:
            row, step = min(unknown, key=lambda place: place[::-1])
            raise RuntimeError(
                f"the model's logits at row {int(self.row_ids[row])}, step {step} hold NaN or +inf, or are all -inf: "
                "what was emitted there is no draw from the policy"
            )


def _share_storage(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def _filters(generation: GenerationConfig) -> dict[str, Any]:
    """The filters of a sampled generation, as `decode_step` takes them."""
    if not generation.do_sample:
        return {}
    filters = {"top_k": generation.top_k or None, "top_p": generation.top_p, "min_p": generation.min_p}
    return {name: value for name, value in filters.items() if value is not None}
