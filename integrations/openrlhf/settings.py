"""The settings, in an environment variable. Runs in the launcher, which writes, and in Ray's workers, which read."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, fields

from ngrpo_ops import MixingConfig
from ngrpo_ops._messages import shown
from ngrpo_ops.config import TOKEN_ID_FIELDS

VARIABLE = "NGRPO_OPS_OPENRLHF"

_LONGEST = 100_000  # characters; Linux takes 128 KiB with the variable's name


def write_settings(config: MixingConfig, reward_url: str) -> None:
    """Sets the environment variable of this process.

    Args:
        config: the configuration. Its strategy "package.module:function" is imported again where it is read.
        reward_url: the URLs of the rewards, comma-separated, or the path of a Python file.

    Raises:
        ValueError: more token ids than an environment variable holds.

    Examples:
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
        # "special" travels as that word.
        counts = {name: len(getattr(config, name) or ()) for name in TOKEN_ID_FIELDS}
        most = max(counts, key=counts.__getitem__)
        raise ValueError(
            f"{most}: {counts[most]} token ids are too many, as they reach the workers in an environment variable of "
            f"at most {_LONGEST} characters"
        )
    os.environ[VARIABLE] = settings


def read_settings() -> tuple[MixingConfig, str]:
    """The configuration, and the rewards' URLs or file, as the launcher read them.

    Raises:
        ValueError: no such variable, or not what `write_settings` wrote; a strategy that cannot be imported in this
            process.

    Examples:
        >>> import os
        >>> from unittest import mock
        >>> from ngrpo_ops.integrations.openrlhf.settings import VARIABLE, read_settings
        >>> with mock.patch.dict(os.environ, {VARIABLE: '{"mixing": {"k": 2}, "reward_url": "reward.py"}'}):
        ...     read_settings()[0].k
        2
    """
    text = os.environ.get(VARIABLE)
    if text is None:
        raise ValueError(f"{VARIABLE} must be set, as the launcher does it: python -m {__package__}")
    try:
        settings = json.loads(text)
        mixing, reward_url = settings["mixing"], settings["reward_url"]
        if not {*mixing} <= {field.name for field in fields(MixingConfig)} or not isinstance(mixing, dict):
            raise ValueError("other fields than those of MixingConfig")
        if not isinstance(reward_url, str):
            raise TypeError("reward_url is no text")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{VARIABLE} must be what the launcher wrote, got {shown(text)} ({reason})") from error
    return MixingConfig(**mixing), reward_url
