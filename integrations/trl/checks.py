"""Runs in the trainer's process. Its checks: TRL's methods, the settings, the model, the error of a replay."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import trl
from torch import nn
from transformers import ProcessorMixin
from trl import GRPOTrainer

from ngrpo_ops import MixingConfig
from ngrpo_ops._patching import Refusal, check_signature, refuse
from ngrpo_ops.versions import TESTED

from ..transformers import refuse_generation, refuse_unsupported_filters
from .config import NGRPOConfig

# TRL ----------------------------------------------------------------------------------------------------------------

EXPECTED_PARAMETERS = {
    "_generate_single_turn": ["self", "prompt_ids", "images", "multimodal_fields", "num_generations"],
    "_generate": ["self", "prompts"],
    "_generate_and_score_completions": ["self", "inputs"],
    "_get_per_token_logps_and_entropies": ["self", "model", "input_ids", "attention_mask", "logits_to_keep"],
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
        check_signature(GRPOTrainer, name, expected, framework, TESTED["trl"], prefix=True, where=where)


# Settings and models ------------------------------------------------------------------------------------------------

_UNSCORED = {"temperature", "do_sample", "eos_token_id", "num_return_sequences", "n", "logprobs", "extra_args"}
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
                "vllm_mode='server'",
                args.use_vllm and args.vllm_mode != "colocate",
                "TRL's server returns tokens and log-probabilities alone, and without the records no rollout can be "
                "replayed; use vllm_mode='colocate'",
            ),
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
                "generation_kwargs",
                _UNSCORED & set(args.generation_kwargs or {}),
                f"{', '.join(sorted(_UNSCORED))} there change the rollout but not what the trainer scores; set the "
                "temperature in NGRPOConfig, and end tokens in the model's generation_config",
            ),
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
        "is not supported by NGRPOTrainer",
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
    refuse_generation(trainer.generation_config, dict(trainer.generation_kwargs))
    if config.draws:
        refuse_unsupported_filters(trainer.generation_config)


_POSITION_MODULE = re.compile(r"(^|\.)(wpe|embed_positions?|position_embeddings?|pos_embeddings?)$")


@torch.no_grad()
def _refuse_absolute_positions(model: Any, zero3: bool) -> None:
    """Refuses a model that numbers left padding too.

    TRL's training forward passes no positions, so that such a model sees other inputs there than in the rollout. Only
    models that have a module named like position embeddings are tested: the same prompt, padded and unpadded.

    Raises:
        ValueError: the outputs differ, or the model cannot be tested.
    """
    suspects = [name for name, _ in model.named_modules() if _POSITION_MODULE.search(name)]
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
        logprobs = [model(**inputs).logits[:, -1].float().log_softmax(-1) for inputs in ({"input_ids": ids}, padded)]
    finally:
        model.train(training)
    if (logprobs[0] - logprobs[1]).abs().max() > (1e-3 if model.dtype == torch.float32 else 1e-1):
        raise ValueError(
            f"model {type(model).__name__} has absolute positions ({suspects[0]}) that count left padding: TRL's "
            "training forward numbers a padded prompt differently from its rollout, so no rollout could be replayed"
        )


# The error of a replay ----------------------------------------------------------------------------------------------

_EXACT_TOLERANCE = 1e-3  # float32: cached and full forwards of a trained model differ by some 1e-5
_ROUNDING_TOLERANCE = 0.5  # lower precisions: GRPO itself differs by some tenths
_ROUNDING_RATIO = 10  # the largest of many rounding errors over the largest of the few before a row's first mix
_ROUNDING_UNIT = 2.0**-8  # bfloat16's; those few may by chance be smaller


class Cause(NamedTuple):
    """What an error comes from: a short name, and the explanation with what to do."""

    name: str
    explanation: str


def replay_error_cause(
    model: Any, error: float, error_before_mix: float, *, mixed_precision: str, use_vllm: bool
) -> Cause | None:
    """What the error of a replay comes from.

    Args:
        model: the policy.
        error: the largest |rollout - replayed log-probability|.
        error_before_mix: the same over the tokens that no mixed step precedes in their row. A replay cannot get these
            wrong.
        mixed_precision: as accelerate calls it; "no" for none.
        use_vllm: whether an engine generates the rollouts.

    Returns:
        The cause; None for an error that rounding explains.
    """
    if error <= _EXACT_TOLERANCE:  # False for NaN
        return None
    dropouts = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    dropouts |= {getattr(model.config, "attention_dropout", None) or 0.0}
    if model.training and any(dropouts):
        return Cause(
            "dropout",
            f"The model has dropout ({', '.join(str(p) for p in sorted(dropouts) if p)}), which is drawn anew in "
            "every training forward: set disable_dropout=True.",
        )
    exact = mixed_precision == "no" and model.dtype == torch.float32
    if exact:
        forwards_differ = not error_before_mix <= _EXACT_TOLERANCE
    else:
        forwards_differ = not error > _ROUNDING_RATIO * max(error_before_mix, _ROUNDING_UNIT)
        if forwards_differ and error_before_mix <= _ROUNDING_TOLERANCE:
            return None
    if not forwards_differ:
        return Cause(
            "replay",
            f"Where no mix precedes in its row it is {error_before_mix:.2g}: the training forward does not embed the "
            "mixes (its input embeddings were replaced, or it was compiled or captured without their hooks).",
        )
    engine = "an engine with other weights, precision or kernels; " if use_vllm else ""
    return Cause(
        "before",
        f"Where no mix precedes in its row it is {error_before_mix:.2g} already, so that it is not the replay's: the "
        f"training forward differs from the rollout's, mixed or not ({engine}positions that count the padding; a "
        "patched forward).",
    )
