"""OpenRLHF's command line with the arguments of N-GRPO. Runs in the launcher, the process that connects to Ray."""

from __future__ import annotations

import argparse
import os
import runpy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ngrpo_ops import MixingConfig
from ngrpo_ops._patching import Refusal, refuse, replaced
from ngrpo_ops.parity import strongly_mixed
from ngrpo_ops.tokens import read_excluded

from .checks import check_openrlhf
from .dry_run import dry_run
from .settings import VARIABLE, write_settings
from .workers import install

EXECUTOR = Path(__file__).with_name("executor.py")
"""The agent file. OpenRLHF's engines load it by this path, which must be the same on every node."""

_CLI = "openrlhf.cli.train_ppo_ray"


def main() -> None:
    """Reads, checks and runs OpenRLHF's command line.

    Raises:
        ImportError: see `check_openrlhf`.
        RuntimeError: this process is connected to Ray already.
        SystemExit: a refused setting, or the end of a dry run.

    Examples:
        In a shell, for any command line of ``python -m openrlhf.cli.train_ppo_ray``::

            python -m ngrpo_ops.integrations.openrlhf <its arguments> --ngrpo.k 3 --ngrpo.mixing_rate 0.1
    """
    check_openrlhf()
    import openrlhf.utils
    import ray

    if ray.is_initialized():
        raise RuntimeError("Ray runs in this process already: the launcher must be the one to connect to it")
    parse, connect, get_strategy = argparse.ArgumentParser.parse_args, ray.init, openrlhf.utils.get_strategy
    read: dict[str, Any] = {}

    def parse_args(parser: argparse.ArgumentParser, *given: Any, **keywords: Any) -> Any:
        if "--train.agent_func_path" not in parser._option_string_actions or read:
            return parse(parser, *given, **keywords)
        add_arguments(parser)
        args = parse(parser, *given, **keywords)
        config = _read_config(parser, vars(args))
        read["dry_run"] = vars(args).pop("ngrpo.dry_run")
        if read["dry_run"]:
            config = strongly_mixed(config)
        with _usage_errors(parser, "--ngrpo."):
            write_settings(config, vars(args)["reward.remote_url"])
        vars(args)["train.agent_func_path"] = str(EXECUTOR)
        return args

    def init(*given: Any, runtime_env: Any = None, **keywords: Any) -> Any:
        if read["dry_run"]:
            return None
        runtime_env = dict(runtime_env or {})
        runtime_env["env_vars"] = {**runtime_env.get("env_vars", {}), VARIABLE: os.environ[VARIABLE]}
        runtime_env["worker_process_setup_hook"] = f"{__package__}.{install.__name__}"
        return connect(*given, runtime_env=runtime_env, **keywords)

    def get_strategy_or_dry_run(args: Any) -> Any:
        strategy = get_strategy(args)
        if read["dry_run"]:
            raise SystemExit(dry_run(strategy))
        return strategy

    with (
        replaced(argparse.ArgumentParser, "parse_args", parse_args),
        replaced(ray, "init", init),
        replaced(openrlhf.utils, "get_strategy", get_strategy_or_dry_run),
    ):
        runpy.run_module(_CLI, run_name="__main__")


# Arguments --------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds one ``--ngrpo.X`` for each field X of `MixingConfig`, and ``--ngrpo.dry_run``.

    Examples:
        >>> import argparse
        >>> from ngrpo_ops.integrations.openrlhf.launcher import add_arguments
        >>> parser = argparse.ArgumentParser()
        >>> add_arguments(parser)
        >>> args = parser.parse_args(["--ngrpo.k", "5", "--ngrpo.stop_token_ids", "7", "8"])
        >>> vars(args)["ngrpo.k"], vars(args)["ngrpo.stop_token_ids"], vars(args)["ngrpo.mixing_rate"]
        (5, [7, 8], 0.1)
    """
    group = parser.add_argument_group("N-GRPO")
    hints = get_type_hints(MixingConfig)
    for field in fields(MixingConfig):
        group.add_argument(f"--ngrpo.{field.name}", **_option(field, hints[field.name]))
    group.add_argument(
        "--ngrpo.dry_run",
        action="store_true",
        help="Roll two prompts out and replay them, in this process and without Ray; print how well the two agree, and "
        "exit: 0 if they do.",
    )


def _option(field: Field, hint: Any) -> dict[str, Any]:
    """The keywords of `add_argument` for a field. `MixingConfig` checks the values, and knows their old names."""
    default, help = field.default, field.metadata["help"]
    if field.name == "seed":
        default, help = None, f"{help} Default: --train.seed."
    if "range" in field.metadata:
        help = f"{help} Must be {field.metadata['range']}."
    option = {"default": default, "help": help.replace("%", "%%")}
    kinds = (hint, *get_args(hint))
    if "choices" in field.metadata:
        return option | {"metavar": f"{{{','.join(field.metadata['choices'])}}}"}
    if hint is bool:
        return option | {"type": _boolean, "metavar": "{true,false}"}
    if field.name == "excluded_token_ids":  # words too, which read_excluded reads
        text = f"{option['help']} On a command line: special, none, or ids. Default: special."
        return {"default": "special", "help": text, "nargs": "*"}
    if any(get_origin(kind) is Sequence for kind in kinds):
        return option | {"type": int, "nargs": "*"}
    return option | {"type": next(kind for kind in (float, int, str) if kind in kinds)}


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"


def _read_config(parser: argparse.ArgumentParser, values: dict[str, Any]) -> MixingConfig:
    """The configuration in parsed arguments. A refused value is an error of the command line."""
    from ..transformers.checks import model_config

    mixing = {field.name: values[f"ngrpo.{field.name}"] for field in fields(MixingConfig)}
    if mixing["seed"] is None:
        mixing["seed"] = values["train.seed"]
    mixing["excluded_token_ids"] = read_excluded(mixing["excluded_token_ids"])
    # The messages of MixingConfig begin with the name of the field.
    with _usage_errors(parser, "--ngrpo."), warnings.catch_warnings():
        warnings.filterwarnings("default", "sampler", DeprecationWarning)  # Python hides it outside the main module
        config = MixingConfig(**mixing)
    refusals = _refusals(values)
    with _usage_errors(parser):
        refuse(refusals, "is not supported with N-GRPO")
    model = model_config(values["actor.model_name_or_path"], trust_remote_code=True)
    if model is not None:
        with _usage_errors(parser, "--ngrpo."):
            config.require_vocabulary(model.get_text_config().vocab_size)
    return config


@contextmanager
def _usage_errors(parser: argparse.ArgumentParser, prefix: str = "") -> Iterator[None]:
    """Within it a ValueError ends the launcher as an error of the command line."""
    try:
        yield
    except ValueError as error:
        parser.error(f"{prefix}{error}")


def _refusals(values: dict[str, Any]) -> list[Refusal]:
    """The settings of OpenRLHF under which nothing would be mixed or replayed."""
    from openrlhf.utils.utils import is_vlm_model

    return [
        Refusal(
            "--algo.advantage.estimator gae",
            values["algo.advantage.estimator"] == "gae",
            "its critic would value plain tokens where the policy has seen mixes; use group_norm (GRPO), dr_grpo, rloo "
            "or reinforce_baseline",
        ),
        Refusal(
            "--train.agent_func_path",
            values["train.agent_func_path"],
            "an executor of your own is not mixed, and the turns of several would be encoded again without their mixes",
        ),
        Refusal(
            "a reward model without --reward.remote_url",
            not values["reward.remote_url"],
            "OpenRLHF leaves its reward model out where there is an agent file, as there is with N-GRPO; serve it with "
            "openrlhf.cli.serve_rm, or name a Python file with a reward_func",
        ),
        Refusal("--vllm.num_engines 0", not values["vllm.num_engines"], "the engines are what mixes"),
        Refusal(
            "--vllm.enable_prefix_caching",
            values["vllm.enable_prefix_caching"],
            "cached blocks are found by token ids alone, and would be taken for those of another mix",
        ),
        Refusal(
            "--data.max_images_per_prompt",
            values["data.max_images_per_prompt"],
            "vision-language models are not supported",
        ),
        Refusal(
            "--actor.model_name_or_path",
            is_vlm_model(values["actor.model_name_or_path"]),
            "vision-language models are not supported",
        ),
        Refusal(
            "--ds.deepcompile", values["ds.deepcompile"], "the hooks that replay are not part of a compiled forward"
        ),
    ]
