"""The mixing of one worker: its model state and its mixer. Runs in the engine's workers.

A mixed token's embedding is formed where the model's input is prepared. It is written into a buffer that never moves,
so captured CUDA graphs read it. Decoding, chunked prefill and the prefill after a preemption follow one rule: every
scheduled token whose step was mixed is embedded from its entry in the pool. A step without mixes costs a lookup.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.tokenizers import cached_tokenizer_from_config

from ngrpo_ops import MixingConfig, MixRecord, raise_faults, selective_log_softmax
from ngrpo_ops._patching import wrap
from ngrpo_ops.rollout import Noise, Overlay, decide, make_table, neighbor_ids, reads_table
from ngrpo_ops.strategies import get_strategy

from .embedding import InputEmbedding
from .mixed_requests import MixedRequests, SampledSteps
from .plugin import config_of, row_id_of, settings_of
from .pool import EntryPool
from .records import pack
from .sampler import filters, keep_unscaled_logits
from .server import seed_served_row

logger = init_logger(f"vllm.{__name__}")  # vLLM shows the loggers below its own


class MixingModelState:
    """A mixin in front of the model's own `ModelState`: it hands the engine's calls to an `EngineMixer`."""

    def __init__(self, vllm_config: Any, model: nn.Module, encoder_cache: Any, device: torch.device) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)  # type: ignore[call-arg]
        self.mixer = EngineMixer(config_of(settings_of(vllm_config)), vllm_config, model, device)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        self.mixer.add(req_index, new_req_data)

    def remove_request(self, req_id: str) -> None:
        super().remove_request(req_id)  # type: ignore[misc]
        self.mixer.requests.remove(req_id)

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

        def patch_sample(original: Any) -> Any:
            def sample(logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
                return self.mixer.sample(sampler, logits, lambda: original(logits, *args, **kwargs))

            return sample

        wrap(sampler, "sample", patch_sample)
        return None


class EngineMixer:
    """The mixing of one worker: the decision of each step, the buffer of input embeddings, and the records.

    Attributes:
        buffer: the model's input embeddings [max_num_batched_tokens, d].
        requests: the host's state of the mixed requests.
        pool: the entries of their tokens, on the device.
        embedding: the model's input embedding.
        table: the neighbor table of the input embedding; None: the strategy reads no neighbors. What is no neighbor is
            asked of the engine's own tokenizer.
        run: the trainer that a server's records are for, see server.py; None: it has none yet.
    """

    def __init__(self, config: MixingConfig, vllm_config: Any, model: Any, device: torch.device) -> None:
        self.config, self.model, self.device = config, model, device
        engine, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        self.vocabulary = engine.get_vocab_size()
        self.buffer = torch.zeros(
            scheduler.max_num_batched_tokens, engine.get_inputs_embeds_size(), dtype=engine.dtype, device=device
        )
        self.pool = EntryPool(config.k, device)
        self.requests = MixedRequests(config, scheduler.max_num_seqs, engine.max_model_len, self.pool)
        self.embedding = InputEmbedding(model, self.vocabulary)
        asks = config.excluded_token_ids == "special" and reads_table(config)
        tokenizer = cached_tokenizer_from_config(engine) if asks else None
        self.table = make_table(config, self.vocabulary, tokenizer, logger.info_once)
        self.run: str | None = None
        self._slots = scheduler.max_num_seqs
        self._batch: Any = None  # the batch under way; None in a warm-up

    # Made with the first use: what is allocated while the model loads is lost when a trainer lets the engine sleep.

    @functools.cached_property
    def _stops(self) -> Tensor:
        return torch.tensor(self.config.stop_token_ids, dtype=torch.int64, device=self.device)

    @functools.cached_property
    def _stopped(self) -> Tensor:
        """bool [slots]: whose requests have emitted one of `_stops`."""
        return torch.zeros(self._slots, dtype=torch.bool, device=self.device)

    def add(self, slot: int, request: Any) -> None:
        """A request gets a slot, see `MixedRequests.add`."""
        row_id = row_id_of(request.sampling_params)
        replaces = row_id is not None and seed_served_row(request.sampling_params, self.config.seed)
        self.requests.add(slot, request, row_id, replaces)
        if row_id is not None and self.config.stop_token_ids:
            emitted = request.prefill_token_ids[request.prompt_len :]
            self._stopped[slot] = bool(set(emitted) & set(self.config.stop_token_ids))

    # The input

    def embed(self, batch: Any, is_real: bool) -> Tensor:
        """The input embeddings of a batch, mixed where its tokens were: [tokens after padding, d].

        Args:
            is_real: False: the batch holds no requests.
        """
        self._batch = batch if is_real else None
        # Also in a warm-up, in which the engine measures its memory, so that the table is counted.
        if not is_real or self.requests.any_mixed(batch):
            self._refresh()
        n = batch.num_tokens
        input_ids = batch.input_ids[:n]
        self.buffer[n : batch.num_tokens_after_padding].zero_()
        tokens = self.requests.scheduled(batch) if is_real else None
        if tokens is None or not len(tokens.places):
            self.buffer[:n] = self.model.embed_input_ids(input_ids)
            return self.buffer[: batch.num_tokens_after_padding]
        place, entry, step, row_id = self._send(*tokens)
        pool = self.pool
        overlay = Overlay(
            place, pool.ids[entry], pool.weights[entry], pool.gate[entry], Noise.of(self.config, row_id, step)
        )
        own, mixed, _ = overlay.mix(self.model.embed_input_ids(overlay.extend(input_ids)))
        self.buffer[:n] = own
        self.buffer.index_copy_(0, place, mixed)
        return self.buffer[: batch.num_tokens_after_padding]

    def _refresh(self) -> None:
        """Brings the neighbor table up to date with the weights."""
        if not self.embedding.changed:
            return
        self.embedding.changed = False
        if self.table is not None:
            rows, group = self.embedding.rows()
            self.table.refresh(rows, group=group)

    def _send(self, *columns: np.ndarray) -> tuple[Tensor, ...]:
        """Host arrays [M] on the device, by one copy that nothing waits for."""
        host = torch.from_numpy(np.stack(columns).astype(np.int64))
        if self.device.type == "cuda":
            host = host.pin_memory()
        return tuple(host.to(self.device, non_blocking=True))

    # The sample

    def sample(
        self, sampler: Any, logits: Tensor, original: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """The tokens of a batch and the logits that log-probabilities are taken from, the mixed steps' included.

        Args:
            sampler: vLLM's sampler, which holds the requests' settings.
            logits: [B, V], the model's.
            original: vLLM's own: the tokens [B] that it samples, and the logits [B, V] that it samples them from.
        """
        if self._batch is None:
            return original()
        if logits.shape[1] != self.vocabulary:
            raise ValueError(f"the engine has {logits.shape[1]} logits but {self.vocabulary} token embeddings")
        steps = self.requests.sampled(self._batch)
        if not len(steps):
            return original()
        chosen = steps if self.config.sampler == "counter_based" else steps[steps.drawn]
        sampled, processed = self._choose(sampler, logits, original, chosen) if len(chosen) else original()
        row, slot, entry = self._send(steps.rows, steps.slots, steps.entries)
        tokens = sampled[row]
        self.pool.tokens[entry] = tokens.to(torch.int32)
        self.pool.logprobs[entry] = self._logprobs(logits, tokens, steps, sampler)
        if self.config.stop_token_ids:
            self._stopped[slot] |= torch.isin(tokens, self._stops)
        return sampled, processed

    def _choose(
        self, sampler: Any, logits: Tensor, original: Callable[[], tuple[Tensor, Tensor]], steps: SampledSteps
    ) -> tuple[Tensor, Tensor]:
        """`sample` for the steps that the rate has drawn or, with the sampler "counter_based", for all steps."""
        config, states = self.config, sampler.sampling_states
        row, slot, entry, step, row_id = self._send(steps.rows, steps.slots, steps.entries, steps.steps, steps.row_ids)
        with keep_unscaled_logits(states, row) as kept:
            sampled, processed = original()
        scores = kept[0] if kept else logits[row]
        temperature = states.temperature.gpu[slot]
        decision = decide(
            config, scores, neighbor_ids(config, self.table, self.vocabulary, self.device),
            temperature=temperature, step=step, row_ids=row_id, stopped=self._stopped[slot],
            filters=filters(states, steps.slots, slot) if config.draws else {},
        )  # fmt: skip
        self.pool.write(entry, decision)
        tokens = decision.token_ids
        if config.sampler == "native":
            tokens = torch.where(decision.gate, tokens, sampled[row])
        sampled = sampled.index_copy(0, row, tokens.to(sampled.dtype))
        # A forced anchor was not drawn from what the filters left: its log-probability is that of the policy without
        # filters. So is the log-probability of a draw that vLLM's filters, which have another order and rounding, would
        # have removed. `processed` is a copy that vLLM made for its sampler, unless it is the model's own logits.
        if processed.data_ptr() != logits.data_ptr():
            unfiltered = scores.to(processed.dtype) / torch.where(temperature == 0, 1, temperature)[:, None]
            of_rows = processed[row]
            restored = of_rows.gather(1, tokens[:, None].long())[:, 0] == -torch.inf
            if not get_strategy(config.strategy).emits_sample:
                restored |= decision.gate
            processed.index_copy_(0, row, torch.where(restored[:, None], unfiltered, of_rows))
        return sampled, processed

    def _logprobs(self, logits: Tensor, tokens: Tensor, steps: SampledSteps, sampler: Any) -> Tensor:
        """float32 [M]: of the model's logits over the temperature, as a replay computes them."""
        temperatures = sampler.sampling_states.temperature.np[steps.slots]
        temperatures = np.where(temperatures == 0, 1.0, temperatures)
        out = torch.empty(len(steps), dtype=torch.float32, device=self.device)
        for temperature in np.unique(temperatures):
            same = np.flatnonzero(temperatures == temperature)
            row, place = self._send(steps.rows[same], same)
            of_rows = logits if len(same) == len(logits) else logits[row]
            out[place] = selective_log_softmax(of_rows, tokens[place], temperature=float(temperature)).float()
        return out

    # Records

    @torch.inference_mode()  # as the engine's steps, whose tensors these are
    def take(self, row_ids: list[int], lengths: list[int]) -> bytes:
        """The records of finished requests, for `read_records`. The worker forgets the records."""
        try:
            entries = self.requests.find(row_ids, lengths)
        except ValueError as error:
            return pack(error)
        reply: MixRecord | RuntimeError
        try:
            reply, _ = self.read(entries, row_ids)
        except RuntimeError as error:
            reply = error
        self.requests.forget(row_ids)
        return pack(reply)

    def read(self, entries: np.ndarray, row_ids: list[int]) -> tuple[MixRecord, Tensor]:
        """The record of entries that `MixedRequests.find` has found, and the tokens int32 [B, T]. Nothing is forgotten.

        Raises:
            RuntimeError: at a mixed step the logits were no distribution.
        """
        content = self.pool.read(entries)
        tokens = content.pop("tokens")
        rows = torch.tensor(row_ids, dtype=torch.int64, device="cpu")
        raise_faults(content.pop("fault"), row_ids=rows)
        noise = Noise.of(self.config, rows, torch.zeros_like(rows))
        if noise is not None:
            content |= {"noise_scale": noise.scale, "noise_seed": noise.seed, "row_ids": noise.row_ids}
        return MixRecord(**content, prompt_length=0), tokens
