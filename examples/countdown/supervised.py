"""Supervised training from scratch, to where reinforcement learning has something to trade; cached between runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from .model import build_model, build_tokenizer
from .task import Problem, training_stream

BATCH = 256
LEARNING_RATE = 2e-3


def supervised_checkpoint(
    folder: Path, held_out: Sequence[Problem], *, numbers: int, largest: int, steps: int, tied: bool, seed: int
) -> None:
    """Train for a fixed number of steps and save the model in `folder`."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(tokenizer, tied)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    stream = training_stream(held_out, numbers, largest, f"supervised {seed}")
    progress = tqdm(range(steps), desc="supervised", unit="step")
    for _ in progress:
        examples = list(itertools.islice(stream, BATCH))
        texts = [f"{problem.prompt} {equation} {tokenizer.eos_token}" for problem, equation in examples]
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
