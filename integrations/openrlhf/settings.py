"""The settings, in an environment variable. Runs in the launcher, which writes, and in Ray's workers, which read."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

from ngrpo_ops import MixingConfig

VARIABLE = "NGRPO_OPS_OPENRLHF"

_LONGEST = 100_000  # characters; Linux takes 128 KiB with the variable's name


def write_settings(config: MixingConfig, reward_url: str) -> None:
    """Sets the environment variable of this process.

    Args:
        config: the configuration. Its strategy "package.module:function" is imported again where it is read.
        reward_url: the URLs of the rewards, comma-separated, or the path of a Python file.

    Raises:
        ValueError: more allowed or excluded token ids than an environment variable holds.

    Example:
        >>> import os
        >>> from unittest import mock
        >>> from ngrpo_ops import MixingConfig
        >>> from ngrpo_ops.integrations.openrlhf.settings import read_settings, write_settings
        >>> with mock.patch.dict(os.environ):
        ...     write_settings(MixingConfig(k=5), "reward.py")
        ...     config, reward_url = read_settings()
        >>> config.k, reward_url
        (5, 'reward.py')
    """
    settings = json.dumps({"mixing": asdict(config), "reward_url": reward_url})
    if len(settings) > _LONGEST:
        # Both are short where neither is a list: "special" travels as that word.
        name = max(("allowed_token_ids", "excluded_token_ids"), key=lambda name: len(getattr(config, name) or ()))
        raise ValueError(
            f"{name}: {len(getattr(config, name) or ())} token ids are too many, as they "
            f"reach the workers in an environment variable of at most {_LONGEST} characters"
        )
    os.environ[VARIABLE] = settings


def read_settings() -> tuple[MixingConfig, str]:
    """The configuration, and the rewards' URLs or file, as the launcher read them.

    Raises:
        ValueError: a strategy that cannot be imported in this process.

    Example:
        >>> import os
        >>> from unittest import mock
        >>> from ngrpo_ops.integrations.openrlhf.settings import VARIABLE, read_settings
        >>> with mock.patch.dict(os.environ, {VARIABLE: '{"mixing": {"k": 2}, "reward_url": "reward.py"}'}):
        ...     read_settings()[0].k
        2
    """
    settings = json.loads(os.environ[VARIABLE])
    return MixingConfig(**settings["mixing"]), settings["reward_url"]
