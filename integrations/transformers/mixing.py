"""NeighborMixing: rollouts and replays on a model of `transformers`. Runs in the process of the model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationMixin, LogitsProcessorList
from transformers.utils import logging

from ngrpo_ops import MixingConfig, MixRecord, RefreshReport
from ngrpo_ops._patching import replaced
from ngrpo_ops.rollout import make_table
from ngrpo_ops.rollout import neighbor_ids as neighbor_ids_of
from ngrpo_ops.state import make_state, next_row_of

from .checks import (
    refuse_generation,
    refuse_second_tables,
    refuse_unsupported_filters,
    require_input_embeddings_alone,
    require_prompts,
    require_repeatable,
    supported_model,
    without_gradient_checkpointing,
)
from .hooks import EmbeddingMixer
from .rollout import RolloutProcessor
from .table import input_table, vocabulary_size

logger = logging.get_logger(__name__)

# With the sampler "counter_based" the tokens are decided before generate samples: it finds one token alone.
_GREEDY = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None, "min_p": None}


_SIGNATURE = inspect.signature(GenerationMixin.generate)


class NeighborMixing:
    """N-GRPO rollouts and replays on a causal language model of `transformers`.

    Args:
        model: a decoder-only model with an input-embedding module, plain or wrapped by PEFT.
        config: how rollouts mix; None: `MixingConfig()`.
        tokenizer: the model's, or a processor with it; read where `excluded_token_ids` is "special".

    Attributes:
        model: as given.
        config: as given, or its default.
        vocabulary: V, the number of token embeddings.
        table: the neighbor table, None where none is read.
        mixer: the hooks on the model's input embeddings.
        next_row: the id of the next generated row. It advances with every rollout, so that no two share their gates.

    Raises:
        TypeError: `model` is no model of transformers, or `config` no MixingConfig.
        ValueError: an encoder-decoder, PEFT prompt learning, token ids beyond the vocabulary, `excluded_token_ids`
            "special" without a tokenizer, or too few tokens left.

    Examples:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from ngrpo_ops import MixingConfig
        >>> from ngrpo_ops.integrations.transformers import NeighborMixing
        >>> shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=None))
        >>> mixing = NeighborMixing(model, MixingConfig(k=3, mixing_rate=0.5))
        >>> prompts = torch.tensor([[0, 5, 9], [7, 3, 8]])  # padded on the left
        >>> mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
        >>> sequences, record = mixing.generate(prompts, attention_mask=mask, do_sample=True, max_new_tokens=6)
        >>> mask = torch.cat([mask, torch.ones_like(record.ids[..., 0])], dim=1)
        >>> with mixing.replay(record):
        ...     logits = model(input_ids=sequences, attention_mask=mask).logits
        >>> logprobs = logits[:, 2:-1].log_softmax(-1).gather(-1, sequences[:, 3:, None]).squeeze(-1)
        >>> bool((logprobs - record.logprobs).abs().max() < 1e-5)
        True
    """

    def __init__(self, model: Any, config: MixingConfig | None = None, tokenizer: Any = None) -> None:
        self.config = MixingConfig() if config is None else config
        if not isinstance(self.config, MixingConfig):
            raise TypeError(f"config must be a MixingConfig, got {type(config).__name__}")
        self.model = model
        self._inner = supported_model(model)
        self.vocabulary = vocabulary_size(model)
        self.config.require_vocabulary(self.vocabulary)
        self.table = make_table(self.config, self.vocabulary, tokenizer, logger.warning)
        if self.config.mixing_rate > 0:
            refuse_second_tables(model)
        # Last: a model that is refused is left without hooks.
        self._mixers: dict[nn.Module, EmbeddingMixer] = {}
        self.mixer = self.attach(model)
        self.next_row = 0
        self._tried = self.config.mixing_rate == 0  # whether the model was seen to read mixes as it should

    def attach(self, model: Any) -> EmbeddingMixer:
        """Lets `replay` run on a further model too, such as a reference model with a table of its own.

        Returns:
            The hooks on the model's input embeddings.

        Raises:
            ValueError: the vocabulary of `model` is another one than the policy's.

        Examples:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
            >>> policy, reference = (LlamaForCausalLM(LlamaConfig(**shape)) for _ in range(2))
            >>> mixing = NeighborMixing(policy)
            >>> mixing.attach(reference).module is reference.get_input_embeddings()
            True
        """
        embeddings = model.get_input_embeddings()
        if embeddings not in self._mixers:
            if self._mixers and vocabulary_size(model) != self.vocabulary:
                raise ValueError(
                    f"model has {vocabulary_size(model)} token embeddings but the policy {self.vocabulary}: the "
                    "record's ids would name other tokens; both need the same vocabulary"
                )
            self._mixers[embeddings] = EmbeddingMixer(embeddings)
        return self._mixers[embeddings]

    def remove(self) -> None:
        """Takes the hooks off every model.

        Examples:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
            >>> model = LlamaForCausalLM(LlamaConfig(**shape))
            >>> NeighborMixing(model).remove()
            >>> len(model.get_input_embeddings()._forward_hooks)
            0
        """
        for mixer in self._mixers.values():
            mixer.remove()
        self._mixers.clear()

    @torch.no_grad()
    def refresh(self) -> RefreshReport | None:
        """Brings the neighbor table up to date with the model's input embeddings. `generate` does this itself.

        The table is that of the embedding *module*: scaled where the model scales it, merged where LoRA adapts it.
        Where the rows of the module are sharded (FSDP2, DeepSpeed ZeRO-3) every rank must call this method.

        Returns:
            What was computed; None: no table is read.

        Examples:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
            >>> mixing = NeighborMixing(LlamaForCausalLM(LlamaConfig(**shape)))
            >>> mixing.refresh().recomputed
            32
        """
        if self.table is None:
            return None
        quiet = not logging.is_progress_bar_enabled()
        with (
            input_table(self._inner.get_input_embeddings(), self.vocabulary) as embedding,
            tqdm(desc="neighbor table", unit="row", delay=5, leave=False, disable=quiet) as bar,
        ):

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            return self.table.refresh(embedding, progress=progress)

    @property
    def neighbor_ids(self) -> Tensor | None:
        """int64 [V, k - 1], as `decode_step` takes them; None for a strategy that reads no neighbors.

        Examples:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
            >>> mixing = NeighborMixing(LlamaForCausalLM(LlamaConfig(**shape)), MixingConfig(k=3))
            >>> report = mixing.refresh()
            >>> mixing.neighbor_ids.shape
            torch.Size([32, 2])
        """
        device = self._inner.device
        if device.type == "meta":  # weights that accelerate has offloaded
            device = torch.device("cpu")
        return neighbor_ids_of(self.config, self.table, self.vocabulary, device)

    @contextmanager
    def rollouts(self, row_ids: Tensor | None = None) -> Iterator[list[MixRecord]]:
        """Within it `model.generate` mixes. The list that is yielded gains a record with every call.

        This is for trainers that call `model.generate` themselves. Elsewhere `NeighborMixing.generate` is simpler.
        Calls may come from any thread; they take turns.

        Args:
            row_ids: int64 [B], what the gates of each row are drawn by; None: the next unused ones.

        Examples:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
            >>> model = LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=None))
            >>> with NeighborMixing(model, MixingConfig(mixing_rate=1.0)).rollouts() as records:
            ...     sequences = model.generate(torch.tensor([[5, 9]]), max_new_tokens=3)
            >>> [record.gate.tolist() for record in records]
            [[[True, True, True]]]
        """
        records: list[MixRecord] = []

        def generate(*args: Any, **kwargs: Any) -> Any:
            arguments = _SIGNATURE.bind(self.model, *args, **kwargs).arguments
            named = {name: value for name, value in arguments.items() if name not in ("self", "kwargs")}
            output, record = self._generate(original, row_ids, **named, **arguments.get("kwargs", {}))
            records.append(record)
            return output

        with self.mixer.only_rollouts(), replaced(self.model, "generate", generate) as original:
            yield records

    def generate(self, input_ids: Tensor, *, row_ids: Tensor | None = None, **kwargs: Any) -> tuple[Any, MixRecord]:
        """`model.generate` with mixing.

        Args:
            input_ids: int64 [B, P], left-padded prompts.
            row_ids: int64 [B x num_return_sequences], see `rollouts`.
            **kwargs: what `model.generate` takes. Beams, assisted decoding, use_cache=False and the like are refused.

        Returns:
            What `model.generate` returns, and the record of its rows.

        Raises:
            ValueError: a refused setting, an empty batch, a model with other logits than token embeddings, or one with
                dropout in training mode, whose rollouts nothing could replay.
            RuntimeError: logits that nothing can be sampled from, or a strategy that broke its promise. The rollout's
                first faulty row and step are named at its end. A model that keeps no cache, or does not read one token
                a step. A call within `replay` or another `generate` of the same model.

        Calls from several threads take turns. Gradient checkpointing is off while a rollout runs, as transformers would
        drop the cache.

        Examples:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
            >>> model = LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=None))
            >>> mixing = NeighborMixing(model, MixingConfig(k=3, mixing_rate=1.0))
            >>> sequences, record = mixing.generate(torch.tensor([[5, 9]]), max_new_tokens=4)
            >>> sequences.shape, record.gate.tolist(), record.ids.shape
            (torch.Size([1, 6]), [[True, True, True, True]], torch.Size([1, 4, 3]))
            >>> torch.equal(record.ids[..., 0], sequences[:, 2:])  # a mixed step emits its anchor
            True
        """
        if self.config.mixing_rate > 0:
            require_repeatable(self._inner)
        return self._generate(self.model.generate, row_ids, input_ids=input_ids, **kwargs)

    def _generate(self, generate: Callable[..., Any], row_ids: Tensor | None, **kwargs: Any) -> tuple[Any, MixRecord]:
        if not self._tried:
            require_input_embeddings_alone(self._inner, self.mixer)
            self._tried = True
        with self.mixer.turn("generate", wait=True):
            return self._mixed_generate(generate, row_ids, **kwargs)

    def _mixed_generate(
        self, generate: Callable[..., Any], row_ids: Tensor | None, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Any, MixRecord]:
        if input_ids is None:
            input_ids = kwargs.pop("inputs", None)  # as generate calls them
        input_ids, model = require_prompts(input_ids), self._inner
        settings = dict(kwargs)
        generation, _ = model._prepare_generation_config(settings.pop("generation_config", None), **settings)
        refuse_generation(generation, kwargs)
        if self.config.draws:
            refuse_unsupported_filters(generation)
        returned = generation.num_return_sequences or 1
        row_ids = self._row_ids(len(input_ids) * returned, row_ids)
        self.refresh()
        rollout = RolloutProcessor(
            self.config, self.mixer, self.neighbor_ids, self.vocabulary, generation, row_ids, input_ids.shape[1]
        )
        processors = LogitsProcessorList([*(kwargs.pop("logits_processor", None) or ()), rollout])
        changed: dict[str, Any] = {"disable_compile": True}
        if self.config.sampler == "counter_based":
            # A greedy generate returns one sequence for each prompt, so the prompts are repeated here.
            changed |= {**_GREEDY, "num_return_sequences": 1}
            inputs = {name: value for name, value in kwargs.items() if not hasattr(generation, name)}
            input_ids, inputs = model._expand_inputs_for_generation(returned, input_ids=input_ids, **inputs)
            kwargs |= inputs
        kwargs = _with_settings(kwargs, changed)
        with without_gradient_checkpointing(model), rollout.watching(model):
            output = generate(input_ids=input_ids, logits_processor=processors, **kwargs)
        sequences = output if isinstance(output, Tensor) else output.sequences
        return output, rollout.record(sequences)

    def _row_ids(self, rows: int, given: Tensor | None) -> Tensor:
        """The ids of `rows` generated rows: those given, or the next unused ones."""
        if given is None:
            given = torch.arange(self.next_row, self.next_row + rows, device="cpu")
            self.next_row += rows
        if given.shape != (rows,):
            raise ValueError(f"row_ids must be [{rows}], one for each returned sequence, got {tuple(given.shape)}")
        return given

    @contextmanager
    def replay(self, record: MixRecord, model: nn.Module | None = None) -> Iterator[None]:
        """Within it a forward of the sequences [B, P + T] embeds what the rollout embedded.

        The candidates are looked up in the model's present table, so gradients reach their rows. The rows may be spread
        over several forwards, in order. Each row must be replayed exactly once before the context ends.

        Args:
            record: as `generate` returned it, or cut and padded as the batch was.
            model: the model whose forward it is; None: the policy. Another model is attached first.

        Raises:
            RuntimeError: a forward of another shape or of other tokens, rows left over, or a replay of this model that
                is under way already, here or in another thread.

        Examples:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
            >>> model = LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=None))
            >>> mixing = NeighborMixing(model, MixingConfig(k=3, mixing_rate=1.0))
            >>> sequences, record = mixing.generate(torch.tensor([[5, 9]]), max_new_tokens=4)
            >>> with mixing.replay(record):
            ...     model(input_ids=sequences).logits.logsumexp(-1).sum().backward()
            >>> gradient = model.get_input_embeddings().weight.grad
            >>> bool(gradient[record.ids.unique()].any(-1).all())  # of every candidate
            True
        """
        mixer = self.mixer if model is None else self.attach(model)
        with mixer.replaying(record):
            yield

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep for the gates to go on where they were: see `ngrpo_ops.state`.

        Examples:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
            >>> mixing = NeighborMixing(LlamaForCausalLM(LlamaConfig(**shape)))
            >>> sequences, record = mixing.generate(torch.tensor([[5, 9]]), max_new_tokens=1)
            >>> mixing.state_dict()["next_row"]
            1
        """
        return make_state(self.next_row, self.config)

    def load_state_dict(
        self, state: Mapping[str, Any], source: str = "state", warn: Callable[[str], object] | None = None
    ) -> None:
        """Goes on where `state_dict` was taken. Warns of settings that were others then.

        Args:
            state: what `state_dict` returned, or what ngrpo-ops 0.6 saved.
            source: where it is from, for the messages.
            warn: called with a warning; None: `warnings.warn`.

        Raises:
            ValueError: not a state, see `ngrpo_ops.state.next_row_of`.

        Examples:
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> shape = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
            >>> mixing = NeighborMixing(LlamaForCausalLM(LlamaConfig(**shape)))
            >>> state = mixing.state_dict() | {"next_row": 2}
            >>> mixing.load_state_dict(state)
            >>> mixing.next_row
            2
        """
        self.next_row = next_row_of(state, self.config, source, warn)


def _with_settings(kwargs: dict[str, Any], changed: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a `generate` with some settings changed. A configuration among them is copied."""
    if kwargs.get("generation_config") is None:
        return kwargs | changed
    # generate takes a configuration or settings, not both.
    generation_config = copy.deepcopy(kwargs["generation_config"])
    for name, value in changed.items():
        setattr(generation_config, name, value)
    others = {name: value for name, value in kwargs.items() if name not in changed}
    return others | {"generation_config": generation_config}
