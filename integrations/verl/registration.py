"""The adapter's classes in verl's registries. Runs in every process of verl."""

from __future__ import annotations

import os
from typing import Any

from verl.utils.device import get_device_name, get_vendor
from verl.workers.engine.base import EngineRegistry
from verl.workers.rollout.replica import RolloutReplicaRegistry

from . import agent  # noqa: F401  (verl's decorator registers the agent loop)
from .engine import ReplayingFSDPEngine
from .settings import STRATEGIES


def register() -> None:
    """Puts the engine and the replica into verl's registries. A second call changes nothing.

    Raises:
        ImportError: another package has registered an engine for this device.
    """
    # The key that verl looks up first. Its own engines are registered by device alone.
    device = os.environ.get("VERL_ENGINE_DEVICE") or get_device_name()
    vendor = os.environ.get("VERL_ENGINE_VENDOR") or get_vendor()
    registered = EngineRegistry._engines.get("language_model", {})
    for strategy in STRATEGIES:
        found = registered.get(strategy, {}).get((device, vendor))
        if found is None:
            EngineRegistry.register("language_model", strategy, device, vendor)(ReplayingFSDPEngine)
        elif found is not ReplayingFSDPEngine:
            raise ImportError(
                f"{found.__module__}.{found.__qualname__} is verl's engine for strategy {strategy!r} on {device} of "
                f"{vendor}, and would not replay"
            )
    RolloutReplicaRegistry.register("vllm", _mixing_replica)


def _mixing_replica() -> type[Any]:
    from .server import MixingReplica  # loads vLLM

    return MixingReplica
