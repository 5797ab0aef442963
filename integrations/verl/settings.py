"""The mixing among verl's settings, and the settings of verl that are refused. Runs in the launcher and task runner."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ngrpo_ops import MixingConfig
from ngrpo_ops._messages import shown
from ngrpo_ops._patching import Refusal, refuse
from ngrpo_ops.wire import KEY, SERVED_DEFAULTS, read_config

EXTERNAL_LIB = __package__
"""The value of ``actor_rollout_ref.model.external_lib``."""

MANAGER = f"{__package__}.manager.MixingAgentLoopManager"
"""The value of ``actor_rollout_ref.rollout.agent.agent_loop_manager_class``."""

ROLLOUT = "actor_rollout_ref.rollout"
"""Where verl's settings of rollouts stand."""

MIXING = f"{ROLLOUT}.engine_kwargs.vllm.additional_config.{KEY}"
"""Where the fields of `MixingConfig` stand among verl's settings: it hands them to its vLLM engines."""

STRATEGIES = ("fsdp", "fsdp2")
"""The strategies of verl whose engine replays."""

AGENTS = ("single_turn_agent", "ngrpo")
"""verl's agent loop of one turn, and the adapter's, which takes its place in training."""


def mixing_config(config: DictConfig) -> MixingConfig:
    """The mixing among verl's settings. Engines, agent loops and task runner read the same.

    Raises:
        ValueError: no mixing, fields that `MixingConfig` does not have, or a value that it refuses.

    Examples:
        >>> from omegaconf import OmegaConf
        >>> from ngrpo_ops.integrations.verl.settings import MIXING, mixing_config
        >>> config = OmegaConf.create()
        >>> OmegaConf.update(config, MIXING, {"k": 5})
        >>> mixing_config(config).k
        5
    """
    found = OmegaConf.select(config, MIXING)
    if found is None:
        raise ValueError(f"{MIXING} must hold the fields of MixingConfig, got none: nothing would be mixed")
    settings = OmegaConf.to_container(found, resolve=True) if isinstance(found, DictConfig) else found
    return read_config(SERVED_DEFAULTS | settings if isinstance(settings, dict) else settings, MIXING)


def check_settings(config: DictConfig) -> MixingConfig:
    """Checks verl's whole configuration, and returns its mixing.

    Raises:
        ValueError: a setting under which nothing would be mixed or replayed, or it would be wrong.
    """
    mixing = mixing_config(config)
    refuse(_refusals(config), "is not supported with N-GRPO")
    # After the refusals: the model is read.
    from ..transformers.checks import model_config

    path = OmegaConf.select(config, "actor_rollout_ref.model.path")
    model = model_config(path, bool(OmegaConf.select(config, "actor_rollout_ref.model.trust_remote_code")))
    if model is not None:
        vision = hasattr(model, "vision_config")
        refuse(
            [Refusal("a vision-language model", vision, "its input embeddings are not the token table's")],
            "is not supported with N-GRPO",
        )
        mixing.require_vocabulary(model.get_text_config().vocab_size)
    return mixing


def _refusals(config: DictConfig) -> Iterator[Refusal]:
    """The settings of verl under which nothing would be mixed or replayed, or it would be wrong."""

    def value(key: str) -> Any:
        return OmegaConf.select(config, key)

    def is_set(key: str, reason: str) -> Refusal:
        return Refusal(key, value(key), reason)

    def other(key: str, allowed: tuple[Any, ...], reason: str) -> Refusal:
        found = value(key)
        return Refusal(f"{key}={shown(found)}", found not in allowed, reason)

    rollout, model = ROLLOUT, "actor_rollout_ref.model"
    yield other("trainer.use_v1", (True,), "the older trainer drops the records of the samples")
    yield other(
        "trainer.v1.trainer_mode",
        ("sync",),
        "an interrupted sample is sent again with its tokens as a prompt, and their mixes would be lost",
    )
    external = value(f"{model}.external_lib")
    named = [external] if isinstance(external, str) or external is None else list(external)
    yield Refusal(
        f"{model}.external_lib={shown(external)}",
        EXTERNAL_LIB not in named,
        f"{EXTERNAL_LIB} must be among it: the workers would not replay",
    )
    yield other(
        f"{rollout}.agent.agent_loop_manager_class", (MANAGER,), f"only {MANAGER} gives the samples their row ids"
    )
    yield other(f"{rollout}.agent.default_agent_loop", AGENTS, "an agent loop of your own is not mixed")
    for role in ("actor", "ref"):
        yield other(f"actor_rollout_ref.{role}.strategy", STRATEGIES, "the other engines do not replay")
    yield other(f"{rollout}.name", ("vllm",), "the plugin that mixes is vLLM's")
    yield is_set(
        f"{rollout}.enable_prefix_caching",
        "cached blocks are found by token ids alone, and would be taken for those of another mix; verl's default is "
        f"True, set {rollout}.enable_prefix_caching=False",
    )
    yield is_set(f"{rollout}.disaggregation.enabled", "a connector finds blocks by token ids alone")
    yield other(f"{rollout}.data_parallel_size", (1, None), "records of a replica's other engines would not be fetched")
    yield other(f"{rollout}.pipeline_model_parallel_size", (1, None), "tokens are sampled on the last stage alone")
    yield is_set(f"{model}.mtp.enable_rollout", "a drafted token is embedded before it is known whether it is mixed")
    yield is_set(f"{rollout}.multi_turn.enable", "earlier turns would be encoded again without their mixes")
    yield is_set(f"{rollout}.enable_rollout_routing_replay", "whether routes and mixes agree was never tried")
    yield is_set(f"{rollout}.agent.custom_async_server.path", "a server of your own does not fetch the records")
    yield is_set(f"{rollout}.quantization", "a quantized embedding is not the table that the policy replays")
    yield is_set("actor_rollout_ref.actor.fsdp_config.qat.enable", "a quantized embedding is not the policy's table")
    yield is_set(f"{model}.tiled_mlp.enabled", "whether its forward calls the input embeddings once was never tried")
    yield is_set(
        "actor_rollout_ref.actor.use_prefix_grouper",
        "it writes a group's prompt once, and the positions of the mixes would be others",
    )
    critic = "its critic would value plain tokens where the policy has seen mixes; use grpo, rloo or the like"
    yield Refusal("algorithm.adv_estimator=gae", value("algorithm.adv_estimator") == "gae", critic)
    yield is_set("critic.enable", critic)
    yield Refusal(
        "algorithm.adv_estimator=remax",
        value("algorithm.adv_estimator") == "remax",
        "its greedy baselines would be mixed",
    )
    yield is_set("distillation.enabled", "a teacher reads plain tokens where the policy has seen mixes")
