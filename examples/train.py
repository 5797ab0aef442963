r"""N-GRPO on a model and a data set of questions and answers of your own, with TRL's arguments and those of N-GRPO:

    python examples/train.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name openai/gsm8k \
        --dataset_config main --output_dir runs/gsm8k

`--dataset_name` is a name on the Hugging Face hub, a folder, or a file (.jsonl, .json, .parquet, .csv). Its questions
are in a column `prompt`, `question` or `problem`, its answers in `answer` or `solution`. `--help` has all arguments:
LoRA is `--use_peft true`, vLLM `--use_vllm true`, plain GRPO `--mixing_rate 0`. The other defaults are the paper's,
with LoRA too, where its learning rate of 1e-6 is low, or TRL's.

To evaluate: `--eval_strategy steps --eval_steps 100`, where the data set has a split `test`. To go on:
`--resume_from_checkpoint runs/gsm8k/checkpoint-500`. To log: `--report_to wandb`. On several GPUs: `accelerate launch`
in the place of `python`. Not tried: the last two, and quantized models.

Needs, in this checkout: pip install '.[examples]', for vLLM '.[examples,vllm]'
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from transformers import AutoTokenizer
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from ngrpo_ops.integrations.trl import NGRPOConfig, NGRPOTrainer

try:
    from math_verify import parse, verify
except ImportError as error:
    raise ImportError("this example needs math-verify: pip install '.[examples]'") from error

QUESTIONS = ("prompt", "question", "problem")
ANSWERS = ("answer", "solution")
TASK = "Reason step by step. Put the final answer in \\boxed{}."
FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}

# The paper's, and no dropout: it would be drawn anew in the replay of a rollout.
DEFAULTS = {"temperature": 0.7, "learning_rate": 1e-6, "beta": 0.001, "num_generations": 4, "lora_dropout": 0.0}


def reward(completions: list[Any], expected: list[str], **kwargs: Any) -> list[float | None]:
    """1 for a completion whose last answer, boxed or not, equals the right one, else 0.

    None, which TRL leaves out of the group, where the right answer is nothing that can be compared.
    """
    scores: list[float | None] = []
    for completion, right in zip(completions, expected, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        gold = parse(right) or parse(f"${right}$")
        scores.append(float(verify(gold, parse(text))) if gold else None)
    return scores


def load_questions(script: ScriptArguments, split: str, chat: bool) -> Dataset | IterableDataset:
    """The split of a data set: columns `prompt`, a list of messages for a chat, and `expected`, the answer as a text.

    Raises:
        ValueError: no column of a known name.
    """
    name, kind = script.dataset_name, FORMATS.get(Path(script.dataset_name).suffix)
    source = {"path": kind, "data_files": {script.dataset_train_split: name}} if kind else {"path": name}
    dataset = load_dataset(**source, name=script.dataset_config, split=split, streaming=script.dataset_streaming)
    columns = list(next(iter(dataset), {}))
    question, answer = (_column(columns, names) for names in (QUESTIONS, ANSWERS))

    def row(example: dict[str, Any]) -> dict[str, Any]:
        prompt = example[question]
        if isinstance(prompt, str):
            prompt = f"{prompt}\n{TASK}"
            prompt = [{"role": "user", "content": prompt}] if chat else f"{prompt}\n"
        right = str(example[answer]).rpartition("####")[2].strip()  # GSM8K's answers end in "#### 42"
        return {"prompt": prompt, "expected": right}

    return dataset.map(row, remove_columns=columns)


def _column(columns: Sequence[str], names: Sequence[str]) -> str:
    for name in names:
        if name in columns:
            return name
    raise ValueError(f"--dataset_name must have a column {' or '.join(names)}, got {', '.join(columns) or 'no rows'}")


def main(argv: Sequence[str] | None = None) -> NGRPOTrainer:
    parser = TrlParser((ScriptArguments, NGRPOConfig, ModelConfig), description=__doc__)
    parser.set_defaults(**DEFAULTS)
    script, args, model = parser.parse_args_and_config(argv)
    for name, given in (("dataset_name", script.dataset_name), ("model_name_or_path", model.model_name_or_path)):
        if given is None:
            parser.error(f"--{name} is needed")
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        **(args.model_init_kwargs or {}),
    }
    tokenizer = AutoTokenizer.from_pretrained(
        model.model_name_or_path, revision=model.model_revision, trust_remote_code=args.trust_remote_code
    )
    chat = tokenizer.chat_template is not None
    trainer = NGRPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=reward,
        args=args,
        train_dataset=load_questions(script, script.dataset_train_split, chat),
        eval_dataset=load_questions(script, script.dataset_test_split, chat) if args.do_eval else None,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
