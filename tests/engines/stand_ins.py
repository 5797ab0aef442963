"""What the stand-ins of several frameworks share: how they are put in place, and those of vLLM on a CPU."""

from __future__ import annotations

import collections
import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any


def after_import(changes: dict[str, Callable[[Any], None]]) -> None:
    """Changes modules of installed packages in this process: those that are imported now, the others just after.

    Args:
        changes: for each module's name a function that is called with the module.
    """
    left = {}
    for name, change in changes.items():
        if name in sys.modules:
            change(sys.modules[name])
        else:
            left[name] = change
    sys.meta_path.insert(0, _Finder(left))


class _Finder:
    def __init__(self, left: dict[str, Callable[[Any], None]]) -> None:
        self.left = left
        self.looking: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self.left or name in self.looking:
            return None
        self.looking.add(name)
        spec = importlib.util.find_spec(name)
        self.looking.remove(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                # Not when it was found: python -m looks for a module before it is imported.
                change = self.left.pop(name)
                execute(module)
                change(module)

            spec.loader.exec_module = exec_module
        return spec


def vllm_on_cpu(_: Any) -> None:
    import cpu_engine  # noqa: F401


def pynccl_over_gloo(module: Any) -> None:
    """gloo carries the weights to the engine. vLLM's own class goes without a word where it finds no NCCL."""
    from datetime import timedelta

    from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo

    class OverGloo:
        def __init__(self, group: Any, device: Any = None, library_path: Any = None) -> None:
            self.group = group  # a trainer lets go of its store and socket at the end
            store = PrefixStore("weights", group.store)
            self.gloo = ProcessGroupGloo(store, group.rank, group.world_size, timedelta(minutes=2))

        def broadcast(self, tensor: Any, src: int, stream: Any = None) -> None:
            options = BroadcastOptions()
            options.rootRank = src
            self.gloo.broadcast([tensor], options).wait()

    module.PyNcclCommunicator = OverGloo


def seeds_by_prompt(module: Any) -> None:
    """The n-th request of a prompt gets the seed n, in the framework's module that has `AsyncLLM`."""
    generate, asked = module.AsyncLLM.generate, collections.Counter()

    @functools.wraps(generate)
    def seeded(self: Any, prompt: Any, sampling_params: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = tuple(prompt["prompt_token_ids"])
        sampling_params.seed = asked[tokens]
        asked[tokens] += 1
        return generate(self, prompt, sampling_params, *args, **kwargs)

    module.AsyncLLM.generate = seeded
