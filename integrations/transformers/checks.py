"""What cannot be mixed: models, prompts and settings of `generate`. Runs in the process of the model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMode

from ngrpo_ops._patching import Refusal, refuse, replaced
from ngrpo_ops.rollout import Overlay

from .hooks import EmbeddingMixer
from .table import input_weight, vocabulary_size


def refuse_generation(generation: GenerationConfig, arguments: dict[str, Any]) -> None:
    """Refuses settings of `generate` under which mixing would silently not happen, or be wrong.

    Args:
        generation: the resolved generation configuration.
        arguments: further arguments of `generate`.

    Raises:
        ValueError: the setting, its value and the reason.

    Examples:
        >>> from transformers import GenerationConfig
        >>> from ngrpo_ops.integrations.transformers import refuse_generation
        >>> refuse_generation(GenerationConfig(do_sample=True), {})
        >>> refuse_generation(GenerationConfig(use_cache=False), {})
        Traceback (most recent call last):
        ValueError: use_cache=False cannot be mixed: every step would embed the plain ids of earlier steps again
    """
    mode = generation.get_generation_mode(arguments.get("assistant_model"))
    one_token = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    other_modes = [
        Refusal(
            f"{f'{name}={value}' if isinstance(value, int | float) else name} (generation mode {mode.value!r})",
            not one_token and value not in ((None, False, 1) if name.startswith("num_beam") else (None, False)),
            reason,
        )
        for name, reason in _OTHER_MODES.items()
        for value in [arguments.get(name, getattr(generation, name, None))]
    ]
    prompts = [
        Refusal(name, arguments.get(name) is not None, "pass the prompt as input_ids")
        for name in ("inputs_embeds", "custom_generate", "inputs")
    ]
    refuse(
        [
            *other_modes,
            Refusal(f"generation mode {mode.value!r}", not one_token, "use greedy search or sampling"),
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
    for name in CACHE_NAMES:
        cached = cached_tokens(arguments.get(name))
        reason = "these may have been mixed, no record would say so, and they would be replayed as plain ids"
        refuse([Refusal(name, cached, reason)], verb=f"must be empty, got a cache of {cached} tokens")


_BEAMS, _SEVERAL = "beams reorder rows; use num_beams=1", "several tokens are proposed a step"
_OTHER_MODES = {  # what chooses a mode of generate with something else than one token of each row a step
    "num_beams": _BEAMS,
    "num_beam_groups": _BEAMS,
    "constraints": _BEAMS,
    "force_words_ids": _BEAMS,
    "penalty_alpha": "contrastive search reads every candidate's hidden state",
    "assistant_model": _SEVERAL,
    "prompt_lookup_num_tokens": _SEVERAL,
    "assistant_early_exit": _SEVERAL,
    "use_mtp": _SEVERAL,
    "dola_layers": "its logits are not the model's",
}
CACHE_NAMES = ("past_key_values", "cache", "cache_params", "state")
"""What transformers calls a key-value cache, in arguments of `generate` and in outputs of models."""


def cached_tokens(cache: Any) -> int:
    """The tokens that a cache of transformers holds, or 1 where it is used and does not count them."""
    if cache is None:
        return 0
    layers = getattr(cache, "layers", None)
    if layers is None:
        return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 1
    lengths = [int(layer.get_seq_length()) for layer in layers if hasattr(layer, "get_seq_length")]
    used = [getattr(layer, "has_previous_state", False) for layer in layers]  # of linear attention
    return max([*lengths, *(int(any(u.values()) if isinstance(u, dict) else bool(u)) for u in used)], default=0)


def require_cache(arguments: dict[str, Any], output: Any) -> None:
    """Checks that the forward which read the prompts has kept them for the steps that follow.

    A model that shows no cache at all, as one that keeps it in its modules, passes.

    Args:
        arguments: the forward's keyword arguments.
        output: what it returned.

    Raises:
        RuntimeError: the caches that it was given or returned are empty.
    """
    shown = [arguments.get(name) for name in CACHE_NAMES] + [getattr(output, name, None) for name in CACHE_NAMES]
    caches = [cache for cache in shown if cache is not None]
    if caches and not any(cached_tokens(cache) for cache in caches):
        raise RuntimeError(
            "the model did not keep its key-value cache: every step would read the last token alone, or embed the "
            "plain ids of earlier steps again. Something in its forward switches the cache off"
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

    Examples:
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


def model_config(model: str, trust_remote_code: bool = False) -> PreTrainedConfig | None:
    """The configuration of a model by its name or path; None where there is none, which its trainer will report."""
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except OSError:
        return None


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


# The model's forwards -----------------------------------------------------------------------------------------------

_POSITIONS = re.compile(r"(^|\.)(wpe|\w*pos(ition(s|al)?)?(_\w*)?)$")


@contextmanager
def without_gradient_checkpointing(model: nn.Module) -> Iterator[None]:
    """Within it no module checkpoints: transformers would drop the cache, and every step would read one token alone."""
    names = ("gradient_checkpointing", "activation_checkpointing")
    with ExitStack() as stack:
        for module in model.modules():
            for name in names:
                if vars(module).get(name) is True:
                    stack.enter_context(replaced(module, name, False))
        yield


def position_modules(model: nn.Module) -> list[str]:
    """The modules whose names say that they embed positions."""
    return [name for name, _ in model.named_modules() if _POSITIONS.search(name)]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode. Afterwards every module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _trial(model: nn.Module) -> Iterator[None]:
    """For a forward whose result nobody uses: no gradients, and the generators as they were."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices)), without_gradient_checkpointing(model):
        yield


def _can_be_tried(model: nn.Module) -> bool:
    """Whether a forward now and here is one of the whole model: no rows are spread over ranks, and none are missing."""
    parameters = list(model.parameters())
    sharded = any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in parameters)
    return not sharded and (hasattr(model, "_hf_hook") or not any(p.is_meta for p in parameters))


def require_repeatable(model: Any) -> None:
    """Checks that a model in training mode computes the same twice. Without dropout it does.

    Raises:
        ValueError: it does not, and so no rollout could be replayed.
    """
    if not model.training or not _can_be_tried(model):
        return
    ids = torch.arange(8, device=_input_device(model))[None] % vocabulary_size(model)
    with _trial(model):
        first, second = (model(input_ids=ids).logits.float() for _ in range(2))
    if not torch.allclose(first, second, rtol=1e-3, atol=1e-3 * float(first.abs().max()), equal_nan=True):
        active = sorted({module.p for module in model.modules() if isinstance(module, nn.Dropout) and module.p})
        raise ValueError(
            f"model is in training mode and two of its forwards differ (dropout {active}?): no rollout could be "
            "replayed; call model.eval() before the rollout, or set the dropout to 0"
        )


def refuse_second_tables(model: Any) -> None:
    """Refuses a model that has a second table of token ids, such as the per-layer inputs of Gemma 3n and 4.

    A mix would be read in one table and the emitted token in the other.

    Raises:
        ValueError: the table and its rows.
    """
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    inside, positions = set(embeddings.modules()), set(position_modules(model))
    for name, module in model.named_modules():
        if not isinstance(module, nn.Embedding) or module in inside or module is output or name in positions:
            continue
        if module.num_embeddings >= vocabulary_size(model) // 2:  # it may lack the tokens that were added last
            _refuse_second_table(model, f"{name} ({module.num_embeddings} rows)")


def require_input_embeddings_alone(model: Any, mixer: EmbeddingMixer) -> None:
    """Checks by forwards that a model knows its tokens by its input embeddings alone.

    Raises:
        ValueError: a mix that is wholly token b is not read as b. RuntimeError: the model does not embed it at all.
    """
    vocabulary = vocabulary_size(model)
    if vocabulary < 2 or not _can_be_tried(model):
        return
    with evaluating(model), _trial(model):
        ids = torch.arange(min(vocabulary, 64), device=_input_device(model))
        rows = model.get_input_embeddings()(ids).float()
        a, b = 0, int((rows - rows[0]).norm(dim=-1).nan_to_num().argmax())
        read_a, read_b = (model(input_ids=ids[[a, token]][None]).logits[0, -1].float() for token in (a, b))
        wholly_b = Overlay(ids[[1]], ids[[a, b]][None], torch.tensor([[0.0, 1.0]], device=ids.device))
        try:
            with mixer.replaying_at(wholly_b):
                mixed = model(input_ids=ids[[a, a]][None]).logits[0, -1].float()
        except RuntimeError as error:
            raise RuntimeError(f"a mix was not embedded: {error}") from error
    if (mixed - read_b).abs().max() > 1e-2 * (read_a - read_b).abs().max() + 1e-6:
        _refuse_second_table(model, "a mix that is wholly one token is not read as that token")


def _refuse_second_table(model: nn.Module, found: str) -> None:
    raise ValueError(
        f"model {type(model).__name__} reads token ids elsewhere than in its input embeddings: {found}. A mix would be "
        "read in one place and the emitted token in the other"
    )


def _input_device(model: Any) -> torch.device:
    device = input_weight(model.get_input_embeddings()).device
    return torch.device("cpu") if device.type == "meta" else device  # accelerate moves the ids where they are read


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
