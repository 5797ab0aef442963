"""N-GRPO in `transformers`: mixed rollouts with `generate`, and the replay of their embeddings in a forward.

    mixing = NeighborMixing(model, MixingConfig(k=3, mixing_rate=0.1))
    sequences, record = mixing.generate(input_ids, attention_mask=mask, do_sample=True, max_new_tokens=64)
    with mixing.replay(record):
        logits = model(input_ids=sequences, attention_mask=...).logits

One mechanism serves both: a pair of hooks on the input-embedding module, armed for one forward. The first appends the
candidates to the ids, so that there is a single native lookup; the second cuts them off again, mixes them, and writes
the mixed positions out of place. The module's weight is not read in a forward: LoRA, scaled embeddings, gradient
checkpointing and separate reference models each use their own table, and gradients reach every candidate row.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

try:
    from tqdm.auto import tqdm
    from transformers import (
        GenerationConfig,
        LogitsProcessor,
        LogitsProcessorList,
        PreTrainedModel,
        StoppingCriteriaList,
    )
    from transformers.generation import GenerationMode
    from transformers.utils import logging
except ImportError as error:
    raise ImportError(
        "this adapter needs transformers: pip install '.[transformers]' in a checkout of ngrpo_ops"
    ) from error

from ngrpo_ops import (
    MixingConfig,
    MixRecord,
    RefreshReport,
    decode_step,
    gaussian_noise,
    mix_embeddings,
    mixing_candidates,
    raise_faults,
    selective_log_softmax,
)
from ngrpo_ops.random import bernoulli, philox
from ngrpo_ops.rollout import make_table as table_of
from ngrpo_ops.rollout import neighbor_ids as neighbor_ids_of

# The hook pair ----------------------------------------------------------------------------------------------------


@dataclass
class _Noise:
    """Arguments of `gaussian_noise`, each [M]."""

    scale: Tensor
    seed: Tensor
    row_ids: Tensor
    steps: Tensor

    def add_to(self, mixed: Tensor) -> Tensor:
        return gaussian_noise(mixed, self.scale, seed=self.seed, row_ids=self.row_ids, steps=self.steps)


@dataclass
class _Overlay:
    """What a forward writes: the mix of `ids` [M, k] by `weights` [M, k], and its noise, at flat `positions` [M], where
    `gate` [M]."""

    positions: Tensor
    ids: Tensor
    weights: Tensor
    gate: Tensor | None = None  # None: everywhere
    noise: _Noise | None = None


class EmbeddingMixer:
    """The hook pair on one input-embedding module. Idle, it changes nothing."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._next: Callable[[Tensor], _Overlay | None] | None = None  # makes the overlay of the coming forward
        self._now: tuple[Tensor, _Overlay] | None = None  # the ids and overlay of the forward under way
        self.cosines: list[Tensor] = []  # cos(mix, anchor) at each position of the last replay, a tensor a forward
        self._handles = [
            module.register_forward_pre_hook(self._before, with_kwargs=True),
            module.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        """Take the hooks off the module."""
        for handle in self._handles:
            handle.remove()

    def arm_step(self, batch: int, mixed: _Overlay) -> None:
        """The next forward is a decode step of one column, of `batch` rows: mix those of them at `mixed.positions`."""

        def overlay(input_ids: Tensor) -> _Overlay:
            if input_ids.shape != (batch, 1):
                raise RuntimeError(
                    f"a mixed decode step expects input ids of shape {(batch, 1)}, got {tuple(input_ids.shape)}: "
                    "mixing needs the key-value cache and one token a step"
                )
            self._next = None
            return mixed

        self._next = overlay

    @property
    def armed(self) -> bool:
        """Whether there is a mix that no forward has embedded yet."""
        return self._next is not None

    @contextmanager
    def replaying(self, record: MixRecord) -> Iterator[None]:
        """Forwards within replay the record, row by row: all at once, or its rows in order over several forwards.

        Raises:
            RuntimeError: a forward of other columns than the record's, or the record not replayed exactly once.
        """
        done = 0
        self.cosines = []

        def overlay(input_ids: Tensor) -> _Overlay | None:
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
            row, column = part.gate.nonzero(as_tuple=True)
            if not row.numel():
                return None
            noise = None
            if part.row_ids is not None:
                assert part.noise_scale is not None and part.noise_seed is not None
                noise = _Noise(part.noise_scale[row], part.noise_seed[row], part.row_ids[row], column)
            positions = row * columns + record.prompt_length + column
            return _Overlay(positions, part.ids[row, column], part.weights[row, column], noise=noise)

        self._next = overlay
        try:
            yield
        finally:
            self._next = self._now = None
        if done != len(record):
            raise RuntimeError(
                f"only {done} of the record's {len(record)} rows were replayed: the model's forward did not go through "
                "its input embeddings (inputs_embeds, or another model?)"
            )

    @contextmanager
    def replaying_at(self, overlay: _Overlay) -> Iterator[None]:
        """The one forward within replays `overlay`, whose positions count through its flattened ids, packed or not.

        Raises:
            RuntimeError: another token than the anchor at one of the positions; not one forward.
        """
        forwards = 0
        self.cosines = []

        def checked(input_ids: Tensor) -> _Overlay | None:
            nonlocal forwards
            forwards += 1
            if not overlay.positions.numel():
                return None
            if bool((input_ids.flatten()[overlay.positions] != overlay.ids[:, 0]).any()):
                raise RuntimeError("the tokens at a record's positions are not its anchors: it is of other sequences")
            return overlay

        self._next = checked
        try:
            yield
        finally:
            self._next = self._now = None
        if forwards != 1:
            raise RuntimeError(
                f"the model's input embeddings were called {forwards} times, expected once (inputs_embeds, or another "
                "model?): the record was not replayed"
            )

    def disarm(self) -> None:
        self._next = self._now = None

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._next is None:
            return None
        name = None if args else next(iter(kwargs))
        input_ids = args[0] if name is None else kwargs[name]
        overlay = self._next(input_ids)
        if overlay is None:
            return None
        self._now = input_ids, overlay
        extended = torch.cat([input_ids.reshape(-1), overlay.ids.reshape(-1).to(input_ids.dtype)])[None]
        return ((extended, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: extended})

    def _after(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if self._now is None:
            return None
        (input_ids, overlay), self._now = self._now, None
        embedded, rows = output[0, : input_ids.numel()], output[0, input_ids.numel() :]
        local = torch.arange(rows.shape[0], device=rows.device).view(overlay.ids.shape)
        mixed = mix_embeddings(rows, local, overlay.weights)
        if overlay.noise is not None:
            mixed = overlay.noise.add_to(mixed)
        if overlay.gate is not None:
            mixed = torch.where(overlay.gate[:, None], mixed, embedded[overlay.positions])
        else:
            with torch.no_grad():
                anchors = rows.view(*overlay.ids.shape, -1)[:, 0]
                self.cosines.append(torch.cosine_similarity(mixed.float(), anchors.float(), dim=-1))
        # Out of place: the embedding's output may be a leaf that requires grad (enable_input_require_grads).
        return embedded.index_copy(0, overlay.positions, mixed).view(*input_ids.shape, -1)


# The rollout ------------------------------------------------------------------------------------------------------


_GATE_STEPS = 64  # drawn at a time


class _Mixed(NamedTuple):
    """A step's mixed rows [R], those drawn by the rate; `gate` [R] says which of them are mixed in the end."""

    step: int
    rows: Tensor
    gate: Tensor
    ids: Tensor
    weights: Tensor
    fault: Tensor


class _Ends(StoppingCriteriaList):
    """The criteria of a generation, the user's and its own, which remember when each row first met one."""

    lengths: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        now = torch.where(done, input_ids.shape[1], torch.iinfo(torch.int64).max)
        self.lengths = now if self.lengths is None else torch.minimum(self.lengths, now)
        return done

    def padding(self, completion: Tensor, prompt_length: int) -> Tensor:
        """bool, as `completion`: what follows the end of a row. Without an end token generate pads nothing."""
        if self.lengths is None or not any(hasattr(criterion, "eos_token_id") for criterion in self):
            return torch.zeros_like(completion, dtype=torch.bool)
        columns = torch.arange(completion.shape[1], device=completion.device)
        return columns >= (self.lengths.to(completion.device) - prompt_length)[:, None]


class _Rollout(LogitsProcessor):
    """Watches one `generate`: gates and forces anchors, arms the mixer, and keeps the record, on the device.

    It is called after the repetition penalties and before temperature and filters; forcing a token is leaving it alone
    above -inf, which no later filter undoes. With the native sampler only the rows that the rate has drawn are looked
    at, and torch's generator still draws once a step, as without mixing.
    """

    def __init__(self, mixing: NeighborMixing, generation: GenerationConfig, rows: Tensor, prompt_length: int) -> None:
        self.mixing, self.config, self.prompt_length = mixing, mixing.config, prompt_length
        device = mixing.model.device
        self.row_ids, self.device_row_ids = rows.cpu(), rows.to(device)
        self.generation = generation
        # A greedy rollout has no temperature: generate does not read the setting then.
        temperature = generation.temperature if generation.do_sample else None
        self.temperature = 1.0 if temperature is None else float(temperature)
        self.ends = _Ends()
        self.stops = torch.tensor(self.config.stop_token_ids, dtype=torch.int64, device=device)
        self.stopped = torch.zeros(rows.shape[0], dtype=torch.bool, device=device)
        self.step = 0
        self.mixed: list[_Mixed] = []
        self.logprobs: list[Tensor] = []
        self.logits: Tensor  # the model's own, of the step under way
        self.fresh_logits: Tensor  # of the last forward
        self._drawn: list[Tensor] = []  # the rows that the rate has drawn, of each step of the block under way

    def watch(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Forward hook on the model: its logits before any processor, which is what a replay computes."""
        self.fresh_logits = output.logits[:, -1].detach()

    def _finish_step(self, tokens: Tensor) -> None:
        self.logprobs.append(selective_log_softmax(self.logits, tokens, temperature=self.temperature).float())
        if self.stops.numel():
            self.stopped = self.stopped | torch.isin(tokens, self.stops)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.step:
            if self.mixing.mixer.armed:
                raise RuntimeError(
                    "the last mix was not embedded: the model's input embeddings were replaced, or remove() was called"
                )
            self._finish_step(input_ids[:, -1])
        self.logits = self.fresh_logits
        self.mixing.require_vocabulary(scores)
        scores = self._sample(scores) if self.config.sampler == "counter_based" else self._force_anchors(scores)
        self.step += 1
        return scores

    def _force_anchors(self, scores: Tensor) -> Tensor:
        rows = self._rows_drawn()
        if not rows.numel():
            return scores
        of_rows, threshold = scores[rows], self.config.entropy_threshold
        found = mixing_candidates(
            of_rows, self.mixing.neighbor_ids, strategy=self.config.strategy, k=self.config.k,
            temperature=self.temperature if self.generation.do_sample else 0.0,
            mixing_temperature=self.config.temperature, moi_beta=self.config.moi_beta, variant=self.config.variant,
            seed=self.config.seed, step=self.step, row_ids=self.device_row_ids[rows],
            return_entropy=threshold is not None, **(_cuts(self.generation) if self.config.draws else {}),
        )  # fmt: skip
        gate = (found.fault == 0) & ~self.stopped[rows]
        if threshold is not None:
            assert found.entropy is not None
            gate = gate & (found.entropy >= threshold)
        self._keep(_Mixed(self.step, rows, gate, found.ids, found.weights, found.fault))
        emitted = found.ids[:, :1]
        forced = torch.full_like(of_rows, -torch.inf).scatter_(1, emitted, of_rows.gather(1, emitted))
        # generate's scores are a copy of the logits, made for the processors; with output_logits it is returned too.
        if self.generation.output_logits or _share_memory(scores, self.logits):
            scores = scores.clone()
        return scores.index_copy_(0, rows, torch.where(gate[:, None], forced, of_rows))

    def _rows_drawn(self) -> Tensor:
        """The rows that the rate draws at this step: known ahead, and so without asking the device for anything."""
        place = self.step % _GATE_STEPS
        if place == 0:
            steps = torch.arange(self.step, self.step + _GATE_STEPS)[:, None]
            gates = bernoulli(philox(torch.tensor(self.config.seed), self.row_ids, steps)[0], self.config.mixing_rate)
            rows = gates.nonzero()[:, 1].to(self.stopped.device)
            self._drawn = list(rows.split(gates.sum(1).tolist()))
        return self._drawn[place]

    def _sample(self, scores: Tensor) -> Tensor:
        """Every token is ours, and generate, told to be greedy, finds it alone."""
        out = decode_step(
            scores, None, self.mixing.neighbor_ids, mixing_rate=self.config.mixing_rate,
            temperature=self.temperature if self.generation.do_sample else 0.0, seed=self.config.seed, step=self.step,
            row_ids=self.device_row_ids, enabled=~self.stopped, strategy=self.config.strategy, k=self.config.k,
            mixing_temperature=self.config.temperature, entropy_threshold=self.config.entropy_threshold,
            moi_beta=self.config.moi_beta, variant=self.config.variant, **_cuts(self.generation),
        )  # fmt: skip
        rows = torch.arange(scores.shape[0], device=scores.device)
        self._keep(_Mixed(self.step, rows, out.gate, out.ids, out.weights, out.fault))
        return torch.full_like(scores, -torch.inf).scatter_(1, out.token_ids[:, None], 0.0)

    def _keep(self, mixed: _Mixed) -> None:
        self.mixed.append(mixed)
        noise = None
        if self.config.strategy == "gaussian":
            scale, seed = (x[mixed.rows] for x in self._noise())
            row_ids = self.device_row_ids[mixed.rows]
            noise = _Noise(scale, seed, row_ids, torch.full_like(row_ids, self.step))
        overlay = _Overlay(mixed.rows, mixed.ids, mixed.weights, mixed.gate, noise)
        self.mixing.mixer.arm_step(self.stopped.shape[0], overlay)

    def _noise(self) -> tuple[Tensor, Tensor]:
        """Scale and seed of every row."""
        scale = 0.33 if self.config.noise_scale is None else self.config.noise_scale
        return (
            torch.full_like(self.device_row_ids, scale, dtype=torch.float32),
            torch.full_like(self.device_row_ids, self.config.seed),
        )

    def record(self, sequences: Tensor) -> MixRecord:
        """The record of what was returned."""
        completion = sequences[:, self.prompt_length :]
        length = completion.shape[1]
        if self.step <= length:  # generate may have undone the last steps
            self._finish_step(completion[:, self.step - 1])
        logprobs = torch.stack(self.logprobs, dim=1)[:, :length]

        def filled(shape: tuple[int, ...], name: str, dtype: torch.dtype) -> Tensor:
            out = torch.zeros(shape, dtype=dtype, device=completion.device)
            if mixed:
                out[rows, steps] = torch.cat([getattr(step, name) for step in mixed]).to(dtype)
            return out

        mixed = [step for step in self.mixed if step.step < length]
        if mixed:
            rows = torch.cat([step.rows for step in mixed])
            steps = torch.cat([torch.full_like(step.rows, step.step) for step in mixed])
        shape = tuple(completion.shape)
        ended = self.ends.padding(completion, self.prompt_length)
        gate = filled(shape, "gate", torch.bool) & ~ended
        ids = filled((*shape, self.config.k), "ids", torch.int64)
        weights = filled((*shape, self.config.k), "weights", torch.float32)
        raise_faults(filled(shape, "fault", torch.int32).masked_fill(ended, 0), row_ids=self.row_ids)
        unknown = (logprobs.isnan() & ~ended).nonzero().tolist()
        if unknown:
            row, step = min(unknown, key=lambda place: place[::-1])
            raise RuntimeError(
                f"the model's logits at row {int(self.row_ids[row])}, step {step} hold NaN or +inf, or are all -inf: "
                "what was emitted there is no draw from the policy"
            )
        if bool(((completion != ids[:, :, 0]) & gate).any()):
            raise RuntimeError("a mixed step did not emit its anchor: another logits processor overruled it")
        noise = {}
        if self.config.strategy == "gaussian":
            noise = dict(zip(("noise_scale", "noise_seed"), self._noise(), strict=True))
            noise["row_ids"] = self.device_row_ids
        return MixRecord(gate, ids, weights, self.prompt_length, logprobs.masked_fill(ended, 0.0), **noise)


def _share_memory(x: Tensor, y: Tensor) -> bool:
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def _cuts(generation: GenerationConfig) -> dict[str, Any]:
    """What of the distribution a sampled generation keeps, as `decode_step` takes it."""
    if not generation.do_sample:
        return {}
    cuts = {"top_k": generation.top_k or None, "top_p": generation.top_p, "min_p": generation.min_p}
    return {name: value for name, value in cuts.items() if value is not None}


def refuse_generation(generation: GenerationConfig, arguments: dict[str, Any]) -> None:
    """Refuse what would silently not mix, or mix wrongly.

    Args:
        generation: the resolved generation configuration.
        arguments: further arguments of `generate`.

    Raises:
        ValueError: the setting, its value and the reason.
    """
    mode = generation.get_generation_mode(arguments.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"generation mode {mode.value!r} cannot be mixed: beams reorder rows and assisted decoding proposes "
            "several tokens a step; use greedy search or sampling (num_beams=1, no assistant_model, no "
            "prompt_lookup_num_tokens)"
        )
    if generation.use_cache is False:
        raise ValueError("use_cache=False cannot be mixed: every step would embed the plain ids of earlier steps again")
    if generation.guidance_scale not in (None, 1, 1.0):
        raise ValueError(
            f"guidance_scale={generation.guidance_scale} cannot be mixed: its second forward a step embeds plain ids"
        )
    if generation.cache_implementation == "paged":
        raise ValueError("cache_implementation='paged' (continuous batching) cannot be mixed: it ignores the hooks")
    if generation.compile_config is not None:
        raise ValueError("compile_config must be None: the armed hooks are not part of a compiled forward")
    if generation.token_healing:
        raise ValueError("token_healing cannot be mixed: it rewrites the prompt")
    for name in ("inputs_embeds", "custom_generate", "inputs"):
        if arguments.get(name) is not None:
            raise ValueError(f"{name} cannot be mixed: pass the prompt as input_ids")
    cache = arguments.get("past_key_values")
    if cache is not None and cache.get_seq_length():
        raise ValueError(
            f"past_key_values must be empty, got a cache of {cache.get_seq_length()} tokens: these may have been "
            "mixed, no record would say so, and they would be replayed as plain ids"
        )


# And the values that leave them off.
_NATIVE_ONLY = {
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
    "watermarking_config": (None,),
    "renormalize_logits": (None, False),
}


def refuse_unsupported_filters(generation: GenerationConfig) -> None:
    """Refuse settings of a sampled generation that the sampler "ngrpo", and strategies that draw, do not have.

    Raises:
        ValueError: the setting and its value.
    """
    for name, off in _NATIVE_ONLY.items():
        value = getattr(generation, name, None)
        if generation.do_sample and value not in off:
            raise ValueError(
                f"{name}={value} is not supported by sampler 'ngrpo' nor by strategies that draw, which have "
                "temperature, top_k, top_p and min_p: leave it out, or take sampler 'native' and another strategy"
            )


class NeighborMixing:
    """N-GRPO rollouts and replays on a causal language model of `transformers`.

    Args:
        model: a decoder-only model with an input-embedding module, plain or wrapped by PEFT.
        config: see `MixingConfig`.

    Raises:
        TypeError, ValueError: not a model, an encoder-decoder, PEFT prompt learning, token ids beyond its vocabulary.
    """

    def __init__(self, model: Any, config: MixingConfig | None = None) -> None:
        self.config = MixingConfig() if config is None else config
        if not isinstance(self.config, MixingConfig):
            raise TypeError(f"config must be a MixingConfig, got {type(config).__name__}")
        self.model = model
        # `generate` of a PEFT wrapper runs the loop, and so the forwards, of the model inside.
        self._inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not isinstance(self._inner, PreTrainedModel):
            raise TypeError(f"model must be a transformers model, or one wrapped by PEFT, got {type(model).__name__}")
        if self._inner.config.is_encoder_decoder:
            raise ValueError(f"model must be decoder-only, got the encoder-decoder {type(self._inner).__name__}")
        for name, peft in getattr(model, "peft_config", {}).items():
            if getattr(peft, "is_prompt_learning", False):
                raise ValueError(
                    f"model has the prompt-learning PEFT adapter {name!r} ({type(peft).__name__}): its virtual tokens "
                    "shift every position; use LoRA or full fine-tuning"
                )
        self._mixers: dict[nn.Module, EmbeddingMixer] = {}
        self.mixer = self.attach(model)
        self.vocabulary = _vocabulary_size(model)
        self.config.require_vocabulary(self.vocabulary)
        self.table = table_of(self.config, self.vocabulary)
        self.next_row = 0
        """Id of the next generated row; it advances with every rollout, so that no two share their gates."""

    def attach(self, model: Any) -> EmbeddingMixer:
        """Let `replay` run on a further model too, a reference model with a table of its own.

        Raises:
            ValueError: its vocabulary is another one.
        """
        embeddings = model.get_input_embeddings()
        if embeddings not in self._mixers:
            if self._mixers and _vocabulary_size(model) != self.vocabulary:
                raise ValueError(
                    f"model has {_vocabulary_size(model)} token embeddings but the policy {self.vocabulary}: the "
                    "record's ids would name other tokens; both need the same vocabulary"
                )
            self._mixers[embeddings] = EmbeddingMixer(embeddings)
        return self._mixers[embeddings]

    def remove(self) -> None:
        """Take every hook off again."""
        for mixer in self._mixers.values():
            mixer.remove()
        self._mixers.clear()

    @torch.no_grad()
    def refresh(self) -> RefreshReport | None:
        """Bring the neighbour table up to date with the model's current input embeddings; `generate` does it itself.

        The table is that of the embedding *module*: scaled where the model scales it, merged where LoRA adapts it.
        Where its rows are sharded (FSDP2, DeepSpeed ZeRO-3) every rank must call this.
        """
        if self.table is None:
            return None
        quiet = not logging.is_progress_bar_enabled()
        with (
            _input_table(self._inner.get_input_embeddings(), self.vocabulary) as embedding,
            tqdm(desc="neighbour table", unit="row", delay=5, leave=False, disable=quiet) as bar,
        ):

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return self.table.refresh(embedding, progress=progress)

    @property
    def neighbor_ids(self) -> Tensor | None:
        """[V, k - 1], as `decode_step` takes them; None for a strategy that has no neighbours."""
        return neighbor_ids_of(self.config, self.table, self.vocabulary, self._inner.device)

    def require_vocabulary(self, scores: Tensor) -> None:
        """
        Raises:
            ValueError: the model's head has another vocabulary than its embeddings.
        """
        if scores.shape[1] != self.vocabulary:
            raise ValueError(
                f"the model has {self.vocabulary} token embeddings but {scores.shape[1]} logits: two vocabularies that "
                "differ cannot be mixed (resize_token_embeddings makes them equal)"
            )

    @contextmanager
    def rollouts(self, row_ids: Tensor | None = None) -> Iterator[list[MixRecord]]:
        """Within it, `model.generate` mixes; the list yielded gains a record with every call.

        For trainers that call `generate` themselves; `generate` of this class is the direct way.

        Args:
            row_ids: int64 [B], what the gates of each row are drawn by; None: the next unused ones.
        """
        records: list[MixRecord] = []
        original, patched = self.model.generate, vars(self.model).get("generate")

        def generate(*args: Any, **kwargs: Any) -> Any:
            output, record = self._generate(original, row_ids, *args, **kwargs)
            records.append(record)
            return output

        self.model.generate = generate
        try:
            yield records
        finally:
            del self.model.generate  # the class's method is back, or what the user had put in its place
            if patched is not None:
                self.model.generate = patched

    def generate(self, input_ids: Tensor, *, row_ids: Tensor | None = None, **kwargs: Any) -> tuple[Any, MixRecord]:
        """`model.generate` with mixing.

        Args:
            input_ids: int64 [B, P], left-padded prompts.
            row_ids: int64 [B x num_return_sequences], see `rollouts`.
            **kwargs: what `generate` takes; beams, assisted decoding, use_cache=False and the like are refused.

        Returns:
            What `generate` returns, and the record of its rows.

        Raises:
            ValueError: a refused setting, an empty batch; two vocabularies that differ.
        """
        return self._generate(self.model.generate, row_ids, input_ids=input_ids, **kwargs)

    def _generate(
        self, generate: Callable[..., Any], row_ids: Tensor | None, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, MixRecord]:
        if input_ids is None or input_ids.dim() != 2 or input_ids.numel() == 0:
            got = None if input_ids is None else tuple(input_ids.shape)
            raise ValueError(f"input_ids must be a non-empty [B, P], got {got}")
        model = self._inner
        arguments = dict(kwargs)
        generation, _ = model._prepare_generation_config(arguments.pop("generation_config", None), **arguments)
        refuse_generation(generation, kwargs)
        if self.config.draws:
            refuse_unsupported_filters(generation)
        rows = input_ids.shape[0] * (generation.num_return_sequences or 1)
        if row_ids is None:
            row_ids = torch.arange(self.next_row, self.next_row + rows)
            self.next_row += rows
        if row_ids.shape != (rows,):
            raise ValueError(f"row_ids must be [{rows}], one for each returned sequence, got {tuple(row_ids.shape)}")
        self.refresh()
        rollout = _Rollout(self, generation, row_ids, input_ids.shape[1])
        processors = LogitsProcessorList([*(kwargs.pop("logits_processor", None) or ()), rollout])
        changed: dict[str, Any] = {"disable_compile": True}
        if self.config.sampler == "counter_based":  # what generate itself samples by is ours
            changed |= {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "min_p": None}
            changed["num_return_sequences"] = 1  # of greedy ones it makes no more, so they are made here
            inputs = {name: value for name, value in kwargs.items() if not hasattr(generation, name)}
            input_ids, inputs = model._expand_inputs_for_generation(
                rows // input_ids.shape[0], input_ids=input_ids, **inputs
            )
            kwargs |= inputs
        if kwargs.get("generation_config") is None:
            kwargs.update(changed)
        else:  # generate takes a configuration or settings, not both
            kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
            for name, value in changed.items():
                setattr(kwargs["generation_config"], name, value)
                kwargs.pop(name, None)
        criteria = model._get_stopping_criteria

        def watched_criteria(*args: Any, **kwargs: Any) -> _Ends:
            rollout.ends = _Ends(criteria(*args, **kwargs))
            return rollout.ends

        model._get_stopping_criteria = watched_criteria
        watching = model.register_forward_hook(rollout.watch)
        try:
            output = generate(input_ids=input_ids, logits_processor=processors, **kwargs)
        finally:
            watching.remove()
            del model._get_stopping_criteria  # the class's method is back
            self.mixer.disarm()  # the last armed step is never embedded
        sequences = output if isinstance(output, Tensor) else output.sequences
        return output, rollout.record(sequences)

    @contextmanager
    def replay(self, record: MixRecord, model: nn.Module | None = None) -> Iterator[None]:
        """Within it, a forward of the sequences [B, P + T] sees the rollout's own input embeddings.

        The candidates are looked up in the table of today, so gradients reach them. The rows may be spread over
        several forwards, in order; each must be replayed exactly once before the context ends.

        Args:
            record: as `generate` returned it, or cut and padded as the batch was.
            model: the model whose forward it is; None: the policy. Another one is attached first.

        Raises:
            RuntimeError: a forward of another shape, or rows left over.
        """
        mixer = self.mixer if model is None else self.attach(model)
        with mixer.replaying(record):
            yield

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint must keep for the gates to go on where they were."""
        return {"next_row": self.next_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next_row = int(state["next_row"])


def _vocabulary_size(model: Any) -> int:
    module = model.get_input_embeddings()
    weight = getattr(module, "base_layer", module).weight
    return getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 leaves an empty tensor and notes the shape


@contextmanager
def _input_table(module: Any, vocabulary: int) -> Iterator[Tensor]:
    """[V, d], what the module embeds every token as; a DTensor where it only looks up rows, and they are sharded."""
    with _gathered(module):
        weight = getattr(module, "base_layer", module).weight
        if type(module).forward is nn.Embedding.forward:  # FSDP2 makes a class of its own, with this forward
            yield module.weight
            return
        ids = torch.arange(vocabulary, device=weight.device)
        if not isinstance(weight, DTensor):
            yield module(ids)
            return
        # FSDP2's own gathering begins with a forward of the whole model, so this goes around its hooks.
        whole = {f"module.{name}": parameter.full_tensor() for name, parameter in module.named_parameters()}
        yield functional_call(_Unhooked(module), whole, (ids,))


class _Unhooked(nn.Module):
    """A module's forward without the hooks on its call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module.forward(*args)


@contextmanager
def _gathered(module: nn.Module) -> Iterator[None]:
    """Within it the parameters that DeepSpeed ZeRO-3 has partitioned are whole, as they may already be."""
    partitioned = [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id") and not len(parameter)]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield
