"""Runs in the trainer's process. `NGRPOTrainer`: the rollout that mixes, and the replay of its embeddings.

TRL's own loss, advantages, sampling and logging are kept. The adapter adds the rollout's mixing, and the replay of its
embeddings in every forward that scores a rollout: old, current and reference log-probabilities. Every override calls
the method that it overrides.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import trl
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from trl import GRPOTrainer

from ngrpo_ops import MixRecord
from ngrpo_ops.files import read_json, write_json
from ngrpo_ops.metrics import (
    COSINE,
    REPLAY_ERROR,
    REPLAY_OUTLIERS,
    mean,
    replay_errors,
    replay_sums,
    replay_tolerance,
    rollout_metrics,
    rollout_sums,
)

from ..transformers import NeighborMixing
from .checks import check_trl, lowest_precision, refuse_loaded, refuse_settings, replay_error_cause
from .config import NGRPOConfig

logger = logging.get_logger(__name__)

_STATE_FILE = "mixing_state.json"
_PREFIX = "mix_"  # of the record's tensors in a batch

check_trl()  # a change of what the trainer overrides must stop the import, not the mixing
_SIGNATURE = inspect.signature(GRPOTrainer.__init__)


def _model_name(model: Any) -> str:
    return model if isinstance(model, str) else model.config.name_or_path


class NGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` whose training rollouts mix semantic neighbors (arXiv 2606.10768). Takes the same arguments.

    Evaluation and inference do not mix. With ``mixing_rate=0`` rewards, losses and gradients are those of
    `GRPOTrainer`, bit for bit. The engine of ``use_vllm`` is stock then, and there are no records to log from. In
    training these metrics are logged beside TRL's own:

        mix/gated_share     share of completion tokens that were mixed
        mix/anchor_differs  over mixed steps, the probability that a sample would have differed from the anchor
        mix/anchor_weight   over mixed steps, the anchor's weight in the mix
        mix/cosine          over mixed steps, cos(mix, anchor's embedding)
        mix/replay_error    largest |rollout - replayed log-probability| while the policy is still the rollout's
        mix/replay_outliers of the tokens after a mix, the share for which this is more than rounding makes it

    The completions table gets a column ``mix_share``.

    Args:
        *arguments: those of `GRPOTrainer`.
        **keywords: those of `GRPOTrainer`. `args` is an `NGRPOConfig`, or None for its defaults.

    Attributes:
        mixing: the `NeighborMixing` of the policy.

    Raises:
        TypeError: `args` is not an NGRPOConfig.
        ValueError: a setting under which mixing would silently not happen, or be wrong; the message has the reason.

    Examples:
        Two steps of a random model with eight tokens, rewarded for every "a":

        >>> import tempfile
        >>> from datasets import Dataset
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> from ngrpo_ops.integrations.trl import NGRPOConfig, NGRPOTrainer
        >>> words = Tokenizer(models.WordLevel({word: i for i, word in enumerate("<pad> <eos> a b c d e f".split())}))
        >>> words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        >>> shape = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
        >>> tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
        >>> trainer = NGRPOTrainer(
        ...     model=LlamaForCausalLM(LlamaConfig(**shape, **tokens, num_hidden_layers=1)),
        ...     reward_funcs=lambda completions, **kwargs: [float(text.count("a")) for text in completions],
        ...     args=NGRPOConfig(
        ...         tempfile.mkdtemp(), mixing_rate=0.5, max_steps=2, logging_steps=2, max_completion_length=8,
        ...         num_generations=4, per_device_train_batch_size=4, use_cpu=True, bf16=False, report_to="none",
        ...         save_strategy="no", disable_tqdm=True,
        ...     ),
        ...     train_dataset=Dataset.from_dict({"prompt": ["a b", "c d"]}),
        ...     processing_class=PreTrainedTokenizerFast(
        ...         tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", padding_side="left"
        ...     ),
        ... )
        >>> result = trainer.train()  # doctest: +ELLIPSIS
        {'loss': ... 'mix/gated_share': ... 'mix/replay_error': ...}
        >>> result.global_step, trainer.state.log_history[0]["mix/replay_error"] < 1e-4
        (2, True)
    """

    model: Any
    _tag_names = ["trl", "ngrpo"]  # noqa: RUF012 (as in TRL)
    _name = "N-GRPO"
    _paper = {  # noqa: RUF012
        "title": "N-GRPO: Embedding-Level Neighbor Mixing for Enhanced Policy Optimization",
        "id": "2606.10768",
    }

    # What holds until __init__ has decided. TRL's own tests call methods of a trainer that was made without it.
    _mixes = False
    _server: Any = None  # the MixingServer of vllm_mode="server"
    _rollout_record: MixRecord | None = None  # of the generation under way
    _batch_record: MixRecord | None = None  # of the batch whose loss is being computed

    @functools.wraps(GRPOTrainer.__init__)  # type: ignore[misc]
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        bound = _SIGNATURE.bind(self, *arguments, **keywords)
        given = bound.arguments
        if given.get("args") is None:
            given["args"] = NGRPOConfig(f"{_model_name(given['model']).split('/')[-1]}-NGRPO")
        args = given["args"]
        if not isinstance(args, NGRPOConfig):
            raise TypeError(f"args must be an NGRPOConfig, got {type(args).__name__}")
        self._mixing_config = config = args.mixing()
        # At a rate of 0 all is stock, whatever the settings. The sampler "counter_based" is ours at any rate.
        self._mixes = config.mixing_rate > 0 or config.sampler == "counter_based"
        if self._mixes:
            refuse_settings(args, given)
        if self._mixes and args.use_vllm and args.vllm_mode == "server":
            from .server import MixingServer

            # Before anything is loaded: what it refuses is refused on all processes at once.
            self._server = MixingServer(args, config, _model_name(given["model"]))
            super().__init__(*bound.args[1:], **bound.kwargs)
            self._server.attach(self)
        elif self._mixes and args.use_vllm:
            from ..vllm import require_mixing
            from .engine import mixing_engine

            with mixing_engine(config):
                super().__init__(*bound.args[1:], **bound.kwargs)
            require_mixing(self.vllm_generation.llm)
        else:
            super().__init__(*bound.args[1:], **bound.kwargs)
        if self._mixes:
            refuse_loaded(self, config)
            mixing = self.mixing  # made here, so that what it refuses is refused at the start
            if self.ref_model is not None:
                mixing.attach(self.accelerator.unwrap_model(self.ref_model))
        self._warned: set[str] = set()

    @functools.cached_property
    def mixing(self) -> NeighborMixing:
        """The `NeighborMixing` of the policy. At a rate of 0 nothing reads it, and it is made where it is asked for."""
        model = self.accelerator.unwrap_model(self.model)
        return NeighborMixing(model, self._mixing_config, tokenizer=self.processing_class)

    # Rollout ------------------------------------------------------------------------------------------------------

    def _generate_single_turn(self, prompt_ids: list, *args: Any, **kwargs: Any) -> Any:
        if not (self._mixes and self.model.training):
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        # The gates of a row depend on its place among all rows ever generated, not on how the rows are spread.
        rows, processes = len(prompt_ids), self.accelerator.num_processes
        first = self.mixing.next_row + self.accelerator.process_index * rows
        self.mixing.next_row += processes * rows
        with self._mixed_generation(torch.arange(first, first + rows, device="cpu")) as records:
            result = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if len(records) != 1:
            raise RuntimeError(
                f"the rollout called the {'engine' if self.use_vllm else 'model'}'s generate {len(records)} times, "
                "expected once: something in between (a patched model?) does not generate with it, and nothing would "
                "be mixed"
            )
        self._rollout_record = records[0].to(self.accelerator.device)
        return result

    def _mixed_generation(self, row_ids: Tensor) -> AbstractContextManager[list[MixRecord]]:
        if not self.use_vllm:
            return self.mixing.rollouts(row_ids)
        if self._server is not None:
            return self._server.rollouts(row_ids)
        from .engine import mixing_requests

        rank = self.accelerator.process_index % self.vllm_tensor_parallel_size
        return mixing_requests(self.vllm_generation.llm, self.mixing.config.seed, row_ids, rank)

    def _generate(self, prompts: list) -> Any:
        self._rollout_record = None
        result = super()._generate(prompts)
        if not self._mixes:
            return result
        if len(result) != 8:
            raise RuntimeError(f"TRL {trl.__version__} returns {len(result)} values from _generate, expected 8")
        prompt_ids, completion_ids, tool_mask, *rest = result
        record = self._rollout_record
        if record is None:  # evaluation; the table's columns must be of one length
            self._log_completion_extra("mix_share", [0.0] * len(completion_ids))
            return result
        lengths = torch.tensor([len(ids) for ids in completion_ids], device=record.gate.device)
        self._log_completion_extra("mix_share", [round(share, 4) for share in (record.gate.sum(1) / lengths).tolist()])
        self._log_rollout(record, lengths)
        if not self.mixing.config.loss_on_mixed_steps:
            # TRL's own mask for tokens that are not the policy's. TRL's normalizers know of it.
            loss = (~record.gate).long().cpu()
            tool_mask = [row[:length].tolist() for row, length in zip(loss, lengths.tolist(), strict=True)]
        return prompt_ids, completion_ids, tool_mask, *rest

    def _log_rollout(self, record: MixRecord, lengths: Tensor) -> None:
        sums = self.accelerator.reduce(rollout_sums(record, lengths.sum()), reduction="sum")
        for name, value in rollout_metrics(sums).items():
            self._metrics["train"][name].append(value)

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        try:
            output = super()._generate_and_score_completions(inputs)
            if self._rollout_record is None:
                return output
            record = self._rollout_record.fit(output["completion_ids"].shape[1])
        finally:
            self._rollout_record = None
        if "old_per_token_logps" in output:
            self._log_replay_error(output["old_per_token_logps"], record, output["completion_mask"])
        return output | {_PREFIX + name: tensor for name, tensor in record.tensors().items()}

    # Replay -------------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        score = functools.partial(super()._get_per_token_logps_and_entropies, model, input_ids, attention_mask)
        record = self._rollout_record if self._batch_record is None else self._batch_record
        if record is None:
            return score(logits_to_keep, *args, **kwargs)
        record = record.fit(logits_to_keep, input_ids.shape[1] - logits_to_keep)
        with self.mixing.replay(record, self.accelerator.unwrap_model(model)):
            result = score(logits_to_keep, *args, **kwargs)
        self._replayed = self._batch_record is not None
        if self._replayed and record.logprobs is not None:
            self._log_replay_error(result[0], record, attention_mask[:, -logits_to_keep:])
        return result

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        self._replayed = False
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self._mixes and not self._replayed:
            raise RuntimeError(
                f"a training step of TRL {trl.__version__} did not replay its mixed rollout: a setting or a subclass "
                "scores it past GRPOTrainer._get_per_token_logps_and_entropies"
            )
        return loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        with self._replaying(inputs):
            return super()._compute_loss(model, inputs)

    @contextmanager
    def _replaying(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Within it the scoring forwards replay the batch's record, if it has one."""
        tensors = {name.removeprefix(_PREFIX): inputs[name] for name in inputs if name.startswith(_PREFIX)}
        if not tensors:
            yield
            return
        record = MixRecord(**tensors, prompt_length=inputs["prompt_ids"].shape[1])
        if "old_per_token_logps" in inputs:
            # The policy may have moved on. The old log-probabilities were compared when they were computed.
            record = replace(record, logprobs=None)
        self._batch_record = record
        try:
            yield
        finally:
            self._batch_record = None
        cosines = torch.cat([*self.mixing.mixer.cosines, torch.zeros(0, device=self.accelerator.device)])
        local = torch.stack([cosines.sum(), torch.ones_like(cosines).sum()])
        self._metrics["train"][COSINE].append(mean(*self.accelerator.reduce(local, reduction="sum").tolist()))

    def _log_replay_error(self, logps: Tensor, record: MixRecord, completion_mask: Tensor) -> None:
        assert record.logprobs is not None
        dtype = lowest_precision(self.model, self.accelerator.mixed_precision)
        sums = replay_sums(logps.detach() - record.logprobs, record.gate, completion_mask, replay_tolerance(dtype))
        errors = replay_errors(self.accelerator.gather(sums[None].float()))
        self._metrics["train"][REPLAY_ERROR].append(errors.largest)
        self._metrics["train"][REPLAY_OUTLIERS].append(errors.outliers)
        cause = replay_error_cause(self.model, errors, dtype=dtype, use_vllm=self.use_vllm)
        if cause is None or cause.name in self._warned:
            return
        self._warned.add(cause.name)
        logger.warning(
            f"{REPLAY_ERROR} is {errors.largest:.2g}, and the importance ratios are as wrong. {cause.explanation} "
            "(Said once.)"
        )

    # Checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._mixes and self.args.should_save:
            # Before the rest: a checkpoint that is complete has it.
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / _STATE_FILE, self.mixing.state_dict())
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self._mixes:
            return
        path = Path(checkpoint, _STATE_FILE)
        if not path.exists():
            logger.warning(
                f"{path} is missing: the checkpoint is of GRPOTrainer, of a rate of 0, or incomplete. Rows are counted "
                "from 0, so that gates of earlier rollouts may be drawn again."
            )
            return
        self.mixing.load_state_dict(read_json(path), str(path), logger.warning)
