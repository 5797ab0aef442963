"""N-GRPO in vLLM: rollouts that mix, and the records that replay them. A plugin, loaded with ``ngrpo-ops[vllm]``.

    llm = LLM(model, **engine_kwargs(MixingConfig(k=3, mixing_rate=0.1)))
    asked = [SamplingParams(max_tokens=64, extra_args=request_kwargs(row)) for row in range(len(prompts))]
    outputs = llm.generate(prompts, asked)
    record = take_records(llm, range(len(prompts)), [len(output.outputs[0].token_ids) for output in outputs])

An engine mixes if it was started with `engine_kwargs`, and then those requests that carry `request_kwargs`; all
others are sampled as without the plugin. A mixed token's embedding is formed where the model's input is prepared: in a
buffer that stays where it is, so that captured CUDA graphs read it. One rule serves decoding, chunked prefill and the
prefill that follows a preemption: every scheduled token whose step was mixed is overlaid from its record. Which steps
the rate draws is known on the host ahead of time, so no step waits for the device, and a step without mixes costs a
lookup. `SamplingParams.n` > 1 gives the i-th sequence the row id + i.

Model Runner V2 only. What cannot be mixed is refused when the engine is configured, or when a request comes in.
"""

from __future__ import annotations

import functools
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

try:
    import vllm
except ImportError as error:
    raise ImportError("this adapter needs vLLM: pip install '.[vllm]' in a checkout of ngrpo_ops") from error

from ngrpo_ops import (
    MixingConfig,
    MixRecord,
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
from ngrpo_ops.strategies import get_strategy
from ngrpo_ops.versions import TESTED, is_tested

KEY = "ngrpo_ops"
"""Under which an engine's `additional_config` and a request's `extra_args` hold what is ours."""

_GATE_STEPS = 256  # drawn at a time
_TAKE = "take_mix_records"  # the workers' method

# The caller's side ------------------------------------------------------------------------------------------------


def engine_kwargs(config: MixingConfig) -> dict[str, Any]:
    """Arguments of `LLM` or `EngineArgs` for an engine that can mix. Prefix caching is off in them, see `register`."""
    return {"additional_config": {KEY: asdict(config)}, "enable_prefix_caching": False}


def request_kwargs(row_id: int) -> dict[str, Any]:
    """`SamplingParams.extra_args` of a request that is to be mixed.

    Args:
        row_id: int64, what its gates are drawn by, and what its record is taken by: no two requests in flight, or
            whose records are still to be taken, may share one.
    """
    return {KEY: {"row_id": int(row_id)}}


def request_seed(seed: int, row_id: int) -> int:
    """`SamplingParams.seed` by which a row's tokens do not depend on when, and beside what, it is sampled."""
    words = philox(torch.tensor(seed), torch.tensor(row_id), torch.tensor(-1))  # no step has this number
    return int(words[0]) << 31 | int(words[1]) >> 1


def take_records(llm: Any, row_ids: Sequence[int], lengths: Sequence[int]) -> MixRecord:
    """The record of finished requests, of an engine with a `collective_rpc` method (`LLM`). The engine forgets them.

    For an asynchronous engine: ``read_records(await engine.collective_rpc(*records_call(row_ids, lengths)))``.

    Args:
        row_ids: those of the requests; with n > 1, of every sequence.
        lengths: how many tokens each request returned; 0 for an aborted one, whose record is only forgotten.

    Returns:
        MixRecord: B rows in the order of `row_ids`, T the largest length; on the CPU, with prompt_length 0.

    Raises:
        RuntimeError: logits that nothing can be sampled from, at a mixed step.
        ValueError: a row of which the engine has no record of that length.
    """
    method, _, args = records_call(row_ids, lengths)
    return read_records(llm.collective_rpc(method, args=args))


def require_mixing(llm: Any) -> None:
    """
    Raises:
        ValueError: an engine, of those that `take_records` takes, that cannot mix.
    """
    try:
        take_records(llm, [], [])
    except (NotImplementedError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the engine cannot mix, the plugin 'ngrpo_ops' was not loaded in it ({error}): is ngrpo-ops installed, "
            "and is it among VLLM_PLUGINS where that is set?"
        ) from error


def records_call(row_ids: Sequence[int], lengths: Sequence[int]) -> tuple[str, None, tuple[list[int], list[int]]]:
    """The arguments of `collective_rpc` (method, timeout, args) that fetch records, for `read_records`."""
    if len(row_ids) != len(lengths):
        raise ValueError(f"lengths must be one for each of the {len(row_ids)} row_ids, got {len(lengths)}")
    if len(set(row_ids)) != len(row_ids):
        raise ValueError(f"row_ids must be different from each other, got {list(row_ids)}")
    return _TAKE, None, ([int(row) for row in row_ids], [int(length) for length in lengths])


def read_records(replies: Sequence[bytes]) -> MixRecord:
    """What the workers answered, as a record; see `take_records`. All tensor-parallel workers hold the same."""
    content = torch.load(io.BytesIO(replies[0]), weights_only=True)
    if shared := content.pop("shared"):
        raise ValueError(f"row {shared[0]}: the engine has several requests of this row_id, and no two may share one")
    missing = content.pop("missing")
    if missing:
        row, length, found = missing[0]
        raise ValueError(
            f"row {row}: the engine has a record of {found} steps, asked for {length}: was the request sent with "
            "request_kwargs(row_id), is it finished, and were its records not taken before?"
        )
    raise_faults(content.pop("fault"), row_ids=content["row_ids"])
    if "noise_scale" not in content:
        del content["row_ids"]
    return MixRecord(**content, prompt_length=0)


# The plugin -------------------------------------------------------------------------------------------------------


def register() -> None:
    """The entry point in group ``vllm.general_plugins``: vLLM calls it in every one of its processes.

    An engine without `engine_kwargs` is left as it is. Of one with them is refused, when it is configured:
    another vLLM than the tested, Model Runner V1, pipeline parallelism, speculative decoding, batch-sharded sampling,
    context parallelism, data parallelism within the engine, KV connectors, trace replay, prompt embeddings, LoRA on the
    embedding, multi-modal models. A request to mix is refused where the engine was not
    told to, and where prefix caching is on and the prompt has no `cache_salt` of its own: cached blocks are found by
    token ids alone, and would be taken for those of another mix.
    """
    from vllm.engine.arg_utils import EngineArgs

    if _is_ours(EngineArgs.create_engine_config):
        return
    _wrap(EngineArgs, "create_engine_config", _checked_configuration)
    if not _is_tested():
        return
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.parallel_sampling import ParentRequest
    from vllm.v1.worker.gpu import model_states
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.worker_base import WorkerBase

    _wrap(InputProcessor, "process_inputs", _checked_request)
    _wrap(ParentRequest, "get_child_info", _numbered_child)
    _wrap(model_states, "resolve_model_state_cls", _mixing_model_state)
    for name in ("reload_weights", "finish_weight_update"):
        _wrap(Worker, name, _noticed_update)
    setattr(WorkerBase, _TAKE, _take)


def _is_tested() -> bool:
    return is_tested("vllm", vllm.__version__)


def _is_ours(function: Any) -> bool:
    return getattr(function, "_of_ngrpo_ops", False)


def _wrap(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    original = getattr(owner, name)
    wrapped = functools.wraps(original)(make(original))
    wrapped._of_ngrpo_ops = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _settings(vllm_config: Any) -> dict[str, Any] | None:
    additional = vllm_config.additional_config
    return additional.get(KEY) if isinstance(additional, dict) else None


def _config_of(settings: Any) -> MixingConfig:
    known = {field.name for field in fields(MixingConfig)}
    if not isinstance(settings, dict) or not set(settings) <= known:
        raise ValueError(f"additional_config[{KEY!r}] must hold fields of MixingConfig, got {settings!r}")
    return MixingConfig(**settings)


def _checked_configuration(original: Callable) -> Callable:
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = original(self, *args, **kwargs)
        if (settings := _settings(vllm_config)) is not None:
            refuse_engine(vllm_config, _config_of(settings))
        return vllm_config

    return create_engine_config


def refuse_engine(vllm_config: Any, config: MixingConfig) -> None:
    """
    Raises:
        ValueError: an engine that would not mix, or not rightly; see `register`.
    """
    if not _is_tested():
        raise ValueError(
            f"vLLM {vllm.__version__} is not tested with this version of ngrpo-ops, which mixes in vLLM "
            f"{TESTED['vllm']}: the classes it extends are private to vLLM"
        )
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    refused = {
        "Model Runner V1": (
            not vllm_config.use_v2_model_runner,
            "it has no hook for a model's input embeddings; set VLLM_USE_V2_MODEL_RUNNER=1, or remove what made vLLM "
            "fall back to it",
        ),
        "pipeline_parallel_size > 1": (
            parallel.pipeline_parallel_size > 1,
            "tokens are sampled on the last stage and embedded on the first",
        ),
        "speculative_config": (
            vllm_config.speculative_config is not None,
            "a drafted token is embedded before it is known whether its step is mixed",
        ),
        "enable_batch_sharded_sampling": (
            bool(parallel.enable_batch_sharded_sampling),
            "each rank would know the mixes of its own rows alone",
        ),
        "context parallelism": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "a rank embeds a part of each sequence; not supported",
        ),
        "data_parallel_size > 1": (
            parallel.data_parallel_size > 1,
            "the records of the other engines would not be fetched; start an engine for each replica",
        ),
        "kv_transfer_config": (
            vllm_config.kv_transfer_config is not None,
            "a connector finds blocks by token ids alone, and would take those of another mix",
        ),
        "enable_trace_replay": (
            model.enable_trace_replay,
            "the trace's tokens take the place of the anchors after these were mixed",
        ),
        "enable_prompt_embeds": (model.enable_prompt_embeds, "a prompt of embeddings has no ids to mix among"),
        "multi-modal models": (model.is_multimodal_model, "their input embeddings are not the token table's"),
    }
    for name, (is_set, reason) in refused.items():
        if is_set:
            raise ValueError(f"{name} cannot be mixed: {reason}")
    config.require_vocabulary(model.get_vocab_size())


def _row_id_of(sampling_params: Any) -> int | None:
    extra = getattr(sampling_params, "extra_args", None) or {}
    if KEY not in extra:
        return None
    asked = extra[KEY]
    if not isinstance(asked, dict) or set(asked) != {"row_id"} or type(asked["row_id"]) is not int:
        raise ValueError(f"extra_args[{KEY!r}] must be what request_kwargs(row_id) returns, got {asked!r}")
    return asked["row_id"]


def _checked_request(original: Callable) -> Callable:
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        if _row_id_of(request.sampling_params) is None:
            return request
        if _settings(self.vllm_config) is None:
            raise ValueError(
                f"extra_args[{KEY!r}] asks to mix, but the engine was not started with engine_kwargs(MixingConfig())"
            )
        if self.vllm_config.cache_config.enable_prefix_caching and (
            request.cache_salt is None or request.sampling_params.n > 1
        ):
            raise ValueError(
                "a mixed request needs enable_prefix_caching=False, or a cache_salt of its own and n = 1: cached "
                "blocks are found by token ids alone, and those of another mix would be taken for its own"
            )
        return request

    return process_inputs


def _numbered_child(original: Callable) -> Callable:
    def get_child_info(self: Any, index: int) -> Any:
        request_id, params = original(self, index)
        row_id = _row_id_of(params)
        if row_id is not None:
            params = params.clone()
            params.extra_args = {**params.extra_args, **request_kwargs(row_id + index)}
        return request_id, params

    return get_child_info


def _take(worker: Any, row_ids: list[int], lengths: list[int]) -> bytes:
    mixer = getattr(worker.model_runner.model_state, "mixer", None)
    if mixer is None:
        raise ValueError("this engine was not started with engine_kwargs(MixingConfig())")
    return mixer.take(row_ids, lengths)


def _noticed_update(original: Callable) -> Callable:
    """Of a worker's methods by which weights may also come in past the model's `load_weights`."""

    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:  # some may have come in before it failed
            mixer = getattr(getattr(self.model_runner, "model_state", None), "mixer", None)
            if mixer is not None:
                mixer.notice_weights()

    return update


def _mixing_model_state(original: Callable) -> Callable:
    def resolve_model_state_cls(vllm_config: Any, model: nn.Module) -> type:
        found = original(vllm_config, model)
        if _settings(vllm_config) is None:
            return found
        return type(f"Mixing{found.__name__}", (_MixingModelState, found), {})

    return resolve_model_state_cls


class _MixingModelState:
    """In front of the model's own `ModelState`: it hands the engine's calls to an `EngineMixer`."""

    def __init__(self, vllm_config: Any, model: nn.Module, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)  # type: ignore[call-arg]
        self.mixer = EngineMixer(_config_of(_settings(vllm_config)), vllm_config, model, device)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        self.mixer.add(req_index, new_req_data)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)  # type: ignore[misc]
        self.mixer.remove(req_id)

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        is_real = input_batch.req_ids[0] in req_states.req_id_to_index  # else the engine warms up or keeps in step
        buffer = self.mixer.embed(input_batch, is_real)
        return super().prepare_inputs(input_batch, req_states) | self._inputs(buffer, input_batch.input_ids)  # type: ignore[misc]

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return super().prepare_dummy_inputs(num_reqs, num_tokens) | self._inputs(self.mixer.buffer[:num_tokens])  # type: ignore[misc]

    def _inputs(self, buffer: Tensor, input_ids: Tensor | None = None) -> dict[str, Any]:
        from vllm.model_executor.models.interfaces import requires_raw_input_tokens

        if requires_raw_input_tokens(self.mixer.model):
            return {"inputs_embeds": buffer} | ({} if input_ids is None else {"input_ids": input_ids})
        return {"inputs_embeds": buffer, "input_ids": None}

    def custom_sampler(self, sampler: Any) -> Any:
        custom = super().custom_sampler(sampler)  # type: ignore[misc]
        if custom is not None:
            raise ValueError(f"{type(self).__name__} has a sampler of its own, which does not mix")
        original = sampler.sample

        def sample(logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            sampled, processed = original(logits, *args, **kwargs)
            return self.mixer.force(sampler, logits, sampled, processed)

        sampler.sample = sample
        return None


# The engine's side ------------------------------------------------------------------------------------------------


@dataclass
class _Kept:
    """The record of a request that is not in a slot: finished, or preempted and to be resumed."""

    req_id: str
    entries: np.ndarray


class EngineMixer:
    """The mixing of one engine's worker: gates, anchors, records, and the buffer of input embeddings.

    Every sampled token of a mixed request has an entry in a pool on the device: candidates, weights, gate, fault and
    log-probability. The host knows which entry belongs to which slot and position. Positions are absolute: position p's
    entry says how the token at p was chosen and, if its gate is set, what is embedded there.
    """

    def __init__(self, config: MixingConfig, vllm_config: Any, model: Any, device: torch.device) -> None:
        self.config, self.model, self.device = config, model, device
        engine, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        self.vocabulary = engine.get_vocab_size()
        self.buffer = torch.zeros(
            scheduler.max_num_batched_tokens, engine.get_inputs_embeds_size(), dtype=engine.dtype, device=device
        )
        slots, length = scheduler.max_num_seqs, engine.max_model_len
        self._slots: dict[str, int] = {}  # of the mixed requests
        self._req_ids: dict[int, str] = {}
        self._mixes = np.zeros(slots, dtype=bool)
        self._row_ids = np.zeros(slots, dtype=np.int64)
        self._first = np.zeros(slots, dtype=np.int64)  # the position of the first completion token
        self._drawn = np.zeros((slots, length), dtype=bool)
        self._drawn_until = np.zeros(slots, dtype=np.int64)
        self._entries = np.full((slots, length), -1, dtype=np.int32)
        self._kept: dict[int, _Kept] = {}
        self._pool = _Pool(config.k, device)
        self._batch: Any = None  # the one under way
        self.table = table_of(config, self.vocabulary)
        self._stale = True
        self._embedding()  # whether there is one to search
        self._watch_weights()

    # Made with the first use: what is allocated while the model loads is lost when a trainer lets the engine sleep.

    @functools.cached_property
    def _stops(self) -> Tensor:
        return torch.tensor(self.config.stop_token_ids, dtype=torch.int64, device=self.device)

    @functools.cached_property
    def _stopped(self) -> Tensor:
        """bool [slots]: whose requests have emitted one of `_stops`."""
        return torch.zeros(len(self._mixes), dtype=torch.bool, device=self.device)

    # Requests

    def add(self, slot: int, request: Any) -> None:
        row_id = _row_id_of(request.sampling_params)
        self._mixes[slot] = row_id is not None
        if row_id is None:
            return
        kept = self._kept.pop(row_id, None)
        if kept is not None and kept.req_id != request.req_id:  # never taken
            self._pool.free(kept.entries)
            kept = None
        first = request.prompt_len
        self._slots[request.req_id], self._req_ids[slot] = slot, request.req_id
        self._row_ids[slot], self._first[slot] = row_id, first
        self._drawn[slot] = False
        self._drawn_until[slot] = first
        self._entries[slot] = -1
        emitted = request.prefill_token_ids[first:]
        if kept is not None:
            self._entries[slot, first : first + len(kept.entries)] = kept.entries
        self._draw(np.array([slot]), first + len(emitted))
        if self._stops.numel():
            self._stopped[slot] = bool(set(emitted) & set(self.config.stop_token_ids))

    def remove(self, req_id: str) -> None:
        slot = self._slots.pop(req_id, None)
        if slot is None:
            return
        del self._req_ids[slot]
        self._mixes[slot] = False
        row_id = int(self._row_ids[slot])
        if row_id in self._kept:  # never taken
            self._pool.free(self._kept[row_id].entries)
        self._kept[row_id] = _Kept(req_id, self._written(slot).copy())

    def _written(self, slot: int) -> np.ndarray:
        entries = self._entries[slot, self._first[slot] :]
        ends = np.flatnonzero(entries < 0)
        return entries[: ends[0]] if len(ends) else entries

    def _draw(self, slots: np.ndarray, position: int) -> None:
        """Gates of these slots, up to a position at the least."""
        limit = self._drawn.shape[1]
        while True:
            behind = slots[(self._drawn_until[slots] <= position) & (self._drawn_until[slots] < limit)]
            if not len(behind):
                return
            steps = (self._drawn_until - self._first)[behind][:, None] + np.arange(_GATE_STEPS)
            words = philox(
                torch.tensor(self.config.seed), torch.from_numpy(self._row_ids[behind])[:, None],
                torch.from_numpy(steps),
            )  # fmt: skip
            drawn = bernoulli(words[0], self.config.mixing_rate).numpy()
            for slot, gates in zip(behind, drawn, strict=True):
                start = int(self._drawn_until[slot])
                stop = min(start + _GATE_STEPS, limit)
                self._drawn[slot, start:stop] = gates[: stop - start]
                self._drawn_until[slot] = stop

    # The input

    def embed(self, batch: Any, is_real: bool) -> Tensor:
        """The batch's input embeddings, mixed where its tokens were: [tokens after padding, d]."""
        self._batch = batch if is_real else None
        # Without a request while the engine measures its memory, so that the table is counted.
        if self._stale and (not is_real or self._mixes[batch.idx_mapping_np].any()):
            self.refresh()
        n = batch.num_tokens
        input_ids = batch.input_ids[:n]
        at, entries, steps, rows = self._mixed_tokens(batch) if is_real else (np.zeros(0, np.int64),) * 4
        self.buffer[n : batch.num_tokens_after_padding].zero_()
        if not len(at):
            self.buffer[:n] = self.model.embed_input_ids(input_ids)
            return self.buffer[: batch.num_tokens_after_padding]
        place, entry, step, row_id = self._send(at, entries, steps, rows)
        pool = self._pool
        candidates, weights, gate = pool.ids[entry], pool.weights[entry], pool.gate[entry]
        embedded = self.model.embed_input_ids(torch.cat([input_ids, candidates.flatten().to(input_ids.dtype)]))
        plain, found = embedded[:n], embedded[n:]
        local = torch.arange(len(found), device=found.device).view(candidates.shape)
        mixed = mix_embeddings(found, local, weights)
        if self.config.strategy == "gaussian":
            mixed = gaussian_noise(mixed, self._noise_scale(), seed=self.config.seed, row_ids=row_id, steps=step)
        self.buffer[:n] = plain
        self.buffer.index_copy_(0, place, torch.where(gate[:, None], mixed, plain[place]))
        return self.buffer[: batch.num_tokens_after_padding]

    def _mixed_tokens(self, batch: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Of the scheduled tokens that were chosen at a drawn step: place in the batch, entry, step and row id."""
        slots, starts = batch.idx_mapping_np, batch.num_computed_tokens_np
        counts = batch.num_scheduled_tokens
        offsets = batch.query_start_loc_np[: len(slots)]
        single = self._mixes[slots] & (counts == 1) & (starts >= self._first[slots])
        parts = [(slots[single], starts[single], offsets[single])]
        for row in np.flatnonzero(self._mixes[slots] & (counts > 1) & (starts + counts > self._first[slots])):
            inside = np.arange(counts[row])
            parts.append((np.full(len(inside), slots[row]), starts[row] + inside, offsets[row] + inside))
        slot, position, place = (np.concatenate(arrays).astype(np.int64) for arrays in zip(*parts, strict=True))
        entries = self._entries[slot, position]
        mixed = self._drawn[slot, position] & (entries >= 0)
        slot, position = slot[mixed], position[mixed]
        return place[mixed], entries[mixed], position - self._first[slot], self._row_ids[slot]

    def _send(self, *columns: np.ndarray) -> tuple[Tensor, ...]:
        """Host arrays [M] to the device, in one copy that nothing waits for."""
        host = torch.from_numpy(np.stack(columns).astype(np.int64))
        if self.device.type == "cuda":
            host = host.pin_memory()
        return tuple(host.to(self.device, non_blocking=True))

    def _noise_scale(self) -> float:
        return 0.33 if self.config.noise_scale is None else self.config.noise_scale

    # The sample

    def force(self, sampler: Any, logits: Tensor, sampled: Tensor, processed: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens, and the logits that log-probabilities are taken from, with the mixed steps' own in their place.

        Args:
            sampler: vLLM's, which holds the requests' settings.
            logits: [B, V], the model's.
            sampled: [B], the tokens that vLLM has sampled.
            processed: [B, V], the logits it sampled them from.
        """
        if self._batch is None:  # a warm-up
            return sampled, processed
        if logits.shape[1] != self.vocabulary:
            raise ValueError(f"the engine has {logits.shape[1]} logits but {self.vocabulary} token embeddings")
        batch, slots = self._batch, self._batch.idx_mapping_np
        positions = batch.num_computed_tokens_np + batch.num_scheduled_tokens  # of the tokens to be sampled
        live = np.flatnonzero(
            self._mixes[slots] & (positions >= batch.prefill_len_np) & (positions < self._entries.shape[1])
        )
        if not len(live):
            return sampled, processed
        slots, positions = slots[live], positions[live].astype(np.int64)
        self._draw(slots, int(positions.max()))
        entries = self._entries[slots, positions]
        entries[entries < 0] = self._pool.reserve(int((entries < 0).sum()))
        self._entries[slots, positions] = entries
        chosen = (
            np.ones(len(live), dtype=bool) if self.config.sampler == "counter_based" else self._drawn[slots, positions]
        )
        steps = positions - self._first[slots]
        batch_rows, slot, entry, _, _ = self._send(live, slots, entries, steps, self._row_ids[slots])
        if chosen.any():
            sampled, processed = self._choose(
                sampler, logits, sampled, processed, live[chosen], slots[chosen], entries[chosen], steps[chosen]
            )
        tokens = sampled[batch_rows]
        self._pool.logprobs[entry] = self._logprobs(logits, tokens, live, slots, sampler)
        if self._stops.numel():
            self._stopped[slot] |= torch.isin(tokens, self._stops)
        return sampled, processed

    def _choose(
        self, sampler: Any, logits: Tensor, sampled: Tensor, processed: Tensor, rows: np.ndarray, slots: np.ndarray,
        entries: np.ndarray, steps: np.ndarray,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The rows that the rate has drawn or, with the sampler "ngrpo", all that are to be mixed."""
        config, pool = self.config, self._pool
        row, slot, entry, step, row_id = self._send(rows, slots, entries, steps, self._row_ids[slots])
        scores = self._penalized(sampler, logits, row, slots)
        states = sampler.sampling_states
        temperature = states.temperature.gpu[slot]
        neighbor_ids = neighbor_ids_of(config, self.table, self.vocabulary, self.device)
        common: dict[str, Any] = {
            "strategy": config.strategy, "k": config.k, "temperature": temperature,
            "mixing_temperature": config.temperature, "moi_beta": config.moi_beta, "variant": config.variant,
            "seed": config.seed, "step": step, "row_ids": row_id,
        }  # fmt: skip
        if config.draws:
            common |= _cuts(states, slots, slot)
        before = sampled[row]
        if config.sampler == "counter_based":
            out = decode_step(
                scores, None, neighbor_ids, **common, mixing_rate=config.mixing_rate, enabled=~self._stopped[slot],
                entropy_threshold=config.entropy_threshold,
            )  # fmt: skip
            ids, weights, fault, gate, tokens = out.ids, out.weights, out.fault, out.gate, out.token_ids
        else:
            threshold = config.entropy_threshold
            found = mixing_candidates(scores, neighbor_ids, **common, return_entropy=threshold is not None)
            ids, weights, fault = found.ids, found.weights, found.fault
            gate = (fault == 0) & ~self._stopped[slot]
            if threshold is not None:
                assert found.entropy is not None
                gate = gate & (found.entropy >= threshold)
            tokens = torch.where(gate, ids[:, 0], before)
        pool.ids[entry], pool.weights[entry], pool.gate[entry], pool.fault[entry] = ids, weights, gate, fault
        sampled = sampled.index_copy(0, row, tokens.to(sampled.dtype))
        # A forced anchor was not drawn from what the cuts left: its log-probability is that of the policy without them.
        # So is that of a draw of ours which vLLM's cuts, in another order and with other rounding, would not have left.
        # Where they are not the model's own logits, the processed ones are a copy that vLLM made for its sampler.
        if processed.data_ptr() != logits.data_ptr():
            greedy = temperature == 0
            whole = scores.to(processed.dtype) / torch.where(greedy, 1, temperature)[:, None]
            of_rows = processed[row]
            forced = torch.zeros_like(gate) if get_strategy(config.strategy).emits_sample else gate
            uncut = forced | (of_rows.gather(1, tokens[:, None].long())[:, 0] == -torch.inf)
            processed.index_copy_(0, row, torch.where(uncut[:, None], whole, of_rows))
        return sampled, processed

    def _penalized(self, sampler: Any, logits: Tensor, row: Tensor, slots: np.ndarray) -> Tensor:
        """The rows' logits as vLLM has them before temperature and cuts."""
        batch = self._batch
        scores = logits[row]
        at = batch.logits_indices[row]
        touched = (
            sampler.logit_bias_state.use_logit_bias[slots].any()
            or sampler.penalties_state.use_penalty[slots].any()
            or (sampler.bad_words_state.num_bad_words.np[slots] > 0).any()
            or sampler.thinking_budget_state.enabled
        )
        if not touched:
            return scores
        scores = scores.float()
        mapping, ids = batch.expanded_idx_mapping[row], batch.input_ids[at]
        local = batch.expanded_local_pos[row]
        sampler.logit_bias_state.apply_logit_bias(scores, mapping, slots, batch.positions[at])
        sampler.penalties_state.apply_penalties(scores, mapping, slots, ids, local)
        sampler.bad_words_state.apply_bad_words(scores, mapping, slots, ids, local)
        sampler.thinking_budget_state.apply(scores, mapping, mapping, slots, ids, local)
        return scores

    def _logprobs(self, logits: Tensor, tokens: Tensor, rows: np.ndarray, slots: np.ndarray, sampler: Any) -> Tensor:
        """float32 [M]: of the model's logits over the temperature, as a replay computes them."""
        temperatures = sampler.sampling_states.temperature.np[slots]
        temperatures = np.where(temperatures == 0, 1.0, temperatures)
        out = torch.empty(len(rows), dtype=torch.float32, device=self.device)
        for temperature in np.unique(temperatures):
            same = np.flatnonzero(temperatures == temperature)
            row, place = self._send(rows[same], same)
            of_rows = logits if len(same) == len(logits) else logits[row]
            out[place] = selective_log_softmax(of_rows, tokens[place], temperature=float(temperature)).float()
        return out

    # Records

    @torch.inference_mode()  # as the engine's steps, whose tensors these are
    def take(self, row_ids: list[int], lengths: list[int]) -> bytes:
        """The records of finished requests, for `read_records`; forgotten here."""
        running = {int(self._row_ids[slot]): slot for slot in self._slots.values()}
        in_flight = Counter(int(self._row_ids[slot]) for slot in self._slots.values())
        if shared := [row_id for row_id in row_ids if in_flight[row_id] + (row_id in self._kept) > 1]:
            return _packed({"shared": shared})
        found: list[np.ndarray] = []
        missing: list[tuple[int, int, int]] = []
        for row_id, length in zip(row_ids, lengths, strict=True):
            entries = np.zeros(0, dtype=np.int64)
            if row_id in self._kept:
                entries = self._kept[row_id].entries
            elif row_id in running:  # finished, and removed from its slot with the next step
                entries = self._written(running[row_id])
            if len(entries) < length:
                missing.append((row_id, length, len(entries)))
            found.append(entries)
        if missing:
            return _packed({"shared": [], "missing": missing})
        width = max(lengths, default=0)
        place = np.full((len(found), width), -1, dtype=np.int64)
        for row, (entries, length) in enumerate(zip(found, lengths, strict=True)):
            place[row, :length] = entries[:length]
        at = torch.from_numpy(place).to(self.device)
        inside, pool = at >= 0, self._pool
        at = at.clamp(min=0)
        content = {
            "gate": pool.gate[at] & inside,
            "ids": pool.ids[at] * inside[..., None],
            "weights": torch.where(inside[..., None], pool.weights[at], 0),
            "logprobs": torch.where(inside, pool.logprobs[at], 0),
            "fault": pool.fault[at] * inside,
        }
        content = {name: tensor.cpu() for name, tensor in content.items()}
        content["weights"].masked_fill_(~content["gate"][..., None], 0)
        content["row_ids"] = torch.tensor(row_ids, dtype=torch.int64)
        if self.config.strategy == "gaussian":
            content["noise_scale"] = torch.full((len(row_ids),), self._noise_scale(), dtype=torch.float32)
            content["noise_seed"] = torch.full((len(row_ids),), self.config.seed, dtype=torch.int64)
        for row_id, entries in zip(row_ids, found, strict=True):
            self._pool.free(entries.copy())
            if self._kept.pop(row_id, None) is None and row_id in running:
                slot = running.pop(row_id)
                self._entries[slot] = -1
                self._mixes[slot] = False
                del self._slots[self._req_ids.pop(slot)]
        return _packed(content | {"shared": [], "missing": []})

    # The table

    def refresh(self) -> None:
        """Bring the neighbour table up to date with the weights."""
        self._stale = False
        if self.table is None:
            return
        rows, group = self._embedding()
        self.table.refresh(rows, group=group)

    def _embedding(self) -> tuple[Tensor, Any]:
        """This rank's rows of the input embedding, and the group that has the others, or None."""
        from vllm.distributed import get_tp_group
        from vllm.lora.layers import VocabParallelEmbeddingWithLoRA
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        modules = [
            module
            for module in self.model.modules()
            if isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
        ]
        if any(isinstance(module, VocabParallelEmbeddingWithLoRA) for module in self.model.modules()):
            raise ValueError(
                f"enable_lora cannot be mixed with {type(self.model).__name__}, whose embedding it wraps: the "
                "adapters' indices are those of the batch's tokens, and a mix looks up more"
            )
        if len(modules) != 1 or not modules[0].weight.is_floating_point() or modules[0].weight.element_size() < 2:
            raise ValueError(
                f"the model {type(self.model).__name__} has {len(modules)} unquantised token embeddings, expected one"
            )
        (module,) = modules
        if module.org_vocab_size != self.vocabulary or module.num_added_embeddings:
            raise ValueError(f"{module.num_embeddings} token embeddings but a vocabulary of {self.vocabulary}: refused")
        rows = module.weight.data[: module.num_org_embeddings_per_partition]
        return rows, get_tp_group().device_group if module.tp_size > 1 else None

    def notice_weights(self) -> None:
        """They are others now: the next batch that is to be mixed searches again."""
        self._stale = True

    def _watch_weights(self) -> None:
        """A trainer's weights come in by the model's own `load_weights`."""
        load = self.model.load_weights

        @functools.wraps(load)
        def load_weights(*args: Any, **kwargs: Any) -> Any:
            self.notice_weights()
            return load(*args, **kwargs)

        self.model.load_weights = load_weights


class _Pool:
    """Entries on the device, grown as they are needed."""

    def __init__(self, k: int, device: torch.device) -> None:
        self.ids = torch.zeros(0, k, dtype=torch.int64, device=device)
        self.weights = torch.zeros(0, k, dtype=torch.float32, device=device)
        self.gate = torch.zeros(0, dtype=torch.bool, device=device)
        self.fault = torch.zeros(0, dtype=torch.int32, device=device)
        self.logprobs = torch.zeros(0, dtype=torch.float32, device=device)
        self._free: list[int] = []

    def reserve(self, count: int) -> list[int]:
        """Entries that hold no mix yet."""
        if count > len(self._free):
            old = len(self.gate)
            more = max(4096, old, count)
            for name in ("ids", "weights", "gate", "fault", "logprobs"):
                tensor = getattr(self, name)
                setattr(self, name, torch.cat([tensor, tensor.new_zeros(more, *tensor.shape[1:])]))
            self._free.extend(range(old + more - 1, old - 1, -1))
        taken = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return taken

    def free(self, entries: np.ndarray) -> None:
        if not len(entries):
            return
        at = torch.from_numpy(entries.astype(np.int64)).to(self.gate.device)
        self.gate[at] = False
        self.fault[at] = 0
        self._free.extend(entries.tolist())


def _cuts(states: Any, slots: np.ndarray, slot: Tensor) -> dict[str, Any]:
    """What the rows' requests keep of the distribution, as `decode_step` takes it, without cuts that no row has."""
    cuts: dict[str, Any] = {}
    if (states.top_k.np[slots] != states.vocab_size).any():
        cuts["top_k"] = states.top_k.gpu[slot].long()
    if (states.top_p.np[slots] != 1.0).any():
        cuts["top_p"] = states.top_p.gpu[slot]
    if (states.min_p.np[slots] != 0.0).any():
        cuts["min_p"] = states.min_p.gpu[slot]
    return cuts


def _packed(content: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()
