"""The version and the functions of verl that the adapter relies on. Runs in every process of verl.

Some of them are private to verl, so a change of a signature stops the start.
"""

from __future__ import annotations

import importlib.metadata

from ngrpo_ops._patching import check_signature, resolve
from ngrpo_ops.versions import accepted, requirement, standing, tested

EXPECTED_PARAMETERS = {
    "engine": {
        "verl.workers.engine.base:EngineRegistry.register": ["model_type", "backend", "device", "vendor"],
        "verl.workers.engine.base:EngineRegistry.get_engine_cls": ["model_type", "backend"],
        "verl.workers.engine.fsdp.transformer_impl:FSDPEngineWithLMHead.forward_step": [
            "self", "micro_batch", "loss_function", "forward_only",
        ],
        "verl.utils.metric.utils:reduce_metrics": ["metrics"],
        "verl.utils.ulysses:get_ulysses_sequence_parallel_rank": ["group"],
        "verl.workers.utils.padding:response_from_nested": ["tensor", "response_mask"],
    },
    "server": {
        "verl.workers.rollout.replica:RolloutReplicaRegistry.register": ["name", "loader"],
        "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMReplica.__init__": [
            "self", "replica_rank", "config", "model_config", "gpus_per_node", "is_reward_model", "is_teacher_model",
            "name_suffix",
        ],
        "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMHttpServer.launch_server": [
            "self", "master_address", "master_port", "dp_rpc_port",
        ],
        "verl.workers.rollout.vllm_rollout.vllm_async_server:vLLMHttpServer.generate": [
            "self", "prompt_ids", "sampling_params", "request_id", "image_data", "video_data", "audio_data",
            "mm_processor_kwargs", "priority", "kv_transfer_params",
        ],
    },
    "agent": {
        "verl.experimental.agent_loop.agent_loop:register": ["agent_name"],
        "verl.experimental.agent_loop.single_turn_agent_loop:SingleTurnAgentLoop.run": [
            "self", "sampling_params", "priority", "kwargs",
        ],
    },
    "manager": {
        "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopManagerTQ.__init__": ["self", "args", "kwargs"],
        "verl.trainer.ppo.v1.agent_loop_tq:AgentLoopManagerTQ.generate_sequences": ["self", "prompts"],
    },
}  # fmt: skip
"""The parameters of every function of verl that a file of the adapter calls or extends, by file and target."""


def check_verl() -> None:
    """Checks that verl and vLLM are installed, in versions that the adapter accepts.

    Raises:
        ImportError: verl or vLLM is missing or has another version.

    Examples:
        >>> from unittest import mock
        >>> from ngrpo_ops.integrations.verl import check_verl
        >>> with mock.patch("importlib.metadata.version", return_value="0.8.0"):
        ...     check_verl()  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ImportError: verl 0.8.0 is not tested with this version of ngrpo-ops, which replays in verl 0.9.1: ...
    """
    missing = (
        f"this adapter needs verl, with vLLM over verl's own pin: pip install 'verl{requirement('verl')}', then pip "
        f"install 'vllm{requirement('vllm')}'"
    )
    try:
        version = importlib.metadata.version("verl")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(missing) from error
    if standing("verl", version) == "refused":
        raise ImportError(
            f"verl {version} is not tested with this version of ngrpo-ops, which replays in verl {accepted('verl')}: "
            "what it extends is in part private to verl"
        )
    try:
        engine = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(missing) from error
    if standing("vllm", engine) == "refused":
        raise ImportError(
            f"vLLM {engine} is not tested with this version of ngrpo-ops, which mixes in vLLM {accepted('vllm')}. verl "
            f"{version} pins an older vLLM and runs with this one: pip install 'vllm{requirement('vllm')}' after it"
        )


def check_parameters(file: str) -> None:
    """Checks the functions of verl that one file of the adapter relies on. Each file calls it for its own.

    Args:
        file: a key of `EXPECTED_PARAMETERS`.

    Raises:
        ImportError: verl has changed a function.
    """
    for target, expected in EXPECTED_PARAMETERS[file].items():
        owner, name = resolve(target)
        if isinstance(owner, type) and name not in vars(owner):
            owner = None  # a method of the same name that a base class has is another, perhaps one to be overridden
        check_signature(owner, name, expected, "verl", tested("verl"), where=target)
