"""The versions of the frameworks that the adapters are tested with."""

from __future__ import annotations

TESTED = {"transformers": "5.23", "trl": "1.16", "vllm": "0.29", "openrlhf": "0.11.2"}
"""The adapters, each with the version of its framework that it is tested with."""


def is_tested(framework: str, version: str) -> bool:
    """Whether a version is the tested one, or a patch of it: 0.29.1 where 0.29 is tested."""
    return f"{version.partition('+')[0]}.".startswith(f"{TESTED[framework]}.")
