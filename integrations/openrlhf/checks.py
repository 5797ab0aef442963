"""The version and the methods of OpenRLHF that the adapter relies on. Runs in the launcher and in Ray's workers.

The methods are private to OpenRLHF, so a change of a signature stops the start.
"""

from __future__ import annotations

import importlib.metadata

from ngrpo_ops._patching import check_signature, resolve
from ngrpo_ops.versions import accepted, requirement, standing, tested

EXPECTED_PARAMETERS = {
    "openrlhf.models.actor:Actor.forward": [
        "self", "sequences", "action_mask", "attention_mask", "return_output", "allgather_logits", "return_logprobs",
        "ring_attn_group", "packed_seq_lens", "return_entropy", "mm_inputs",
    ],
    "openrlhf.models.ring_attn_utils:unpad_and_slice_tensor": ["sequences", "attention_mask", "ring_attn_group"],
    "openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker.make_experience": ["self", "samples_list"],
    "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator.__init__": [
        "self", "strategy", "prompts_dataloader", "eval_dataloader", "tokenizer", "vllm_engines",
    ],
    "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator.generate_eval_samples": ["self", "generate_kwargs"],
    "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator._dispatch_prompts_to_vllm": [
        "self", "prompts", "labels", "images", "generate_kwargs",
    ],
    "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator._process_response_into_experience": [
        "self", "response", "generate_kwargs",
    ],
    "openrlhf.trainer.ray.launcher:BaseModelActor.execute_batch": [
        "self", "method_name", "all_data", "start_idx", "end_idx",
    ],
    "openrlhf.trainer.ray.launcher:ReferenceModelActor.forward": [
        "self", "sequences", "action_mask", "attention_mask", "return_output", "packed_seq_lens",
        "mm_train_inputs_list",
    ],
    "openrlhf.trainer.ray.ppo_actor:PolicyModelActor.forward": [
        "self", "sequences", "action_mask", "attention_mask", "packed_seq_lens", "mm_train_inputs_list",
    ],
    "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer.ppo_train": ["self", "kl_ctl"],
    "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer.training_step": [
        "self", "experience", "kl_ctl", "step", "loss_batch_info",
    ],
    "openrlhf.trainer.ray.vllm_engine:_load_agent_executor": ["agent_func_path"],
    "openrlhf.trainer.ray.vllm_engine:RolloutRayActor.generate": [
        "self", "prompt_token_ids", "sampling_params", "multi_modal_data",
    ],
    "openrlhf.trainer.ray.vllm_engine:RolloutRayActor.generate_responses": [
        "self", "prompt", "label", "sampling_params", "max_length", "hf_tokenizer", "num_samples", "images",
    ],
    "openrlhf.utils:get_strategy": ["args"],
    "openrlhf.utils.agent:SingleTurnAgentExecutor.__init__": ["self", "remote_rm_url"],
    "openrlhf.utils.agent:SingleTurnAgentExecutor.execute": [
        "self", "prompt", "label", "sampling_params", "max_length", "hf_tokenizer", "llm_engine", "images",
    ],
}  # fmt: skip
"""The parameters of every function that the adapter replaces, calls or extends, by target."""


def check_openrlhf() -> None:
    """Checks what is installed against what the adapter is tested with.

    Raises:
        ImportError: OpenRLHF or vLLM is missing, has an untested version, or has changed a method that the adapter
            relies on.

    Examples:
        >>> from unittest import mock
        >>> from ngrpo_ops.integrations.openrlhf import check_openrlhf
        >>> with mock.patch("importlib.metadata.version", return_value="0.1"):
        ...     check_openrlhf()  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ImportError: OpenRLHF 0.1 is not tested with this version of ngrpo-ops, which replays in OpenRLHF ...
    """
    missing = f"this adapter needs OpenRLHF and its vLLM: pip install 'openrlhf[vllm]{requirement('openrlhf')}'"
    try:
        version = importlib.metadata.version("openrlhf")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(missing) from error
    if standing("openrlhf", version) == "refused":
        raise ImportError(
            f"OpenRLHF {version} is not tested with this version of ngrpo-ops, which replays in OpenRLHF "
            f"{accepted('openrlhf')}: what it extends is private to OpenRLHF"
        )
    try:
        import vllm
    except ImportError as error:
        raise ImportError(missing) from error
    # The engines refuse it too, but OpenRLHF's actors would wait for them.
    if standing("vllm", vllm.__version__) == "refused":
        raise ImportError(
            f"vLLM {vllm.__version__} is not tested with this version of ngrpo-ops, which mixes in vLLM "
            f"{accepted('vllm')}"
        )
    for target in EXPECTED_PARAMETERS:
        check_target(target)


def check_target(target: str) -> None:
    """Checks the signature of one target, whose module is imported.

    Raises:
        ImportError: OpenRLHF has changed the signature.
    """
    owner, name = resolve(target)
    check_signature(owner, name, EXPECTED_PARAMETERS[target], "OpenRLHF", tested("openrlhf"), where=target)
