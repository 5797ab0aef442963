"""The plugin: what is added to vLLM's methods, and the checks of engines and requests. Runs in every process of vLLM.

An engine's settings come from its own configuration alone, the strategy's name among them. A request holds a row id and
nothing else, so no request can make an engine import a module.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import vllm
from torch import nn
from vllm.logger import init_logger

from ngrpo_ops import MixingConfig
from ngrpo_ops._patching import Refusal, refuse, wrap
from ngrpo_ops.rollout import reads_table
from ngrpo_ops.versions import accepted, standing, tested
from ngrpo_ops.wire import KEY, SERVED_DEFAULTS, read_config

from .client import request_kwargs

logger = init_logger(f"vllm.{__name__}")  # vLLM shows the loggers below its own


@functools.cache  # a second call must not wrap again
def register() -> None:
    """The entry point in group ``vllm.general_plugins``. vLLM calls it in each of its processes.

    An engine that was started without `engine_kwargs` stays as it is. An engine that was started with them is rejected
    when it is configured, if one of these is set: a vLLM version that is not accepted, Model Runner V1, pipeline
    parallelism, speculative decoding, batch-sharded sampling, context parallelism, data parallelism within an engine
    that is no server, KV connectors, trace replay, watermarks, sampling masks, dual batch overlap, fast prefill of
    shared KV caches, prompt embeddings, LoRA on the embedding, multi-modal models, `skip_tokenizer_init` where
    `excluded_token_ids` is "special"; of a server also what `server_refusals` names. Prefix caching is off unless it is
    asked for. A version that is accepted and was not tested is warned of.

    A request with `request_kwargs` is rejected by an engine without `engine_kwargs`. It is also rejected if prefix
    caching is on and its prompt has no `cache_salt` of its own: vLLM finds cached blocks by token ids alone and would
    reuse the blocks of another mix.

    Examples:
        >>> from importlib.metadata import entry_points
        >>> (plugin,) = entry_points(group="vllm.general_plugins", name="ngrpo_ops")
        >>> plugin.value
        'ngrpo_ops.integrations.vllm:register'
    """
    from vllm.engine.arg_utils import EngineArgs

    if standing("vllm", vllm.__version__) == "refused":
        wrap(EngineArgs, "create_engine_config", patch_create_engine_config)  # rejects engines that are to mix
        return
    from vllm.v1.engine.core_client import DPLBAsyncMPClient
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.parallel_sampling import ParentRequest
    from vllm.v1.worker.gpu import model_states
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.worker_base import WorkerBase

    from . import server

    # After the imports: a call that fails has wrapped nothing.
    wrap(EngineArgs, "create_engine_config", patch_create_engine_config)
    wrap(InputProcessor, "process_inputs", patch_process_inputs)
    wrap(ParentRequest, "get_child_info", patch_get_child_info)
    wrap(model_states, "resolve_model_state_cls", patch_resolve_model_state_cls)
    for name in ("reload_weights", "finish_weight_update"):
        wrap(Worker, name, patch_weight_update)
    wrap(DPLBAsyncMPClient, "call_utility_async", server.patch_call_utility_async)
    for method in (take_mix_records, server.open_mix_records, server.take_mix_records_json):
        setattr(WorkerBase, method.__name__, method)


# Engines ----------------------------------------------------------------------------------------------------------


def settings_of(vllm_config: Any) -> Any:
    """What `engine_kwargs` put into an engine's configuration; None: the engine was started without them."""
    additional = vllm_config.additional_config
    return additional.get(KEY) if isinstance(additional, dict) else None


def config_of(settings: Any) -> MixingConfig:
    """The configuration in `settings_of`. A strategy of the user's own is imported here.

    Raises:
        ValueError: not the fields of a MixingConfig, or a value that MixingConfig rejects.
    """
    return read_config(settings, f"additional_config[{KEY!r}]")


def refuse_engine(vllm_config: Any, config: MixingConfig, *, served: bool = False) -> None:
    """Checks that an engine of this configuration can mix.

    Args:
        vllm_config: the engine's `VllmConfig`.
        served: whether the engine is a server's, which is asked over HTTP.

    Raises:
        ValueError: a setting of the engine under which it would not mix or would mix wrongly, see `register`; a value
            of `config` that does not fit the model's vocabulary.

    Examples:
        >>> from types import SimpleNamespace
        >>> from ngrpo_ops import MixingConfig
        >>> from ngrpo_ops.integrations.vllm import refuse_engine
        >>> parallel = SimpleNamespace(
        ...     pipeline_parallel_size=1, enable_batch_sharded_sampling=False, decode_context_parallel_size=1,
        ...     prefill_context_parallel_size=1, data_parallel_size=1, use_ubatching=False,
        ... )
        >>> model = SimpleNamespace(
        ...     enable_trace_replay=False, return_sampling_mask=False, enable_prompt_embeds=True,
        ...     is_multimodal_model=False,
        ... )
        >>> engine = SimpleNamespace(
        ...     use_v2_model_runner=True, parallel_config=parallel, model_config=model, speculative_config=None,
        ...     kv_transfer_config=None, cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
        ... )
        >>> refuse_engine(engine, MixingConfig())
        Traceback (most recent call last):
        ValueError: enable_prompt_embeds cannot be mixed: a prompt of embeddings has no ids to mix among
    """
    if standing("vllm", vllm.__version__) == "refused":
        raise ValueError(
            f"vLLM {vllm.__version__} is not tested with this version of ngrpo-ops, which mixes in vLLM "
            f"{accepted('vllm')}: the classes it extends are private to vLLM"
        )
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    refusals = [
        Refusal(
            "Model Runner V1",
            not vllm_config.use_v2_model_runner,
            "it has no hook for a model's input embeddings; set VLLM_USE_V2_MODEL_RUNNER=1, or remove what made vLLM "
            "fall back to it",
        ),
        Refusal(
            "pipeline_parallel_size > 1",
            parallel.pipeline_parallel_size > 1,
            "tokens are sampled on the last stage and embedded on the first",
        ),
        Refusal(
            "speculative_config",
            vllm_config.speculative_config is not None,
            "a drafted token is embedded before it is known whether its step is mixed",
        ),
        Refusal(
            "enable_batch_sharded_sampling",
            parallel.enable_batch_sharded_sampling,
            "each rank would know the mixes of its own rows alone",
        ),
        Refusal(
            "context parallelism",
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "a rank embeds a part of each sequence; not supported",
        ),
        Refusal(
            "data_parallel_size > 1",
            parallel.data_parallel_size > 1 and not served,
            "the records of the other engines would not be fetched; start an engine for each replica",
        ),
        Refusal(
            "kv_transfer_config",
            vllm_config.kv_transfer_config is not None,
            "a connector finds blocks by token ids alone, and would take those of another mix",
        ),
        Refusal(
            "enable_trace_replay",
            model.enable_trace_replay,
            "the trace's tokens take the place of the anchors after these were mixed",
        ),
        Refusal(
            "watermark_config",
            getattr(vllm_config, "watermark_config", None) is not None,  # of vLLM 0.30 and later
            "a forced anchor carries no watermark, and the noise that carries it is not the gates'",
        ),
        Refusal(
            "return_sampling_mask",
            model.return_sampling_mask,
            "a forced anchor was not drawn from what the filters left, so no mask holds for it",
        ),
        Refusal(
            "enable_dbo or ubatch_size > 1",
            parallel.use_ubatching,
            "whether each part of a batch reads its own mixes was not tried, as it takes several GPUs",
        ),
        Refusal(
            "kv_sharing_fast_prefill",
            vllm_config.cache_config.kv_sharing_fast_prefill,
            "it is of models with a second table of token ids (Gemma 3n, 4), in which no mix would be read",
        ),
        Refusal("enable_prompt_embeds", model.enable_prompt_embeds, "a prompt of embeddings has no ids to mix among"),
        Refusal(
            "skip_tokenizer_init",
            config.excluded_token_ids == "special" and reads_table(config) and model.skip_tokenizer_init,
            "excluded_token_ids='special' asks the tokenizer; excluded_token_ids=None leaves no token out",
        ),
        Refusal("multi-modal models", model.is_multimodal_model, "their input embeddings are not the token table's"),
    ]
    if served:
        from .server import server_refusals

        refusals += server_refusals(vllm_config)
    refuse(refusals)
    config.require_vocabulary(model.get_vocab_size())


def patch_create_engine_config(original: Callable) -> Callable:
    """EngineArgs.create_engine_config: rejects an engine that is to mix and cannot, warns of an untested version.

    Prefixes are cached where that is asked for alone.
    """

    def create_engine_config(self: Any, usage_context: Any = None, *args: Any, **kwargs: Any) -> Any:
        served = getattr(usage_context, "name", None) == "OPENAI_API_SERVER"
        if (settings := settings_of(self)) is not None:
            if self.enable_prefix_caching is None:
                self.enable_prefix_caching = False
            if served and isinstance(settings, dict):
                self.additional_config = {**self.additional_config, KEY: {**SERVED_DEFAULTS, **settings}}
        vllm_config = original(self, usage_context, *args, **kwargs)
        if (settings := settings_of(vllm_config)) is not None:
            refuse_engine(vllm_config, config_of(settings), served=served)
            if standing("vllm", vllm.__version__) == "untested":
                logger.warning_once(
                    f"vLLM {vllm.__version__} is not among the versions ({tested('vllm')}) that this version of "
                    "ngrpo-ops was tested with. Compare a rollout with its replay before you rely on it."
                )
        return vllm_config

    return create_engine_config


# Requests ---------------------------------------------------------------------------------------------------------


def row_id_of(sampling_params: Any) -> int | None:
    """The row id that `request_kwargs` put into a request's sampling parameters; None: the request is not mixed.

    A request over HTTP cannot carry that, and has the row id itself.

    Raises:
        ValueError: not what `request_kwargs` returns, and not a row id.
    """
    extra = getattr(sampling_params, "extra_args", None) or {}
    if KEY not in extra:
        return None
    asked = extra[KEY]
    if type(asked) is int:
        return asked
    if not isinstance(asked, dict) or set(asked) != {"row_id"} or type(asked["row_id"]) is not int:
        raise ValueError(f"extra_args[{KEY!r}] must be what request_kwargs(row_id) returns, got {asked!r}")
    return asked["row_id"]


def patch_process_inputs(original: Callable) -> Callable:
    """InputProcessor.process_inputs: rejects a request that the engine cannot mix."""
    from .server import RequestRefused

    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        try:
            refuse_request(self.vllm_config, request)
        except ValueError as error:
            raise RequestRefused(str(error)) from error
        return request

    return process_inputs


def refuse_request(vllm_config: Any, request: Any) -> None:
    """Checks that a request that asks to be mixed can be.

    Raises:
        ValueError: it cannot be.
    """
    params = request.sampling_params
    row_id = row_id_of(params)
    if row_id is None:
        return
    if not -(2**63) <= row_id <= 2**63 - params.n:
        raise ValueError(f"extra_args[{KEY!r}] must be a row id of 64 bits, for each of n = {params.n}, got {row_id}")
    if settings_of(vllm_config) is None:
        raise ValueError(
            f"extra_args[{KEY!r}] asks to mix, but the engine was not started with engine_kwargs(MixingConfig())"
        )
    if vllm_config.cache_config.enable_prefix_caching and (request.cache_salt is None or params.n > 1):
        raise ValueError(
            "a mixed request needs enable_prefix_caching=False, or a cache_salt of its own and n = 1: cached "
            "blocks are found by token ids alone, and those of another mix would be taken for its own"
        )


def patch_get_child_info(original: Callable) -> Callable:
    """ParentRequest.get_child_info: each of a request's n sequences gets a row id of its own."""

    def get_child_info(self: Any, index: int) -> Any:
        request_id, params = original(self, index)
        row_id = row_id_of(params)
        if row_id is not None:
            params = params.clone()
            numbered = row_id + index
            served = type(params.extra_args[KEY]) is int
            params.extra_args = {**params.extra_args, **({KEY: numbered} if served else request_kwargs(numbered))}
        return request_id, params

    return get_child_info


# Workers ----------------------------------------------------------------------------------------------------------


def patch_resolve_model_state_cls(original: Callable) -> Callable:
    """resolve_model_state_cls: the model state of an engine that mixes is a subclass of the model's own."""

    def resolve_model_state_cls(vllm_config: Any, model: nn.Module) -> type:
        found = original(vllm_config, model)
        if settings_of(vllm_config) is None:
            return found
        from .engine import MixingModelState

        return type(f"Mixing{found.__name__}", (MixingModelState, found), {})

    return resolve_model_state_cls


def patch_weight_update(original: Callable) -> Callable:
    """The methods of Worker by which weights may come in past the model's `load_weights`."""

    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        finally:  # an update that failed may have changed some weights
            mixer = mixer_of(self)
            if mixer is not None:
                mixer.embedding.changed = True

    return update


def take_mix_records(worker: Any, row_ids: list[int], lengths: list[int]) -> bytes:
    """The method that `register` adds to workers, for `records_call`."""
    mixer = mixer_of(worker)
    if mixer is None:
        raise ValueError("this engine was not started with engine_kwargs(MixingConfig())")
    return mixer.take(row_ids, lengths)


def mixer_of(worker: Any) -> Any:
    """The `EngineMixer` of a worker; None: the engine was started without `engine_kwargs`, or has no model yet."""
    return getattr(getattr(worker.model_runner, "model_state", None), "mixer", None)
