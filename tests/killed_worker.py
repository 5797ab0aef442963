"""A run of NGRPOTrainer that may be killed at any moment: goes on from the last checkpoint that can be read.

    python tests/killed_worker.py MODEL OUT STEPS

Prints "training" when it begins, and what it cannot read. Writes the weights to OUT/final.pt at its end.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from datasets import Dataset
from models import tokenizer

from ngrpo_ops.integrations.trl import NGRPOConfig, NGRPOTrainer


def reward(completions: list[str], **kwargs: object) -> list[float]:
    return [len(set(text.split())) / 10 for text in completions]


class Trainer(NGRPOTrainer):
    def _generate_and_score_completions(self, inputs: list) -> dict:
        print("training", flush=True)
        return super()._generate_and_score_completions(inputs)


def make(model: str, out: Path, steps: int) -> Trainer:
    # More prompts than steps: in a later epoch TRL resumes with the order of the first one (docs/trl.md).
    texts = [" ".join(f"w{3 + (7 * i + j) % 60}" for j in range(2 + i % 4)) for i in range(64)]
    settings = NGRPOConfig(
        str(out), use_cpu=True, bf16=False, report_to="none", num_generations=4, per_device_train_batch_size=4,
        max_completion_length=8, learning_rate=1e-3, logging_steps=1, save_strategy="steps", save_steps=1,
        save_total_limit=3, max_steps=steps, mixing_rate=0.5, disable_tqdm=True,
    )  # fmt: skip
    return Trainer(
        model=model, reward_funcs=reward, train_dataset=Dataset.from_dict({"prompt": texts}), args=settings,
        processing_class=tokenizer(),
    )  # fmt: skip


def main() -> None:
    model, out, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    saved = sorted(out.glob("checkpoint-*"), key=lambda path: -int(path.name.partition("-")[2]))
    for checkpoint in [*saved, None]:
        trainer = make(model, out, steps)
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except Exception as error:
            if checkpoint is None:
                raise
            print(f"unreadable {checkpoint.name}: {type(error).__name__}: {error}", flush=True)
            continue
        break
    torch.save({"rows": trainer.mixing.next_row, "weights": trainer.model.state_dict()}, out / "final.pt")


if __name__ == "__main__":
    main()
