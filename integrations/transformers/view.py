"""Rollouts of a checkpoint made to be looked at: `python -m ngrpo_ops rollout`. Runs in the process of the model.

Every arm samples the same prompt from the same state of torch's generator. Up to its first mix an arm therefore emits
what plain sampling does, and what differs after it is the mix's doing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ngrpo_ops import MixingConfig, MixRecord, selective_log_softmax
from ngrpo_ops._messages import shown
from ngrpo_ops.metrics import replay_errors, replay_sums, replay_tolerance
from ngrpo_ops.view import Arm, Candidate, Rollouts, Token

from .mixing import NeighborMixing

_PART = "\ufffd"  # what a tokenizer decodes a part of a character to


def load_checkpoint(
    name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer, which pads on the left. Runs none of its code.

    Args:
        name: a folder, or a name on the Hugging Face hub.
        dtype: of the weights.
        device: where they go.

    Raises:
        ValueError: it cannot be loaded, with the reason in a line.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left", trust_remote_code=False)
        with _quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False)
        return model.to(device).eval(), tokenizer
    except Exception as error:  # of transformers, safetensors, tokenizers and the hub, which have no common type
        reason = " ".join(str(error).split())
        raise ValueError(f"model {name!r} cannot be loaded: {type(error).__name__}: {reason}") from error


def roll_out(
    model: Any,
    tokenizer: Any,
    prompt: str,
    arms: Mapping[str, MixingConfig],
    *,
    name: str,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    samples: int = 1,
    seed: int = 0,
) -> Rollouts:
    """Rollouts of a prompt in several settings, as data to be shown.

    Args:
        model: a causal language model of transformers, in evaluation mode.
        tokenizer: the model's. Its chat template is used, where it has one.
        prompt: of the user.
        arms: how to mix, by the name that is shown. A rate of 0 is plain sampling.
        name: of the model, to be shown.
        temperature: of the sampling.
        max_new_tokens: the most tokens of a rollout.
        samples: rollouts in each arm.
        seed: of torch's generator. Gates and noise are drawn by the seed of each configuration.

    Raises:
        ValueError: an empty prompt, or one that with the new tokens is longer than the model's context; what
            `NeighborMixing` refuses.

    Examples:
        >>> import torch
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
        >>> from ngrpo_ops import MixingConfig
        >>> from ngrpo_ops.integrations.transformers.view import roll_out
        >>> words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "d": 3}, unk_token="a"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
        >>> shape = {"vocab_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**shape, eos_token_id=None)).eval()
        >>> arms = {"plain": MixingConfig(mixing_rate=0), "N-GRPO": MixingConfig(mixing_rate=1)}
        >>> shown = roll_out(model, tokenizer, "b", arms, name="tiny", max_new_tokens=3)
        >>> [len(arm.mixed) for arm in shown.arms], len(shown.arms[1].mixed[0].candidates)
        ([0, 3], 3)
    """
    ids, notes = _encode(tokenizer, prompt)
    require_context(model, ids.shape[1], max_new_tokens)
    note = getattr(model.config, "weights_note", None)  # of who made the checkpoint, such as: dequantized
    settings = {
        "temperature": f"{temperature:g}", "at most": f"{max_new_tokens} tokens", "seed": str(seed),
        "weights": str(model.dtype).removeprefix("torch."),
    }  # fmt: skip
    sampling = {"temperature": temperature, "max_new_tokens": max_new_tokens, "num_return_sequences": samples}
    made = [_arm(model, tokenizer, ids, label, config, sampling, seed) for label, config in arms.items()]
    return Rollouts(name, prompt, settings, tuple(made), [*([note] if isinstance(note, str) else []), *notes])


def _encode(tokenizer: Any, prompt: str) -> tuple[Tensor, list[str]]:
    """The ids [1, P] of a prompt, in the tokenizer's chat template, and what must be said of it."""
    notes, text, options = [], prompt, {}
    try:
        if getattr(tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            options = {"add_special_tokens": False}  # which are in the template
        else:
            notes.append("The tokenizer has no chat template: the prompt is read as it stands.")
        ids = tokenizer(text, return_tensors="pt", **options)["input_ids"]
    except Exception as error:  # of the template's own, or a text that is no UTF-8
        raise ValueError(
            f"prompt cannot be encoded by the tokenizer and its chat template: {type(error).__name__}: {error}"
        ) from error
    if not ids.numel():
        raise ValueError(f"prompt must hold at least one token, got {shown(prompt)}")
    return ids.long(), notes


def require_context(model: Any, prompt: int, new: int) -> None:
    """
    Args:
        prompt, new: tokens.

    Raises:
        ValueError: more of them than the model's context has.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and prompt + new > context:
        raise ValueError(
            f"prompt and new tokens must fit the model's context of {context:,} tokens, got {prompt:,} and {new:,}"
        )


def _arm(
    model: Any, tokenizer: Any, ids: Tensor, name: str, config: MixingConfig, sampling: dict[str, Any], seed: int
) -> Arm:
    mixing = NeighborMixing(model, config, tokenizer=tokenizer)
    ids = ids.to(model.device)
    devices = [model.device] if model.device.type == "cuda" else []
    pad = model.generation_config.pad_token_id
    settings: dict[str, Any] = {
        "do_sample": True, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0,  # a training rollout's
        "pad_token_id": tokenizer.pad_token_id if pad is None else pad,
    }  # fmt: skip
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(seed)
            sequences, record = mixing.generate(ids, attention_mask=torch.ones_like(ids), **settings, **sampling)
        assert record.logprobs is not None
        live = _live(sequences[:, record.prompt_length :], model.generation_config.eos_token_id)
        replayed = _logprobs(model, sequences, record, sampling["temperature"], mixing.replay(record))
        cosines = torch.cat(mixing.mixer.cosines) if mixing.mixer.cosines else torch.empty(0)
        error = _largest(replayed, record, live, model.dtype)
        plain_error = None
        if bool(record.gate.any()):
            unreplayed = _logprobs(model, sequences, record, sampling["temperature"], nullcontext())
            plain_error = _largest(unreplayed, record, live, model.dtype)
    finally:
        mixing.remove()
    tokens = _tokens(tokenizer, sequences[:, record.prompt_length :].cpu(), record.to("cpu"), live.cpu(), cosines.cpu())
    noise = None if record.noise_scale is None else float(record.noise_scale[0])
    return Arm(name, tuple(tokens), error, plain_error, noise)


def _live(completion: Tensor, ends: int | Sequence[int] | None) -> Tensor:
    """bool [B, T]: the tokens up to the first end token, which is one of them."""
    if ends is None:
        return torch.ones_like(completion, dtype=torch.bool)
    ended = torch.isin(completion, torch.tensor(ends, device=completion.device))
    return ended.long().cumsum(1) - ended.long() == 0


def _logprobs(
    model: Any, sequences: Tensor, record: MixRecord, temperature: float, within: AbstractContextManager[None]
) -> Tensor:
    """[B, T]: log-probabilities of the completions, row by row, as the logits of all rows may be large."""
    rows, start = [], record.prompt_length
    with within, torch.no_grad():
        for row in sequences:
            logits = model(input_ids=row[None], attention_mask=torch.ones_like(row[None])).logits[0, start - 1 : -1]
            rows.append(selective_log_softmax(logits, row[start:], temperature=temperature).float())
    return torch.stack(rows)


def _largest(logprobs: Tensor, record: MixRecord, live: Tensor, dtype: torch.dtype) -> float:
    assert record.logprobs is not None
    sums = replay_sums(logprobs - record.logprobs, record.gate, live, replay_tolerance(dtype))
    return replay_errors(sums[None]).largest


def _tokens(
    tokenizer: Any, completions: Tensor, record: MixRecord, live: Tensor, cosines: Tensor
) -> Iterator[tuple[Token, ...]]:
    of_mixes = torch.full(record.gate.shape, float("nan"), device="cpu")
    of_mixes[record.gate] = cosines.to(of_mixes.dtype)  # those of a replay are in the order of its rows
    for row, completion in enumerate(completions):
        count = int(live[row].sum())
        texts = pieces(tokenizer, completion[:count].tolist())
        tokens = []
        for step, text in enumerate(texts):
            if not record.gate[row, step]:
                tokens.append(Token(text))
                continue
            pairs = zip(record.ids[row, step].tolist(), record.weights[row, step].tolist(), strict=True)
            candidates = tuple(Candidate(token_text(tokenizer, i), i, weight) for i, weight in pairs)
            tokens.append(Token(text, candidates, float(of_mixes[row, step])))
        yield tuple(tokens)


def pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text. Of a character in several tokens the last has it, the others a replacement."""
    out: list[str] = []
    begun, whole = 0, ""  # what is decoded again with every token: from here on, and its text so far
    for i in range(len(ids)):
        text = _decode(tokenizer, ids[begun : i + 1])
        added = text[len(whole) :] if text.startswith(whole) else _decode(tokenizer, ids[i : i + 1])
        if text.endswith(_PART):
            out.append(_PART)
            continue
        out.append(added)
        whole = text
        if i - begun > 64:  # a tokenizer may look at the tokens before, but not at all of them
            begun, whole = i, _decode(tokenizer, ids[i : i + 1])
    return out


def token_text(tokenizer: Any, token_id: int) -> str:
    """The text of a token, or its name where it is none by itself."""
    text = _decode(tokenizer, [token_id])
    if text and _PART not in text:
        return text
    found = tokenizer.convert_ids_to_tokens(token_id) if token_id < len(tokenizer) else None
    return found or f"<unused {token_id}>"


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it transformers shows no progress of its own, which is of files and not of rollouts."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()
