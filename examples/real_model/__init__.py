"""A pretrained model without any hub, and what N-GRPO does to its rollouts: `python -m examples.real_model`."""
