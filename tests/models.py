"""Tiny models and a tokenizer, made in place."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)

VOCABULARY = 67
PAD, EOS = 0, 1

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
}


def tiny_model(family: str = "qwen2", tied: bool = False, scale: float = 3.0, **shape: float) -> PreTrainedModel:
    """A random model with weights large enough that what it reads matters to what it says; `shape` changes its own."""
    shape = _SHAPE | shape
    makers = {
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=tied)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**shape, tie_word_embeddings=tied)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=tied)),
        "gemma": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**shape, tie_word_embeddings=tied)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=1, n_head=2, pad_token_id=PAD, eos_token_id=EOS)
        ),
        "opt": lambda: OPTForCausalLM(
            OPTConfig(**shape, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=64)
        ),
        "xglm": lambda: XGLMForCausalLM(
            XGLMConfig(
                vocab_size=VOCABULARY,
                d_model=32,
                ffn_dim=64,
                num_layers=1,
                attention_heads=2,
                pad_token_id=PAD,
                eos_token_id=EOS,
                max_position_embeddings=64,
            )
        ),
    }
    torch.manual_seed(0)
    model = makers[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": PAD, "<eos>": EOS, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Its tokens are bytes, so that it reads any text; loaded again with any model's class it is the same."""
    words = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(BPE({word: i for i, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side="left")


def left_padded(rows: int = 4, width: int = 6) -> dict[str, torch.Tensor]:
    """Prompts of different lengths."""
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(3, VOCABULARY, (rows, width), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row in range(rows):
        attention_mask[row, : row % width] = 0
    return {"input_ids": input_ids * attention_mask, "attention_mask": attention_mask}
