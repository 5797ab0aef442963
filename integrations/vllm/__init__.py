"""N-GRPO in vLLM. The caller's process imports this package for the records, vLLM's processes for the plugin.

    llm = LLM(model, **engine_kwargs(MixingConfig(k=3, mixing_rate=0.1)))
    asked = [SamplingParams(max_tokens=64, extra_args=request_kwargs(row)) for row in range(len(prompts))]
    outputs = llm.generate(prompts, asked)
    record = take_records(llm, range(len(prompts)), [len(output.outputs[0].token_ids) for output in outputs])

The package is a vLLM plugin and is installed with ``ngrpo-ops[vllm]``. It needs Model Runner V2.

An engine can mix if it was started with `engine_kwargs`. It then mixes the requests that carry `request_kwargs`. It
samples all other requests as it would without the plugin. With `SamplingParams.n` > 1 the i-th sequence has the row id
+ i. Settings under which nothing could be mixed are rejected, see `register`.

A strategy of your own, ``MixingConfig(strategy="package.module:function")``, is imported in the engine's processes,
where the module must be on PYTHONPATH. Its name comes from `engine_kwargs` alone. No request can name a strategy.

client.py is the caller's side, plugin.py what vLLM's processes call, engine.py the mixing of a worker, server.py what a
server that is asked over HTTP adds.
"""

from __future__ import annotations

import warnings
from typing import Any

try:
    import vllm  # noqa: F401
except ImportError as error:
    raise ImportError("this adapter needs vLLM: pip install '.[vllm]' in a checkout of ngrpo_ops") from error

# Not engine.py: only the workers of an engine that mixes import it.
from .client import (
    KEY,
    engine_kwargs,
    fetch_records,
    read_records,
    records_call,
    request_kwargs,
    request_seed,
    require_mixing,
    take_records,
)
from .plugin import refuse_engine, register

__all__ = [
    "KEY",
    "engine_kwargs",
    "fetch_records",
    "read_records",
    "records_call",
    "refuse_engine",
    "register",
    "request_kwargs",
    "request_seed",
    "require_mixing",
    "take_records",
]

_OLD_NAMES = {"engine_arguments": engine_kwargs, "request_arguments": request_kwargs}  # called so until 0.6


def __getattr__(name: str) -> Any:
    if name not in _OLD_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{name} is called {_OLD_NAMES[name].__name__} now", DeprecationWarning, stacklevel=2)
    return _OLD_NAMES[name]
