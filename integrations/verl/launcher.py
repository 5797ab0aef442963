"""verl's command line with the arguments of N-GRPO. Runs in the launcher, before Ray."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from ngrpo_ops import MixingConfig

from .settings import EXTERNAL_LIB, MANAGER, MIXING, check_settings

_PREFIX = "ngrpo."
_DRY_RUN = "dry_run"
_ADDED = {
    "actor_rollout_ref.model.external_lib": EXTERNAL_LIB,
    "+actor_rollout_ref.rollout.agent.agent_loop_manager_class": MANAGER,
    "actor_rollout_ref.rollout.enable_prefix_caching": "False",  # verl's default is True
    f"+{MIXING}.seed": "${actor_rollout_ref.rollout.seed}",
}


def main() -> None:
    """Reads, checks and runs verl's command line.

    Raises:
        SystemExit: a refused setting, or the end of a dry run.

    Example:
        In a shell, for any command line of ``python -m verl.trainer.main_ppo``::

            python -m ngrpo_ops.integrations.verl <its arguments> +ngrpo.k=3 +ngrpo.mixing_rate=0.1
    """
    import hydra
    from verl.trainer import main_ppo

    arguments, is_dry_run = verl_arguments(sys.argv[1:])
    sys.argv[1:] = arguments

    def run(config: Any) -> None:
        try:
            check_settings(config)
        except (ValueError, ImportError) as error:
            raise SystemExit(f"error: {error}") from error
        if is_dry_run:
            from .dry_run import dry_run

            raise SystemExit(dry_run(config))
        main_ppo.main.__wrapped__(config)

    hydra.main(config_path="pkg://verl.trainer.config", config_name="ppo_trainer", version_base=None)(run)()


def verl_arguments(given: Sequence[str]) -> tuple[list[str], bool]:
    """verl's arguments for a command line with ``ngrpo.X=value``.

    X is a field of `MixingConfig`, or dry_run.

    Returns:
        The arguments, and whether it is a dry run. Settings that the adapter needs are added where the command line
        does not have them.

    Raises:
        SystemExit: a field that `MixingConfig` does not have.

    Example:
        >>> from ngrpo_ops.integrations.verl.launcher import verl_arguments
        >>> arguments, is_dry_run = verl_arguments(["data.train_batch_size=8", "+ngrpo.k=5"])
        >>> for argument in arguments:  # doctest: +ELLIPSIS
        ...     print(argument)
        data.train_batch_size=8
        +actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config.ngrpo_ops.k=5
        actor_rollout_ref.model.external_lib=ngrpo_ops.integrations.verl
        +actor_rollout_ref.rollout.agent.agent_loop_manager_class=ngrpo_ops.integrations.verl...MixingAgentLoopManager
        actor_rollout_ref.rollout.enable_prefix_caching=False
        +actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config.ngrpo_ops.seed=${actor_rollout_ref.rollout.seed}
    """
    known = [field.name for field in fields(MixingConfig)]
    arguments, is_dry_run = [], False
    for argument in given:
        found = re.fullmatch(r"\+{0,2}" + re.escape(_PREFIX) + r"([^=]*)=(.*)", argument, re.DOTALL)
        if found is None:
            arguments.append(argument)
            continue
        name, value = found.groups()
        if name == _DRY_RUN:
            if value.lower() not in ("true", "false"):
                raise SystemExit(f"error: {_PREFIX}{_DRY_RUN} must be True or False, got {value!r}")
            is_dry_run = value.lower() == "true"
        elif name in known:
            arguments.append(f"+{MIXING}.{name}={value}")
        else:
            raise SystemExit(f"error: {_PREFIX}{name} is not known, known are {', '.join([*known, _DRY_RUN])}")
    named = {argument.lstrip("+").partition("=")[0] for argument in arguments}
    arguments += [f"{key}={value}" for key, value in _ADDED.items() if key.lstrip("+") not in named]
    return arguments, is_dry_run
