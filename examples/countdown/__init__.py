"""GRPO and N-GRPO side by side on a synthetic Countdown task: `python -m examples.countdown`."""
