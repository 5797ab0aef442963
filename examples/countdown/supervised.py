"""Supervised training from scratch, to where reinforcement learning has something to trade; cached between runs."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ngrpo_ops.files import write_json

from .model import build_model, build_tokenizer
from .task import Problem, Task

BATCH = 256
LEARNING_RATE = 2e-3


def supervised_checkpoint(
    folder: Path, task: Task, held_out: Sequence[Problem], *, steps: int, tied: bool, seed: int
) -> None:
    """Train for a fixed number of steps and save the model in `folder`."""
    tokenizer = build_tokenizer(task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(tokenizer, tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    stream = task.training(held_out, f"supervised {seed}")
    progress = tqdm(range(steps), desc="supervised", unit="step")
    for _ in progress:
        examples = list(itertools.islice(stream, BATCH))
        texts = [f"{problem.prompt} {solution} {tokenizer.eos_token}" for problem, solution in examples]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, : len(examples[0][0].prompt.split())] = -100  # prompts are of one length; only the answer is learned
        loss = model(input_ids=batch["input_ids"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    model.save_pretrained(folder)


def cached_checkpoint(
    folder: Path, task: Task, held_out: Sequence[Problem], *, steps: int, tied: bool, fresh: bool, seed: int = 0
) -> tuple[Path, dict[str, Any]]:
    """The supervised checkpoint of these settings, from the cache if it is there; and the settings."""
    settings = {
        "task": task.name,
        "numbers": task.numbers,
        "largest": task.largest,
        "held_out": len(held_out),
        "steps": steps,
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "tied": tied,
        "seed": seed,
    }
    place = folder / hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    done = place / "settings.json"  # written last: a run that was cut off leaves none
    if done.exists() and not fresh:
        print(f"supervised checkpoint from the cache: {place}")
    else:
        supervised_checkpoint(place, task, held_out, steps=steps, tied=tied, seed=seed)
        write_json(done, settings, indent=1)
    return place, settings
