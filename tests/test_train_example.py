"""examples/train.py: its reward, its columns, and two steps of a tiny model on a local file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from models import EOS, PAD, VOCABULARY, tiny_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import train

QUICK = [
    "--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--max_steps", "2", "--logging_steps", "1",
    "--max_completion_length", "6", "--per_device_train_batch_size", "4", "--mixing_rate", "0.5", "--save_strategy",
    "no", "--learning_rate", "1e-3",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module", params=["chat", "text"])
def checkpoint(request, tmp_path_factory) -> Path:
    """A random model whose every word is the number seven. A Llama: to a Qwen2 transformers gives Qwen2's tokenizer."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model("llama").save_pretrained(folder)
    words = {"<pad>": PAD, "<eos>": EOS, "<unk>": 2} | {f"7.{'0' * i}": i for i in range(3, VOCABULARY)}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    if request.param == "chat":
        tokenizer.chat_template = "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


def jsonl(folder: Path, *rows: dict) -> str:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def two_splits(folder: Path) -> str:
    folder = folder / "questions"
    folder.mkdir(exist_ok=True)
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"question": split, "answer": "7"}))
    return str(folder)


def script(name: str, **other):
    return SimpleNamespace(
        **{"dataset_name": name, "dataset_config": None, "dataset_train_split": "train", "dataset_streaming": False}
        | other
    )


@pytest.mark.parametrize("peft", [[], ["--use_peft", "true"]])
def test_two_steps_on_a_local_file(checkpoint, tmp_path, peft):
    rows = [{"question": f"What is {i} + {7 - i}?", "answer": f"{i} + {7 - i} = 7\n#### 7"} for i in range(8)]
    out = tmp_path / "out"
    trainer = train.main(
        ["--model_name_or_path", str(checkpoint), "--dataset_name", jsonl(tmp_path, *rows), "--output_dir", str(out)]
        + QUICK + peft
    )  # fmt: skip
    logs = [row for row in trainer.state.log_history if "reward" in row]
    assert len(logs) == 2
    assert all(row["reward"] > 0.5 and 0 < row["mix/gated_share"] < 1 for row in logs)
    assert all(row["mix/replay_error"] < 1e-4 for row in logs)
    assert (out / ("adapter_model.safetensors" if peft else "model.safetensors")).exists()
    assert (trainer.args.temperature, trainer.args.learning_rate, trainer.beta) == (0.7, 1e-3, 0.001)
    prompt = trainer.train_dataset[0]["prompt"]
    if checkpoint.name.startswith("chat"):
        assert prompt == [{"role": "user", "content": f"What is 0 + 7?\n{train.TASK}"}]
    else:
        assert prompt == f"What is 0 + 7?\n{train.TASK}\n"


@pytest.mark.parametrize(
    ("right", "completion", "score"),
    [
        ("42", "so it is \\boxed{42}.", 1),
        ("42", "41, no: 42", 1),
        ("42", "42, no: 41", 0),
        ("42", "", 0),
        ("1,000", "that is \\boxed{1000}", 1),
        ("\\frac{3}{4}", "\\boxed{0.75}", 1),
        ("(3, \\frac{\\pi}{2})", "$\\left(3, \\frac{\\pi}{2}\\right)$", 1),
        ("x^2+1", "\\boxed{1+x^2}", 1),
        ("Hence $x = 5$, so \\boxed{5}.", "\\boxed{5}", 1),
        ("", "\\boxed{5}", None),
    ],
)
def test_the_reward(right, completion, score):
    chat = [{"role": "assistant", "content": text} for text in ("\\boxed{99}", completion)]
    assert train.reward([completion, chat], [right, right], other=[1, 2]) == [score, score]


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"problem": "p?", "solution": "thus \\boxed{7}", "answer": "7"}, "p?", "7"),
        ({"problem": "p?", "solution": "thus \\boxed{7}"}, "p?", "thus \\boxed{7}"),
        ({"question": "p?", "answer": "6 + 1 = <<6+1=7>>7\n#### 1,007"}, "p?", "1,007"),
        ({"prompt": "p?", "answer": 7}, "p?", "7"),
        ({"prompt": [{"role": "user", "content": "p?"}], "answer": "7"}, None, "7"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_columns_are_found_by_name(tmp_path, row, prompt, answer, streaming):
    dataset = train.load_questions(script(jsonl(tmp_path, row), dataset_streaming=streaming), "train", chat=True)
    (found,) = dataset
    messages = row["prompt"] if prompt is None else [{"role": "user", "content": f"{prompt}\n{train.TASK}"}]
    assert found == {"prompt": messages, "expected": answer}


def test_what_is_missing_is_named(tmp_path, capsys):
    path = jsonl(tmp_path, {"instruction": "p?", "answer": "7"})
    with pytest.raises(ValueError, match="prompt or question or problem, got instruction, answer"):
        train.load_questions(script(path), "train", chat=False)
    with pytest.raises(ValueError, match="answer or solution, got question"):
        train.load_questions(script(jsonl(tmp_path, {"question": "p?"})), "train", chat=False)
    with pytest.raises(ValueError, match="test"):  # a file is the training split
        train.load_questions(script(path), "test", chat=False)
    with pytest.raises(SystemExit):
        train.main(QUICK)
    assert "--dataset_name is needed" in capsys.readouterr().err


def test_a_folder_has_its_splits(tmp_path):
    for split in ("train", "test"):
        dataset = train.load_questions(script(two_splits(tmp_path)), split, chat=False)
        assert dataset[0]["prompt"].startswith(f"{split}\n")


def test_flags_reach_the_trainer(checkpoint, tmp_path, monkeypatch):
    given = {}

    class Trainer:
        def __init__(self, **arguments):
            given.update(arguments)

        def train(self, resume_from_checkpoint):
            given["resumed"] = resume_from_checkpoint

        def save_model(self):
            pass

    monkeypatch.setattr(train, "NGRPOTrainer", Trainer)
    flags = "--use_vllm true --vllm_mode colocate --use_peft true --lora_r 4 --load_in_8bit true --dtype bfloat16"
    flags += " --eval_strategy steps --resume_from_checkpoint there --mixing_k 5 --mixing_strategy topk"
    flags += " --attn_implementation eager"
    train.main(
        [*QUICK, "--model_name_or_path", str(checkpoint), "--dataset_name", two_splits(tmp_path), *flags.split()]
    )
    args = given["args"]
    assert (args.use_vllm, args.vllm_mode, args.mixing_k, args.mixing_strategy) == (True, "colocate", 5, "topk")
    assert args.model_init_kwargs == {"revision": "main", "dtype": "bfloat16", "attn_implementation": "eager"}
    assert (given["peft_config"].r, given["peft_config"].lora_dropout) == (4, 0.0)
    assert given["quantization_config"].load_in_8bit and given["resumed"] == "there"
    assert "train" in str(given["train_dataset"][0]) and "test" in str(given["eval_dataset"][0])


@pytest.mark.parametrize("kind", ["json", "parquet", "csv"])
def test_files_of_other_formats(tmp_path, kind):
    from datasets import Dataset

    dataset = Dataset.from_list([{"question": "p?", "answer": "7"}])
    path = str(tmp_path / f"questions.{kind}")
    getattr(dataset, f"to_{kind}")(path)
    dataset = train.load_questions(script(path, dataset_train_split="own"), "own", chat=False)
    assert dataset[0]["expected"] == "7"
