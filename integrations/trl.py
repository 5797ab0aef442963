"""N-GRPO in TRL: `NGRPOConfig` and `NGRPOTrainer` in the place of `GRPOConfig` and `GRPOTrainer`.

The trainer's own loss, advantages, sampling and logging are kept; what is added is the rollout's mixing and the replay
of its embeddings in every forward that scores a rollout: old, current and reference log-probabilities. Every override
calls the method it overrides.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

try:
    import trl
    from transformers import ProcessorMixin
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
    from transformers.utils import logging
    from trl import GRPOConfig, GRPOTrainer
except ImportError as error:
    raise ImportError("this adapter needs TRL: pip install '.[trl]' in a checkout of ngrpo_ops") from error

from ngrpo_ops import MixingConfig, MixRecord
from ngrpo_ops.versions import TESTED

from .transformers import NeighborMixing, refuse_generation, refuse_unsupported_filters

logger = logging.get_logger(__name__)

_STATE_FILE = "mixing_state.json"
_PREFIX = "mix_"

_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions?|position_embeddings?|pos_embeddings?)$")
_REPLAY_TOLERANCE = 1e-3  # cached and full forwards of a trained model differ by some 1e-5 in float32
_ROUNDING_TOLERANCE = 0.5  # of lower precisions, where GRPO itself has some tenths
_ROUNDING_SPREAD = 10  # the largest of many roundings over that of the few before the first mix,
_ROUNDING_UNIT = 2.0**-8  # bfloat16's, which these may happen to stay below

# The methods overridden are private to TRL: a change of theirs must stop the import, not the mixing.
_EXPECTED_PARAMETERS = {
    "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"],
    "_generate": ["self", "prompts"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_get_per_token_logps_and_entropies": ["self", "model", "input_ids", "attention_mask", "logits_to_keep"],
    "_compute_loss": ["self", "model", "inputs"],
    "_log_completion_extra": ["self", "column", "values"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
}


def _check_trl() -> None:
    for name, expected in _EXPECTED_PARAMETERS.items():
        method = getattr(GRPOTrainer, name, None)
        found = None if not callable(method) else list(inspect.signature(method).parameters)[: len(expected)]
        if found != expected:
            raise ImportError(
                f"TRL {trl.__version__} has changed GRPOTrainer.{name}: expected parameters {expected}, found {found}. "
                f"This version of ngrpo-ops is tested with TRL {TESTED['trl']}."
            )


_check_trl()
_SIGNATURE = inspect.signature(GRPOTrainer.__init__)


@dataclass
class NGRPOConfig(GRPOConfig):
    """`GRPOConfig` with the fields of N-GRPO; `MixingConfig` says what each means. The other defaults are TRL's.

    Raises:
        ValueError: a mixing field out of range, by name.
    """

    mixing_k: int | None = field(
        default=None,
        metadata={
            "help": "Candidates a mixed step combines, the anchor counted. 1 only emits the anchor. None: 3, or 1 for "
            "strategy 'anchor'."
        },
    )
    mixing_rate: float = field(
        default=0.1,
        metadata={"help": "Probability that a step of a training rollout is mixed. 0 is GRPO."},
    )
    mixing_temperature: float | None = field(
        default=None,
        metadata={"help": "Temperature of the mixing weights. None: the rollout's own temperature."},
    )
    mixing_metric: str = field(
        default="cosine",
        metadata={"help": "Similarity of the neighbours: 'cosine', 'dot', 'l2' or 'l1'."},
    )
    mixing_strategy: str = field(
        default="neighbor",
        metadata={
            "help": "What is mixed: 'neighbor' (N-GRPO), 'topk' (Soft Thinking), 'gumbel' (SofT-GRPO), 'gaussian' "
            "(STHT), 'moi' (Mixture of Inputs), 'multiplex' (Multiplex Thinking) or 'anchor' (nothing: the control)."
        },
    )
    mixing_variant: str = field(
        default="paper",
        metadata={"help": "Weights: 'paper', or 'released', those that the published code really applies."},
    )
    mixing_entropy_threshold: float | None = field(
        default=None,
        metadata={"help": "Mix only where the policy's entropy, in nats, is at least this. None: the rate alone."},
    )
    mixing_noise_scale: float | None = field(
        default=None,
        metadata={"help": "Of strategy 'gaussian': the noise's size over the mix's. None: 0.33."},
    )
    mixing_moi_beta: float | None = field(
        default=None,
        metadata={"help": "Of strategy 'moi': the weight of the sample over that of the distribution. None: 1."},
    )
    mixing_sampler: str = field(
        default="native",
        metadata={
            "help": "Who samples what is not mixed: 'native', generate itself, or 'ngrpo', a generator keyed by seed, "
            "row and step."
        },
    )
    mixing_seed: int | None = field(
        default=None,
        metadata={"help": "Key of the generator that draws gates, noise and the samples of 'ngrpo'. None: `seed`."},
    )
    mixing_stop_token_ids: list[int] | None = field(
        default=None,
        metadata={"help": "A sequence is no longer mixed once it has emitted one of these tokens."},
    )
    mixing_allowed_token_ids: list[int] | None = field(
        default=None,
        metadata={"help": "Tokens that may be neighbours. None: all."},
    )
    loss_on_mixed_steps: bool = field(
        default=True,
        metadata={"help": "Whether the tokens of mixed steps, which are not draws from the policy, enter the loss."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mixing_k = self.mixing().k

    def mixing(self) -> MixingConfig:
        """The fields as a `MixingConfig`."""
        values = {
            "k": self.mixing_k,
            "mixing_rate": self.mixing_rate,
            "temperature": self.mixing_temperature,
            "metric": self.mixing_metric,
            "strategy": self.mixing_strategy,
            "variant": self.mixing_variant,
            "entropy_threshold": self.mixing_entropy_threshold,
            "noise_scale": self.mixing_noise_scale,
            "moi_beta": self.mixing_moi_beta,
            "sampler": self.mixing_sampler,
            "stop_token_ids": self.mixing_stop_token_ids or (),
            "allowed_token_ids": self.mixing_allowed_token_ids,
            "seed": self.seed if self.mixing_seed is None else self.mixing_seed,
        }
        try:
            return MixingConfig(**values, loss_on_mixed_steps=self.loss_on_mixed_steps)  # type: ignore[arg-type]
        except ValueError as error:
            message = str(error)  # begins with the name of the field there; here most have a prefix
            raise ValueError(message if message.startswith("mixing_") else f"mixing_{message}") from None


class NGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` whose training rollouts mix semantic neighbours (arXiv 2606.10768). Takes the same arguments.

    Evaluation and inference do not mix. With ``mixing_rate=0`` rewards, losses and gradients are those of
    `GRPOTrainer`, bit for bit, and the engine of ``use_vllm`` is stock, with no records to log from. Logged beside
    TRL's own metrics, in training:

        mix/gated_share     completion tokens that were mixed
        mix/anchor_differs  over mixed steps, the probability that a sample would have differed from the anchor
        mix/anchor_weight   over mixed steps, the anchor's weight in the mix
        mix/cosine          over mixed steps, cos(mix, anchor's embedding)
        mix/replay_error    largest |rollout - replayed log-probability| while the policy is still the rollout's

    and a column ``mix_share`` in the completions table.

    Raises:
        TypeError: `args` is not an NGRPOConfig.
        ValueError: a setting under which mixing would silently not happen, or be wrong; the message has the reason.
    """

    model: Any
    _tag_names = ["trl", "ngrpo"]  # noqa: RUF012 (as in TRL)
    _name = "N-GRPO"
    _paper = {  # noqa: RUF012
        "title": "N-GRPO: Embedding-Level Neighbor Mixing for Enhanced Policy Optimization",
        "id": "2606.10768",
    }

    @functools.wraps(GRPOTrainer.__init__)  # type: ignore[misc]
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        bound = _SIGNATURE.bind(self, *arguments, **keywords)
        given = bound.arguments
        if given.get("args") is None:
            model = given["model"]
            name = model if isinstance(model, str) else model.config.name_or_path
            given["args"] = NGRPOConfig(f"{name.split('/')[-1]}-NGRPO")
        args = given["args"]
        if not isinstance(args, NGRPOConfig):
            raise TypeError(f"args must be an NGRPOConfig, got {type(args).__name__}")
        _refuse_settings(args, given)
        # At a rate of 0 the engine is stock, as all else is then.
        self._engine_mixes = args.use_vllm and (args.mixing_rate > 0 or args.mixing().sampler == "counter_based")
        with _engines_that_mix(args) if self._engine_mixes else nullcontext():
            super().__init__(*bound.args[1:], **bound.kwargs)
        if self._engine_mixes:
            from .vllm import require_mixing

            require_mixing(self.vllm_generation.llm)
        if self._is_vlm or getattr(self.model.config, "vision_config", None) is not None:
            raise ValueError(f"model {type(self.model).__name__} is a vision-language model: not supported")
        if self._dist.fsdp_version == 1:
            raise ValueError("FSDP 1 flattens the embedding table with other weights: use FSDP 2 (fsdp_version: 2)")
        zero3 = self.is_deepspeed_enabled and self.accelerator.state.deepspeed_plugin.zero_stage == 3
        _refuse_absolute_positions(self.model, zero3)
        if not self.use_vllm:
            refuse_generation(self.generation_config, dict(self.generation_kwargs))
            if args.mixing().draws:
                refuse_unsupported_filters(self.generation_config)
        self.mixing = NeighborMixing(self.accelerator.unwrap_model(self.model), args.mixing())
        if self.ref_model is not None:
            self.mixing.attach(self.accelerator.unwrap_model(self.ref_model))
        self._rollout: MixRecord | None = None  # of the generation under way
        self._replayed: MixRecord | None = None  # what the scoring forwards see at the moment
        self._warned: set[str] = set()

    # Rollout ------------------------------------------------------------------------------------------------------

    def _generate_single_turn(self, prompt_ids: list, *args: Any, **kwargs: Any) -> Any:
        if not self.model.training or (self.use_vllm and not self._engine_mixes):
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        # The gates of a row depend on its place among all rows ever generated, not on how they are spread.
        rows, processes = len(prompt_ids), self.accelerator.num_processes
        first = self.mixing.next_row + self.accelerator.process_index * rows
        self.mixing.next_row += processes * rows
        mixed = self._requests_that_mix if self.use_vllm else self.mixing.rollouts
        with mixed(torch.arange(first, first + rows)) as records:
            result = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if len(records) != 1:
            raise RuntimeError(
                f"the rollout called the {'engine' if self.use_vllm else 'model'}'s generate {len(records)} times, "
                "expected once: something in between (a patched model?) does not generate with it, and nothing would "
                "be mixed"
            )
        self._rollout = records[0].to(self.accelerator.device)
        return result

    @contextmanager
    def _requests_that_mix(self, row_ids: Tensor) -> Iterator[list[MixRecord]]:
        """Within it the colocated engine mixes what it is asked for; the list yielded gains the record of our rows.

        Each request has a seed of its own, so that its tokens too are those of its row, also after a resume. The engine
        of a tensor-parallel group generates the rows of all its ranks, one rank's after the other's, on
        every one of them.
        """
        from .vllm import request_kwargs, request_seed, take_records

        llm, records = self.vllm_generation.llm, []
        rows, place = len(row_ids), self.accelerator.process_index % self.vllm_tensor_parallel_size
        original, patched = llm.generate, vars(llm).get("generate")

        def generate(prompts: list, sampling_params: Any, **kwargs: Any) -> Any:
            first = int(row_ids[0]) - place * rows
            of_group = range(first, first + len(prompts))
            requests = []
            for row in of_group:
                request = sampling_params.clone()
                request.extra_args = {**(request.extra_args or {}), **request_kwargs(row)}
                if request.seed is None:
                    request.seed = request_seed(self.mixing.config.seed, row)
                requests.append(request)
            outputs = original(prompts, sampling_params=requests, **kwargs)
            record = take_records(llm, of_group, [len(output.outputs[0].token_ids) for output in outputs])
            records.append(record[place * rows : (place + 1) * rows])
            return outputs

        llm.generate = generate
        try:
            yield records
        finally:
            del llm.generate  # the class's method is back, or what the user had put in its place
            if patched is not None:
                llm.generate = patched

    def _generate(self, prompts: list) -> Any:
        self._rollout = None
        result = super()._generate(prompts)
        if len(result) != 8:
            raise RuntimeError(f"TRL {trl.__version__} returns {len(result)} values from _generate, expected 8")
        prompt_ids, completion_ids, tool_mask, *rest = result
        record = self._rollout
        if record is None:  # evaluation; the table's columns must be of one length
            self._log_completion_extra("mix_share", [0.0] * len(completion_ids))
            return result
        lengths = torch.tensor([len(ids) for ids in completion_ids], device=record.gate.device)
        self._log_completion_extra("mix_share", [round(share, 4) for share in (record.gate.sum(1) / lengths).tolist()])
        self._log_rollout(record, lengths)
        if not self.mixing.config.loss_on_mixed_steps:
            # TRL's own mask for tokens that are not the policy's: its normalisers know of it.
            loss = (~record.gate).long().cpu()
            tool_mask = [row[:length].tolist() for row, length in zip(loss, lengths.tolist(), strict=True)]
        return prompt_ids, completion_ids, tool_mask, *rest

    def _log_rollout(self, record: MixRecord, lengths: Tensor) -> None:
        gate = record.gate
        assert record.logprobs is not None
        sums = [gate.sum(), lengths.sum(), (1 - record.logprobs.exp())[gate].sum(), record.weights[..., 0][gate].sum()]
        local = torch.stack([value.double().to(self.accelerator.device) for value in sums])
        gated, tokens, differs, weight = self.accelerator.reduce(local, reduction="sum").tolist()
        metrics = self._metrics["train"]
        metrics["mix/gated_share"].append(gated / tokens)
        metrics["mix/anchor_differs"].append(differs / gated if gated else float("nan"))
        metrics["mix/anchor_weight"].append(weight / gated if gated else float("nan"))

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        try:
            output = super()._generate_and_score_completions(inputs)
            if self._rollout is None:
                return output
            record = self._rollout.fit(output["completion_ids"].shape[1])
        finally:
            self._rollout = None
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
        record = self._rollout if self._replayed is None else self._replayed
        if record is None:
            return score(logits_to_keep, *args, **kwargs)
        record = record.fit(logits_to_keep, input_ids.shape[1] - logits_to_keep)
        with self.mixing.replay(record, self.accelerator.unwrap_model(model)):
            result = score(logits_to_keep, *args, **kwargs)
        if self._replayed is not None and record.logprobs is not None:
            self._log_replay_error(result[0], record, attention_mask[:, -logits_to_keep:])
        return result

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        with self._replaying(inputs):
            return super()._compute_loss(model, inputs)

    @contextmanager
    def _replaying(self, inputs: dict[str, Any]) -> Iterator[None]:
        tensors = {name.removeprefix(_PREFIX): inputs[name] for name in inputs if name.startswith(_PREFIX)}
        if not tensors:
            yield
            return
        record = MixRecord(**tensors, prompt_length=inputs["prompt_ids"].shape[1])
        if "old_per_token_logps" in inputs:
            # The policy may have moved on; the old log-probabilities were compared when they were computed.
            record = replace(record, logprobs=None)
        self._replayed = record
        try:
            yield
        finally:
            self._replayed = None
        cosines = torch.cat([*self.mixing.mixer.cosines, torch.zeros(0, device=self.accelerator.device)])
        local = torch.stack([cosines.sum(), torch.ones_like(cosines).sum()])
        total, count = self.accelerator.reduce(local, reduction="sum").tolist()
        self._metrics["train"]["mix/cosine"].append(total / count if count else float("nan"))

    def _log_replay_error(self, logps: Tensor, record: MixRecord, completion_mask: Tensor) -> None:
        assert record.logprobs is not None
        error = (logps.detach() - record.logprobs).abs() * completion_mask
        # A step's own mix is embedded after it: what a replay can get wrong are the steps that follow one.
        follows = record.gate.cumsum(1) - record.gate.long() > 0
        largest = torch.stack([error.max(), (error * ~follows).max()])
        whole, before = self.accelerator.gather(largest[None]).amax(0).tolist()
        self._metrics["train"]["mix/replay_error"].append(whole)
        if not whole <= _REPLAY_TOLERANCE and (cause := self._cause(whole, before)) is not None:
            self._warn_once(*cause, whole)

    def _warn_once(self, name: str, cause: str, error: float) -> None:
        if name not in self._warned:
            self._warned.add(name)
            logger.warning(
                f"mix/replay_error is {error:.2g}, and the importance ratios are as wrong. {cause} (Said once.)"
            )

    def _cause(self, whole: float, before: float) -> tuple[str, str] | None:
        """What an error of the replay comes from, given that of the steps which no mix precedes: name and words; None
        where lower precisions than float32 have as much."""
        dropouts = {module.p for module in self.model.modules() if isinstance(module, nn.Dropout)}
        dropouts |= {getattr(self.model.config, "attention_dropout", None) or 0.0}
        if self.model.training and any(dropouts):
            return "dropout", (
                f"The model has dropout ({', '.join(str(p) for p in sorted(dropouts) if p)}), which is drawn anew in "
                "every training forward: set disable_dropout=True."
            )
        exact = self.accelerator.mixed_precision == "no" and self.model.dtype == torch.float32
        if not before <= _REPLAY_TOLERANCE if exact else not whole > _ROUNDING_SPREAD * max(before, _ROUNDING_UNIT):
            if not exact and before <= _ROUNDING_TOLERANCE:
                return None
            engine = "an engine with other weights, precision or kernels; " if self.use_vllm else ""
            return "before", (
                f"Where no mix precedes in its row it is {before:.2g} already, so that it is not the replay's: the "
                f"training forward differs from the rollout's, mixed or not ({engine}positions that count "
                "the padding; a patched forward)."
            )
        return "replay", (
            f"Where no mix precedes in its row it is {before:.2g}: the training forward does not embed the mixes (its "
            "input embeddings were replaced, or it was compiled or captured without their hooks)."
        )

    # Checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = os.path.join(
                self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            )
            with open(os.path.join(folder, _STATE_FILE), "w") as file:
                json.dump(self.mixing.state_dict(), file)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        path = None if checkpoint is None else os.path.join(checkpoint, _STATE_FILE)
        if path is not None and os.path.exists(path):  # a checkpoint of GRPOTrainer has none
            with open(path) as file:
                self.mixing.load_state_dict(json.load(file))


@torch.no_grad()
def _refuse_absolute_positions(model: Any, zero3: bool) -> None:
    """TRL's training forward passes no positions: a model that numbers left padding too sees other inputs there.

    Only models with a module named like position embeddings are tried, padded against unpadded.
    """
    suspects = [name for name, _ in model.named_modules() if _POSITIONS.search(name)]
    if not suspects:
        return
    if zero3:
        raise ValueError(
            f"model {type(model).__name__} has positions of its own ({suspects[0]}), and whether they count left "
            "padding cannot be tried under DeepSpeed ZeRO-3: use ZeRO-2"
        )
    training, device = model.training, model.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(8, device=device)[None] % vocabulary
    mask = torch.ones_like(ids)
    padded = {"input_ids": torch.cat([ids, ids], 1), "attention_mask": torch.cat([1 - mask, mask], 1)}
    model.eval()
    try:
        seen = [model(**inputs).logits[:, -1].float().log_softmax(-1) for inputs in ({"input_ids": ids}, padded)]
    finally:
        model.train(training)
    if (seen[0] - seen[1]).abs().max() > (1e-3 if model.dtype == torch.float32 else 1e-1):
        raise ValueError(
            f"model {type(model).__name__} has absolute positions ({suspects[0]}) that count left padding: TRL's "
            "training forward numbers a padded prompt differently from its rollout, so no rollout could be replayed"
        )


@contextmanager
def _engines_that_mix(args: NGRPOConfig) -> Iterator[None]:
    """Within it TRL's colocated engine is one that can mix: TRL has no setting that reaches its arguments."""
    from trl.generation import vllm_generation

    from .vllm import engine_kwargs

    original = vllm_generation.LLM
    vllm_generation.LLM = functools.partial(original, **engine_kwargs(args.mixing()))
    try:
        yield
    finally:
        vllm_generation.LLM = original


_UNSCORED = {"temperature", "do_sample", "eos_token_id", "num_return_sequences", "n", "logprobs", "extra_args"}


def _refuse_settings(args: NGRPOConfig, given: dict[str, Any]) -> None:
    """Refuse, before anything is loaded, what the arguments already tell."""
    peft = [given.get("peft_config"), *getattr(given["model"], "peft_config", {}).values()]
    refused = {
        "vllm_mode='server'": (
            args.use_vllm and args.vllm_mode != "colocate",
            "TRL's server returns tokens and log-probabilities alone, and without the records no rollout can be "
            "replayed; use vllm_mode='colocate'",
        ),
        "use_transformers_continuous_batching=True": (
            args.use_transformers_continuous_batching,
            "continuous batching does not go through generate",
        ),
        "neftune_noise_alpha": (
            args.neftune_noise_alpha,
            "its noise on the embeddings is drawn anew in every training forward, so no rollout could be replayed",
        ),
        "generation_kwargs": (
            _UNSCORED & set(args.generation_kwargs or {}),
            f"{', '.join(sorted(_UNSCORED))} there change the rollout but not what the trainer scores; set the "
            "temperature in NGRPOConfig, and end tokens in the model's generation_config",
        ),
        "rollout_func": (given.get("rollout_func"), "a rollout of your own is not mixed"),
        "tools": (given.get("tools"), "a tool's turn encodes the earlier turns again, without their mixes"),
        "environment_factory": (
            given.get("environment_factory"),
            "an environment's turn encodes the earlier turns again, without their mixes",
        ),
        "processing_class": (
            isinstance(given.get("processing_class"), ProcessorMixin),
            "vision-language models are not supported",
        ),
        "peft_config": (
            any(getattr(config, "is_prompt_learning", False) for config in peft),
            "the virtual tokens of prompt learning shift every position; use LoRA",
        ),
    }
    for name, (is_set, reason) in refused.items():
        if is_set:
            raise ValueError(f"{name} is not supported by NGRPOTrainer: {reason}")
