"""What cannot be mixed: models, prompts and settings of `generate`. Runs in the process of the model."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from ngrpo_ops._patching import Refusal, refuse


def refuse_generation(generation: GenerationConfig, arguments: dict[str, Any]) -> None:
    """Refuses settings of `generate` under which mixing would silently not happen, or be wrong.

    Args:
        generation: the resolved generation configuration.
        arguments: further arguments of `generate`.

    Raises:
        ValueError: the setting, its value and the reason.

    Example:
        >>> from transformers import GenerationConfig
        >>> from ngrpo_ops.integrations.transformers import refuse_generation
        >>> refuse_generation(GenerationConfig(do_sample=True), {})
        >>> refuse_generation(GenerationConfig(use_cache=False), {})
        Traceback (most recent call last):
        ValueError: use_cache=False cannot be mixed: every step would embed the plain ids of earlier steps again
    """
    mode = generation.get_generation_mode(arguments.get("assistant_model"))
    prompts = [
        Refusal(name, arguments.get(name) is not None, "pass the prompt as input_ids")
        for name in ("inputs_embeds", "custom_generate", "inputs")
    ]
    refuse(
        [
            Refusal(
                f"generation mode {mode.value!r}",
                mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE),
                "beams reorder rows and assisted decoding proposes several tokens a step; use greedy search or "
                "sampling (num_beams=1, no assistant_model, no prompt_lookup_num_tokens)",
            ),
            Refusal(
                "use_cache=False",
                generation.use_cache is False,
                "every step would embed the plain ids of earlier steps again",
            ),
            Refusal(
                f"guidance_scale={generation.guidance_scale}",
                generation.guidance_scale not in (None, 1, 1.0),
                "its second forward a step embeds plain ids",
            ),
            Refusal(
                "cache_implementation='paged' (continuous batching)",
                generation.cache_implementation == "paged",
                "it ignores the hooks",
            ),
            Refusal(
                "compile_config",
                generation.compile_config is not None,
                "the armed hooks are not part of a compiled forward; leave it None",
            ),
            Refusal("token_healing", generation.token_healing, "it rewrites the prompt"),
            *prompts,
        ]
    )
    cache = arguments.get("past_key_values")
    cached = 0 if cache is None else cache.get_seq_length()
    refuse(
        [
            Refusal(
                "past_key_values",
                cached,
                "these may have been mixed, no record would say so, and they would be replayed as plain ids",
            )
        ],
        verb=f"must be empty, got a cache of {cached} tokens",
    )


_UNSUPPORTED_FILTERS = {  # and the values that turn them off
    "typical_p": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
    "watermarking_config": (None,),
    "renormalize_logits": (None, False),
}


def refuse_unsupported_filters(generation: GenerationConfig) -> None:
    """Refuses filters of a sampled generation that the sampler "counter_based" and strategies that draw do not have.

    Raises:
        ValueError: the setting and its value.

    Example:
        >>> from transformers import GenerationConfig
        >>> from ngrpo_ops.integrations.transformers import refuse_unsupported_filters
        >>> refuse_unsupported_filters(GenerationConfig(do_sample=True, top_p=0.9))
        >>> refuse_unsupported_filters(GenerationConfig(do_sample=True, typical_p=0.9))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: typical_p=0.9 is not supported by sampler 'counter_based' nor by strategies that draw: ...
    """
    values = {name: getattr(generation, name, None) for name in _UNSUPPORTED_FILTERS}
    refuse(
        [
            Refusal(
                f"{name}={value}",
                generation.do_sample and value not in _UNSUPPORTED_FILTERS[name],
                f"these have temperature, top_k, top_p and min_p; leave {name} out, or take sampler 'native' and "
                "another strategy",
            )
            for name, value in values.items()
        ],
        verb="is not supported by sampler 'counter_based' nor by strategies that draw",
    )


def supported_model(model: Any) -> Any:
    """The causal language model that `model` is, or that PEFT has wrapped in it.

    Raises:
        TypeError: not a model of transformers.
        ValueError: an encoder-decoder, or PEFT prompt learning.
    """
    # `generate` of a PEFT wrapper runs the loop, and so the forwards, of the model inside.
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(f"model must be a transformers model, or one wrapped by PEFT, got {type(model).__name__}")
    if inner.config.is_encoder_decoder:
        raise ValueError(f"model must be decoder-only, got the encoder-decoder {type(inner).__name__}")
    refuse(
        [
            Refusal(
                f"model with the prompt-learning PEFT adapter {name!r} ({type(adapter).__name__})",
                getattr(adapter, "is_prompt_learning", False),
                "its virtual tokens shift every position; use LoRA or full fine-tuning",
            )
            for name, adapter in getattr(model, "peft_config", {}).items()
        ]
    )
    return inner


def require_prompts(input_ids: Tensor | None) -> Tensor:
    """Checks that there are prompts [B, P], and returns them.

    Raises:
        ValueError: no prompts, or of another shape.
    """
    if input_ids is None or input_ids.dim() != 2 or input_ids.numel() == 0:
        got = None if input_ids is None else tuple(input_ids.shape)
        raise ValueError(f"input_ids must be a non-empty [B, P], got {got}")
    return input_ids


def require_one_vocabulary(embeddings: int, logits: int) -> None:
    """Checks that a model has as many logits as token embeddings.

    Raises:
        ValueError: the numbers differ.
    """
    if embeddings != logits:
        raise ValueError(
            f"the model has {embeddings} token embeddings but {logits} logits: two vocabularies that differ cannot be "
            "mixed (resize_token_embeddings makes them equal)"
        )
