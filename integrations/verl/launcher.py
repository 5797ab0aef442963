"""verl's command line with the arguments of N-GRPO. Runs in the launcher, before Ray."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import fields

from omegaconf import DictConfig, OmegaConf

from ngrpo_ops import MixingConfig

from .settings import EXTERNAL_LIB, MANAGER, MIXING, ROLLOUT, check_settings

_PREFIX = "ngrpo."
_DRY_RUN = "dry_run"


def main() -> None:
    """Reads, checks and runs verl's command line.

    Raises:
        SystemExit: a refused setting, or the end of a dry run.

    Examples:
        In a shell, for any command line of ``python -m verl.trainer.main_ppo``::

            python -m ngrpo_ops.integrations.verl <its arguments> +ngrpo.k=3 +ngrpo.mixing_rate=0.1
    """
    import hydra
    from verl.trainer import main_ppo

    arguments, is_dry_run = verl_arguments(sys.argv[1:])
    sys.argv[1:] = arguments

    def run(config: DictConfig) -> None:
        complete(config)
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

    X is a field of `MixingConfig`, or dry_run. Prefix caching, which is verl's default, is turned off where the command
    line does not name it.

    Returns:
        The arguments, and whether it is a dry run.

    Raises:
        SystemExit: a field that `MixingConfig` does not have.

    Examples:
        >>> from ngrpo_ops.integrations.verl.launcher import verl_arguments
        >>> arguments, is_dry_run = verl_arguments(["data.train_batch_size=8", "+ngrpo.k=5"])
        >>> for argument in arguments:
        ...     print(argument)
        data.train_batch_size=8
        ++actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config.ngrpo_ops.k=5
        actor_rollout_ref.rollout.enable_prefix_caching=False
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
            arguments.append(f"++{MIXING}.{name}={value}")
        else:
            raise SystemExit(f"error: {_PREFIX}{name} is not known, known are {', '.join([*known, _DRY_RUN])}")
    caching = f"{ROLLOUT}.enable_prefix_caching"
    if not any(argument.lstrip("+").startswith(f"{caching}=") for argument in arguments):
        arguments.append(f"{caching}=False")
    return arguments, is_dry_run


def complete(config: DictConfig) -> None:
    """Adds to verl's composed configuration what the adapter needs and nobody has set.

    These are the external library, the manager of agent loops, and, as the mixing's seed, the rollout's. What the
    configuration has stays, and is refused later where it would not mix.

    Examples:
        >>> from omegaconf import OmegaConf
        >>> from ngrpo_ops.integrations.verl.launcher import complete
        >>> config = OmegaConf.create({"actor_rollout_ref": {"rollout": {"seed": 7}, "model": {"external_lib": None}}})
        >>> complete(config)
        >>> config.actor_rollout_ref.model.external_lib
        'ngrpo_ops.integrations.verl'
        >>> config.actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config.ngrpo_ops.seed
        7
    """
    values = {
        "actor_rollout_ref.model.external_lib": EXTERNAL_LIB,
        f"{ROLLOUT}.agent.agent_loop_manager_class": MANAGER,
        f"{MIXING}.seed": OmegaConf.select(config, f"{ROLLOUT}.seed"),
    }
    for key, value in values.items():
        if OmegaConf.select(config, key) is None:
            OmegaConf.update(config, key, value, force_add=True)
