"""Runs in the trainer's process. Its checks: TRL's methods, the settings, the model, the error of a replay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import trl
from torch import nn
from transformers import ProcessorMixin
from trl import GRPOTrainer

from ngrpo_ops import MixingConfig
from ngrpo_ops._patching import Refusal, check_signature, refuse
from ngrpo_ops.metrics import ReplayErrors, replay_tolerance
from ngrpo_ops.versions import tested

from ..transformers import refuse_generation, refuse_unsupported_filters
from ..transformers.checks import evaluating, position_modules
from .config import NGRPOConfig

# TRL ----------------------------------------------------------------------------------------------------------------

EXPECTED_PARAMETERS = {
    "_generate_single_turn": ["self", "prompt_ids"],
    "_generate": ["self", "prompts"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_get_per_token_logps_and_entropies": ["self", "model", "input_ids", "attention_mask", "logits_to_keep"],
    "training_step": ["self", "model", "inputs"],
    "_compute_loss": ["self", "model", "inputs"],
    "_log_completion_extra": ["self", "column", "values"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
}
"""The methods of GRPOTrainer that the adapter overrides or calls, each with its first parameters."""


def check_trl() -> None:
    """
    Raises:
        ImportError: TRL has changed one of `EXPECTED_PARAMETERS`. The methods are private to TRL.
    """
    framework = f"TRL {trl.__version__}"
    for name, expected in EXPECTED_PARAMETERS.items():
        where = f"GRPOTrainer.{name}"
        check_signature(GRPOTrainer, name, expected, framework, tested("trl"), prefix=True, where=where)


# Settings and models ------------------------------------------------------------------------------------------------

_NOT_SUPPORTED = "is not supported by NGRPOTrainer"
_REQUEST = (
    "echo", "model", "prompt", "prompt_embeds", "request_id", "return_token_ids", "return_tokens_as_token_ids",
    "stream", "suffix", "truncate_prompt_tokens", "use_beam_search",
)  # fmt: skip
_LATER_TURN = "turn encodes the earlier turns again, without their mixes"


def refuse_settings(args: NGRPOConfig, given: Mapping[str, Any]) -> None:
    """Refuses what the trainer's arguments already tell, before anything is loaded.

    Args:
        args: the trainer's configuration.
        given: all of the trainer's arguments by name.

    Raises:
        ValueError: a setting under which mixing would silently not happen, or be wrong; the message has the reason.
    """
    peft = [given.get("peft_config"), *getattr(given["model"], "peft_config", {}).values()]
    refuse(
        [
            Refusal(
                "use_transformers_continuous_batching=True",
                args.use_transformers_continuous_batching,
                "continuous batching does not go through generate",
            ),
            Refusal(
                "neftune_noise_alpha",
                args.neftune_noise_alpha,
                "its noise on the embeddings is drawn anew in every training forward, so no rollout could be replayed",
            ),
            Refusal(
                "use_liger_kernel=True",
                args.use_liger_kernel and hasattr(GRPOTrainer, "compute_liger_loss"),
                f"TRL {trl.__version__} scores in Liger's own loss then, past every replay; TRL 1.16 applies Liger to "
                "the model's layers alone",
            ),
            *_unscored(args),
            Refusal("rollout_func", given.get("rollout_func"), "a rollout of your own is not mixed"),
            Refusal("tools", given.get("tools"), f"a tool's {_LATER_TURN}"),
            Refusal("environment_factory", given.get("environment_factory"), f"an environment's {_LATER_TURN}"),
            Refusal(
                "processing_class",
                isinstance(given.get("processing_class"), ProcessorMixin),
                "vision-language models are not supported",
            ),
            Refusal(
                "peft_config",
                any(getattr(config, "is_prompt_learning", False) for config in peft),
                "the virtual tokens of prompt learning shift every position; use LoRA",
            ),
        ],
        _NOT_SUPPORTED,
    )


def _unscored(args: NGRPOConfig) -> list[Refusal]:
    """Settings of generation_kwargs that change the rollout and not what the trainer scores. The trainer's own pass."""
    scored: dict[str, tuple[Any, ...]] = {
        "temperature": (args.temperature,),
        "do_sample": (True,),
        "num_return_sequences": (None, 1),
        "n": (None, 1),
        "logprobs": (None, 0),
        "extra_args": (None, {}),
    }
    if args.use_vllm and args.vllm_mode == "server":
        # Of the body of a request over HTTP. The row id is the trainer's.
        scored |= dict.fromkeys(_REQUEST, (None, False))
        scored |= {"vllm_xargs": (None, {})}
    settings: Any = args.generation_kwargs or {}
    return [_unscored_refusal(name, value, scored[name]) for name, value in settings.items() if name in scored]


def _unscored_refusal(name: str, value: Any, scored: tuple[Any, ...]) -> Refusal:
    where = {"temperature": "in NGRPOConfig", "eos_token_id": "in the model's generation_config"}
    reason = "it changes the rollout but not what the trainer scores"
    return Refusal(
        f"generation_kwargs {{{name!r}: {value!r}}}",
        value not in scored,
        f"{reason}; set it {where[name]}" if name in where else reason,
    )


def refuse_loaded(trainer: Any, config: MixingConfig) -> None:
    """Refuses what is known only after the model is loaded and prepared.

    Raises:
        ValueError: a model, a way of sharding it or a generation setting with which a rollout cannot be mixed or
            replayed; the message has the reason.
    """
    model = trainer.model
    if trainer._is_vlm or getattr(model.config, "vision_config", None) is not None:
        raise ValueError(f"model {type(model).__name__} is a vision-language model: not supported")
    if trainer._dist.fsdp_version == 1:
        raise ValueError("FSDP 1 flattens the embedding table with other weights: use FSDP 2 (fsdp_version: 2)")
    zero3 = trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3
    _refuse_absolute_positions(model, zero3)
    if trainer.use_vllm:
        return
    inner = trainer.accelerator.unwrap_model(model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    settings: Any = trainer.args.generation_kwargs or {}
    if (ends := settings.get("eos_token_id")) is not None:
        ends = sorted(ends) if isinstance(ends, list | tuple | set) else [ends]
        own = getattr(trainer, "eos_token_ids", [trainer._tokenizer.eos_token_id])  # one until TRL 1.14
        refuse([_unscored_refusal("eos_token_id", ends, (sorted(own),))], _NOT_SUPPORTED)
    # With what the model's own generation_config adds to it, as generate will read it.
    generation, _ = inner._prepare_generation_config(trainer.generation_config)
    refuse_generation(generation, dict(trainer.generation_kwargs))
    if config.draws:
        refuse_unsupported_filters(generation)


@torch.no_grad()
def _refuse_absolute_positions(model: Any, zero3: bool) -> None:
    """Refuses a model that numbers left padding too.

    TRL's training forward passes no positions, so that such a model sees other inputs there than in the rollout. Only
    models that have a module named like position embeddings are tested: the same prompt, padded and unpadded.

    Raises:
        ValueError: the outputs differ, or the model cannot be tested.
    """
    suspects = position_modules(model)
    if not suspects:
        return
    if zero3:
        raise ValueError(
            f"model {type(model).__name__} has positions of its own ({suspects[0]}), and whether they count left "
            "padding cannot be tried under DeepSpeed ZeRO-3: use ZeRO-2"
        )
    device = model.device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(8, device=device)[None] % vocabulary
    mask = torch.ones_like(ids)
    padded = {"input_ids": torch.cat([ids, ids], 1), "attention_mask": torch.cat([1 - mask, mask], 1)}
    with evaluating(model):
        logprobs = [model(**inputs).logits[:, -1].float().log_softmax(-1) for inputs in ({"input_ids": ids}, padded)]
    if (logprobs[0] - logprobs[1]).abs().max() > (1e-3 if model.dtype == torch.float32 else 1e-1):
        raise ValueError(
            f"model {type(model).__name__} has absolute positions ({suspects[0]}) that count left padding: TRL's "
            "training forward numbers a padded prompt differently from its rollout, so no rollout could be replayed"
        )


# The error of a replay ----------------------------------------------------------------------------------------------

# Shares of tokens that are off by more than rounding makes them. A mixture of experts in bfloat16 chooses other experts
# for some tokens in a thousand, which may be off by tenths. Without the replay a third of the tokens and more are off.
_EXACT_SHARE = 0.01  # in float32
_ROUNDING_SHARE_AFTER, _ROUNDING_SHARE_BEFORE = 0.1, 0.5  # GRPO itself differs between engine and trainer
_RATIO = 4  # of what follows a mix to what precedes any


class Cause(NamedTuple):
    """What an error comes from: a short name, and the explanation with what to do."""

    name: str
    explanation: str


def lowest_precision(model: Any, mixed_precision: str) -> torch.dtype:
    """The dtype in which a model's training forward rounds."""
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed_precision, torch.float32)
    return max(autocast, model.dtype, key=lambda dtype: torch.finfo(dtype).eps)


def replay_error_cause(model: Any, errors: ReplayErrors, *, dtype: torch.dtype, use_vllm: bool) -> Cause | None:
    """What the errors of a replay come from.

    Args:
        model: the policy.
        errors: of a batch, with the tolerance of `dtype`.
        dtype: see `lowest_precision`.
        use_vllm: whether an engine generates the rollouts.

    Returns:
        The cause; None for errors that rounding explains.
    """
    exact = dtype == torch.float32
    before = errors.outliers_before > (_EXACT_SHARE if exact else _ROUNDING_SHARE_BEFORE)  # False for NaN
    baseline = _RATIO * errors.outliers_before if errors.outliers_before > 0 else 0.0
    missing = errors.outliers > max(_EXACT_SHARE if exact else _ROUNDING_SHARE_AFTER, baseline)
    if not (before or missing):
        return None
    dropouts = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    dropouts |= {getattr(model.config, "attention_dropout", None) or 0.0}
    if model.training and any(dropouts):
        return Cause(
            "dropout",
            f"The model has dropout ({', '.join(str(p) for p in sorted(dropouts) if p)}), which is drawn anew in "
            "every training forward: set disable_dropout=True.",
        )
    shares = (
        f"Of the tokens after a mix {errors.outliers:.2g} are off by more than {replay_tolerance(dtype):.2g}, of those "
        f"before any {errors.outliers_before:.2g}."
    )
    where = f"{shares} Where no mix precedes in its row it is {errors.largest_before:.2g}"
    if not before:
        return Cause(
            "replay",
            f"{where}: the training forward does not embed the mixes (its input embeddings were replaced, or it was "
            "compiled or captured without their hooks).",
        )
    engine = "an engine with other weights, precision or kernels; " if use_vllm else ""
    experts = "experts that are chosen otherwise in another precision; " if _has_experts(model) else ""
    return Cause(
        "before",
        f"{where} already, so that it is not the replay's: the training forward differs from the rollout's, mixed or "
        f"not ({engine}{experts}positions that count the padding; a patched forward).",
    )


def _has_experts(model: Any) -> bool:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any((getattr(model.config, name, None) or 0) > 1 for name in names)
