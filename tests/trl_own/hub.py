"""A folder that looks like the Hugging Face Hub's cache: random models of the names that TRL's GRPO tests load.

Tokenizers read bytes, with the chat templates of the installed TRL. Vocabularies are small, for time's sake. Where
TRL's tests replace `generate` by one that answers with ids of Qwen's vocabulary, `SHORT` has the id here of each.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision_kernels  # noqa: F401
import transformers
import trl
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import GenerationConfig, PreTrainedTokenizerFast

OWNER = "trl-internal-testing"
TEMPLATES = Path(trl.__file__).parent / "chat_templates"

# Vocabularies -------------------------------------------------------------------------------------------------------

# The ids with which TRL's tests answer: of Qwen 2 and 3, and of Qwen 3.5.
TEXTS = {
    293: " b", 314: " {", 330: ' "', 397: ">\n", 411: "out", 450: "de", 497: '",', 522: "</", 606: "name",
    788: '":', 894: " any", 927: "sh", 944: "'t", 1318: "text", 1414: " know", 1513: " don", 2765: " won",
    4913: '{"', 5212: ' {"', 5392: " tool", 6023: "hi", 6659: "call", 7692: "async", 9520: "step", 11248: "}}\n",
    13477: "crement", 14172: "tool", 16252: " increment", 16370: "arguments", 17453: "Done", 22785: "_tool",
    35744: "increment", 64648: "multiply", 93054: "_multiply", 95642: '"}}\n',
    510: "</", 866: " any", 914: "'t", 1366: " know", 1459: " don", 1628: "function", 5224: " tool", 13744: "=s",
    16936: "Done", 22076: "_tool", 30091: "creenshot",
}  # fmt: skip
CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TOOLS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
SEEN = dict(zip(("vision_bos_token", "vision_eos_token", "image_token", "video_token"), VISION, strict=True))
NAMED = {
    151643: CHAT[0], 151645: CHAT[2], 151657: TOOLS[0], 151658: TOOLS[1],
    248044: CHAT[0], 248046: CHAT[2], 248058: TOOLS[0], 248059: TOOLS[1],
}  # fmt: skip
BYTES = 256
# Each text once, as a vocabulary has it.
_QWEN_TEXTS, _QWEN_TOKENS = list(dict.fromkeys(TEXTS.values())), [*CHAT, *VISION, *TOOLS]
SHORT = {i: BYTES + _QWEN_TEXTS.index(text) for i, text in TEXTS.items()} | {
    i: BYTES + len(_QWEN_TEXTS) + _QWEN_TOKENS.index(token) for i, token in NAMED.items()
}


def alphabet() -> list[str]:
    """The characters that stand for bytes, in the order of their ids in GPT-2's vocabulary and in Qwen's."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def tokenizer(
    template: str,
    named: Mapping[int, str],
    texts: Mapping[int, str],
    size: int,
    eos: str,
    pad: str | None,
    bos: str | None = None,
    **attributes: str,
) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with `size` ids, of which `named` are tokens of their own and `texts` are only ever decoded.

    Every other id is a word of its own, so that whatever a random model says has a text, and texts differ in length.
    """
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    written = {i: "".join(part for part, _ in spell.pre_tokenize_str(text)) for i, text in texts.items()}
    words = (
        {i: f"Ġ{i}" + "x" * (i % 7) for i in range(BYTES, size)} | dict(enumerate(alphabet())) | written | dict(named)
    )
    backend = Tokenizer(BPE({word: i for i, word in words.items()}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # Tokens of tools and thoughts stay in a decoded text, as Qwen's do.
    backend.add_tokens([AddedToken(word, normalized=False, special=word not in TOOLS) for word in named.values()])
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        pad_token=pad,
        bos_token=bos,
        padding_side="left",
        extra_special_tokens=attributes or None,
    )
    made.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    return made


def qwen(template: str, **attributes: str) -> PreTrainedTokenizerFast:
    named = {BYTES + len(_QWEN_TEXTS) + n: token for n, token in enumerate(_QWEN_TOKENS)}
    texts = {BYTES + n: text for n, text in enumerate(_QWEN_TEXTS)}
    return tokenizer(template, named, texts, 1024, eos="<|im_end|>", pad="<|endoftext|>", **attributes)


def small(template: str, tokens: Iterable[str], eos: str, pad: str | None, **more: str) -> PreTrainedTokenizerFast:
    tokens = [*dict.fromkeys([*tokens, *filter(None, (eos, pad, more.get("bos")))])]
    named = {1024 - len(tokens) + i: token for i, token in enumerate(tokens)}
    return tokenizer(template, named, {}, 1024, eos, pad, **more)


# Models -------------------------------------------------------------------------------------------------------------

SHAPE = {
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
WIDER = SHAPE | {"hidden_size": 16}


def made(name: str, config: Any) -> Any:
    """A random model of the class `name`, with weights large enough that what it reads matters to what it says."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model


def saved(folder: Path, model: Any, processor: Any) -> None:
    words = getattr(processor, "tokenizer", processor)
    if model.can_generate():
        model.generation_config = GenerationConfig(eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def language(kind: str, words: Callable[[], Any], task: str = "ForCausalLM", **settings: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        read = words()
        ids = {"eos_token_id": read.eos_token_id, "pad_token_id": read.pad_token_id, "bos_token_id": read.bos_token_id}
        size = max(read.get_vocab().values()) + 1
        config = getattr(transformers, f"{kind}Config")(**SHAPE | {"vocab_size": size} | ids | settings)
        saved(folder, made(f"{kind}{task}", config), read)

    return make


def unending(folder: Path) -> None:
    """A model that all but never ends a completion, as one with a large vocabulary: a test counts on that."""
    language("Qwen2", lambda: qwen("qwen2_5"))(folder)
    model = transformers.Qwen2ForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(16.0)
        model.lm_head.weight[model.config.eos_token_id] = 0.0
    model.save_pretrained(folder)


def remote(folder: Path) -> None:
    """A model that comes with code of its own."""
    language("Llama", llama)(folder)
    config = transformers.LlamaConfig.from_pretrained(folder)
    config.auto_map = {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"}
    config.save_pretrained(folder)
    text = (folder / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "remote"')
    (folder / "config.json").write_text(text.replace("LlamaForCausalLM", "RemoteForCausalLM"))
    (folder / "remote.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        'class RemoteConfig(LlamaConfig):\n    model_type = "remote"\n\n\n'
        "class RemoteForCausalLM(LlamaForCausalLM):\n    config_class = RemoteConfig\n"
    )


def llama() -> Any:
    tokens = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return small("llama3_2", tokens, eos="<|eot_id|>", pad=None, bos="<|begin_of_text|>")


def gemma(template: str, **attributes: str) -> Any:
    tokens = ["<start_of_turn>", "<end_of_turn>", *attributes.values()]
    return small(template, tokens, eos="<end_of_turn>", pad="<pad>", bos="<bos>", **attributes)


def gpt_oss() -> Any:
    tokens = [f"<|{word}|>" for word in ("start", "end", "message", "channel", "call", "constrain", "return")]
    return small("gptoss", tokens, eos="<|return|>", pad="<|endoftext|>")


def glm() -> Any:
    tokens = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", *TOOLS]
    return small("glm4moe", tokens, eos="<|endoftext|>", pad="<|endoftext|>")


def cohere() -> Any:
    tokens = [f"<|{word}_TOKEN|>" for word in ("START_OF_TURN", "END_OF_TURN", "SYSTEM", "USER", "CHATBOT")]
    return small("cohere2", tokens, eos="<|END_OF_TURN_TOKEN|>", pad="<PAD>", bos="<BOS_TOKEN>")


def nemotron() -> Any:
    return small("nemotron_3_nano", [*CHAT, *TOOLS], eos="<|im_end|>", pad="<|endoftext|>")


# Models that see ----------------------------------------------------------------------------------------------------


def gemma_3(folder: Path) -> None:
    words = gemma(
        "gemma3", image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"
    )  # fmt: skip
    images = transformers.Gemma3ImageProcessor(size={"height": 28, "width": 28}, image_seq_length=4)
    processor = transformers.Gemma3Processor(images, words, chat_template=words.chat_template, image_seq_length=4)
    ids = {name: words.convert_tokens_to_ids(token) for name, token in (
        ("image_token_index", "<image_soft_token>"), ("boi_token_index", "<start_of_image>"),
        ("eoi_token_index", "<end_of_image>"),
    )}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=WIDER | {"vocab_size": 1024, "head_dim": 4, "pad_token_id": words.pad_token_id},
        vision_config=WIDER | {"image_size": 28, "patch_size": 14, "vision_use_head": False},
        mm_tokens_per_image=4,
        eos_token_id=words.eos_token_id,
        **ids,
    )
    saved(folder, made("Gemma3ForConditionalGeneration", config), processor)


def llava_next(folder: Path) -> None:
    words = small("llava_next", ["<image>"], eos="</s>", pad="<pad>", bos="<s>", image_token="<image>")
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=[[28, 56], [56, 28]]
    )
    processor = transformers.LlavaNextProcessor(
        images, words, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=words.chat_template,
    )  # fmt: skip
    config = transformers.LlavaNextConfig(
        text_config=transformers.MistralConfig(
            **WIDER, vocab_size=1024, pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id
        ),
        vision_config=transformers.CLIPVisionConfig(**WIDER, image_size=28, patch_size=14, projection_dim=16),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=[[28, 56], [56, 28]],
        image_seq_length=4,
    )
    saved(folder, made("LlavaNextForConditionalGeneration", config), processor)


def qwen_vl(kind: str, template: str, **vision: Any) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        new = kind.startswith("Qwen3")
        words = qwen(template, **SEEN)
        patch = 16 if new else 14
        sides = {"shortest_edge": (2 * patch) ** 2, "longest_edge": (4 * patch) ** 2}
        images = transformers.Qwen2VLImageProcessor(size=sides, patch_size=patch)
        videos = (transformers.Qwen3VLVideoProcessor if new else transformers.Qwen2VLVideoProcessor)(patch_size=patch)
        processors = {"Qwen2VL": "Qwen2VLProcessor", "Qwen2_5_VL": "Qwen2_5_VLProcessor"}
        processor = getattr(transformers, processors.get(kind, "Qwen3VLProcessor"))(
            images, words, videos, chat_template=words.chat_template
        )
        ids = {name: words.convert_tokens_to_ids(token) for name, token in (
            ("image_token_id", "<|image_pad|>"), ("video_token_id", "<|video_pad|>"),
            ("vision_start_token_id", "<|vision_start|>"), ("vision_end_token_id", "<|vision_end|>"),
        )}  # fmt: skip
        text = WIDER | {"vocab_size": max(words.get_vocab().values()) + 1}
        text |= {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id, "bos_token_id": None}
        if new:
            text |= {"layer_types": ["linear_attention", "full_attention"], "head_dim": 8, **EXPERTS}
            text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
            text |= {"linear_num_value_heads": 2, "shared_expert_intermediate_size": 32}
            text["rope_parameters"] = {
                "rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e6, "partial_rotary_factor": 0.5,
                "mrope_interleaved": True,
            }  # fmt: skip
        else:
            text["rope_parameters"] = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e6}
        seeing = {"depth": 2, "num_heads": 4, "patch_size": patch} | vision
        config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=seeing, **ids)
        saved(folder, made(f"{kind}ForConditionalGeneration", config), processor)

    return make


NEW_VISION = {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": 16, "num_position_embeddings": 16}

MODELS: dict[str, Callable[[Path], None]] = {
    "tiny-Cohere2ForCausalLM": language("Cohere2", cohere),
    "tiny-Gemma2ForCausalLM": language("Gemma2", lambda: gemma("gemma"), head_dim=4),
    "tiny-Glm4MoeForCausalLM": language(
        "Glm4Moe", glm, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, head_dim=2
    ),
    "tiny-GptOssForCausalLM": language("GptOss", gpt_oss, num_local_experts=4, num_experts_per_tok=2, head_dim=4),
    "tiny-LlamaForCausalLM-3.2": language("Llama", llama),
    "tiny-LlamaForSequenceClassification-3.2": language("Llama", llama, "ForSequenceClassification", num_labels=1),
    "tiny-MistralForCausalLM-0.2": language("Mistral", llama),
    "tiny-NemotronHForCausalLM-nano": language(
        "NemotronH", nemotron, hidden_size=16, layers_block_type=["mamba", "attention", "moe"], num_hidden_layers=3,
        mamba_num_heads=8, mamba_head_dim=4, n_groups=1, ssm_state_size=16, conv_kernel=4, expand=2, n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=32, moe_shared_expert_intermediate_size=32,
    ),
    "tiny-Qwen2ForCausalLM-2.5": unending,
    "tiny-Qwen2ForSequenceClassification-2.5": language(
        "Qwen2", lambda: qwen("qwen2_5"), "ForSequenceClassification", num_labels=1
    ),
    "tiny-Qwen3ForCausalLM": language("Qwen3", lambda: qwen("qwen3"), head_dim=4),
    "tiny-Qwen3ForSequenceClassification": language(
        "Qwen3", lambda: qwen("qwen3"), "ForSequenceClassification", num_labels=1, head_dim=4
    ),
    "tiny-Qwen3MoeForCausalLM": language("Qwen3Moe", lambda: qwen("qwen3"), head_dim=4, **EXPERTS),
    "tiny-RemoteForCausalLM": remote,
    "tiny-Gemma3ForConditionalGeneration": gemma_3,
    "tiny-LlavaNextForConditionalGeneration": llava_next,
    "tiny-Qwen2VLForConditionalGeneration": qwen_vl("Qwen2VL", "qwen2_5_vl", embed_dim=16, hidden_size=16),
    "tiny-Qwen2_5_VLForConditionalGeneration": qwen_vl(
        "Qwen2_5_VL", "qwen2_5_vl", hidden_size=16, intermediate_size=32, out_hidden_size=16, fullatt_block_indexes=[1]
    ),
    "tiny-Qwen3_5ForConditionalGeneration-NoThink": qwen_vl("Qwen3_5", "qwen3_5_nothink", **NEW_VISION),
    "tiny-Qwen3_5MoeForConditionalGeneration-3.6": qwen_vl("Qwen3_5Moe", "qwen3_6", **NEW_VISION),
}  # fmt: skip


def build(cache: Path) -> dict[str, str]:
    """Writes every model into the cache, unless it is there.

    Returns:
        The models that could not be made, each with the reason.
    """
    missing = {}
    for name, make in MODELS.items():
        home = cache / f"models--{OWNER}--{name}"
        revision = hashlib.sha1(name.encode()).hexdigest()
        if (home / "refs" / "main").exists():
            continue
        folder = home / "snapshots" / revision
        folder.mkdir(parents=True, exist_ok=True)
        try:
            make(folder)
        except Exception as error:  # a model that this transformers cannot make is one fewer to test with
            missing[name] = f"{type(error).__name__}: {error}"
            continue
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / "main").write_text(revision)
    return missing


if __name__ == "__main__":
    for model, reason in build(Path(sys.argv[1])).items():
        print(f"not made: {model}: {reason}")
