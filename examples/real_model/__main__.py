"""What N-GRPO does to a real model: neighbors of a few words, then one prompt by plain sampling, N-GRPO and noise.

The model is SmolLM2-135M-Instruct, see load.py. Where it cannot be had one line says so, and nothing fails: `make demo`
goes on. `python -m ngrpo_ops rollout` shows the same of any checkpoint.
"""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers.utils import logging

from ngrpo_ops import MixingConfig
from ngrpo_ops.__main__ import main as ngrpo_ops
from ngrpo_ops.files import write_text
from ngrpo_ops.integrations.transformers.view import load_checkpoint, roll_out
from ngrpo_ops.view import page, print_rollouts

from .load import NAME, NOTE, ModelUnavailableError, smollm2_folder

WORDS = (" therefore", " equals", " bought", "7")
PROMPT = "Tom has 3 apples and buys 5 more. How many apples does he have?"
SHARED = {"mixing_rate": 0.1, "k": 3, "excluded_token_ids": "special"}
ARMS = {
    "plain sampling": MixingConfig(mixing_rate=0),
    "N-GRPO": MixingConfig(**SHARED),
    "Gaussian noise (STHT)": MixingConfig(strategy="gaussian", **SHARED),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.real_model", description=__doc__)
    parser.add_argument("--prompt", default=PROMPT, help="what is answered")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--out", type=Path, default=Path("runs/real_model"), help="folder of the page")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        folder = smollm2_folder()
    except ModelUnavailableError as error:
        print(f"not shown on a real model: {error}")
        return
    print(f"{NOTE}\n\nNearest in its input embeddings, what N-GRPO mixes a token with:")
    ngrpo_ops(["neighbors", "--model", str(folder), "--k", "3", "--tokens", *WORDS])
    print("\nThe same prompt in three ways, from the same random numbers (a neighbor table takes some seconds):\n")
    model, tokenizer = load_checkpoint(str(folder))
    shown = roll_out(
        model, tokenizer, arguments.prompt, ARMS, name=NAME, temperature=0.7, max_new_tokens=64, seed=arguments.seed
    )
    print_rollouts(shown)
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out / "rollout.html", page(shown))
    print(f"as a page: {arguments.out / 'rollout.html'}\n")


if __name__ == "__main__":
    main()
