"""The strategies: which candidates a mixed step combines, by which weights, and which of them it emits.

A strategy is one function of the policy. It returns the candidates' ids [B, k] and weights [B, k]; the first id is the
token that a mixed step emits. Its options stand beside it. `policy` is a `Policy` (ops/decode_step/policy.py), which
computes what the function asks for and nothing else.

A strategy of your own needs no change here: `MixingConfig(strategy="package.module:function")` imports it.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._messages import shown
from .ops._checks import require_number

if TYPE_CHECKING:
    from .ops.decode_step.policy import Policy

StrategyFunction = Callable[["Policy"], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Option:
    """A number that a strategy reads: its default, the least value it may have, and what it means."""

    default: float
    help: str
    least: float = 0

    def __post_init__(self) -> None:
        require_number(self.default, "default", least=self.least)


@dataclass(frozen=True)
class Strategy:
    """A registered strategy: its function and what the rest of the package must know of it.

    Attributes:
        name: what `MixingConfig.strategy` calls it.
        function: `function(policy)` returns ids int64 [B, k] and weights [B, k].
        options: the options it reads, as `policy.options[name]`. A strategy with the option "noise_scale" gets Gaussian
            noise of that size on its mix.
        reads_neighbors: whether it calls `policy.neighbors()`, which needs the neighbor table.
        reads_filters: whether it calls `policy.draws()`, which honors top-k, top-p and min-p.
        emits_sample: whether a mixed step emits the row's sample, so that it is a draw from the policy.
        softmax_of_logits: whether its weights are a softmax of logits, which alone has a variant "released".
        fixed_k: the only number of candidates it has; None: any.
        has_kernel: whether the Triton kernel of `decode_step` computes it. Everything else runs as plain torch.
    """

    name: str
    function: StrategyFunction
    options: Mapping[str, Option] = field(default_factory=lambda: MappingProxyType({}))
    reads_neighbors: bool = False
    reads_filters: bool = True
    emits_sample: bool = False
    softmax_of_logits: bool = False
    fixed_k: int | None = None
    has_kernel: bool = False

    @property
    def adds_noise(self) -> bool:
        """Whether the mix gets Gaussian noise."""
        return "noise_scale" in self.options

    def option_values(self, given: Mapping[str, Any]) -> list[float]:
        """The values of its options, in the order of `options`.

        Args:
            given: values by name; None stands for the default.

        Raises:
            TypeError, ValueError: a value that is no number, or below its least; an option of another strategy.
        """
        for name, value in given.items():
            if value is None:
                continue
            if name not in self.options:
                readers = " or ".join(repr(other.name) for other in _registry.values() if name in other.options)
                raise ValueError(f"{name} is read by strategy {readers} alone, got {value!r} with {self.name!r}")
            require_number(value, name, least=self.options[name].least)
        values = ((given.get(name), option.default) for name, option in self.options.items())
        return [float(default if value is None else value) for value, default in values]

    def named_options(self, values: Sequence[float]) -> dict[str, float]:
        """The values of `option_values` by the options' names."""
        return dict(zip(self.options, values, strict=True))


_registry: dict[str, Strategy] = {}


def register_strategy(
    name: str | None = None, *, options: Mapping[str, Option] | None = None, **properties: Any
) -> Callable[[StrategyFunction], StrategyFunction]:
    """Decorates a function of the policy: it becomes the strategy `name`.

    Args:
        name: what `MixingConfig.strategy` will call it; None: "module:function". In other processes, as of vLLM or Ray,
            only "module:function" is known.
        options: the options that it reads: "noise_scale" and "moi_beta", those that `MixingConfig` has fields for.
        **properties: further fields of `Strategy`.

    Returns:
        A decorator that returns the function as it is.

    Raises:
        TypeError: a name that is no string, a property that there is not, not a function. ValueError: another function
            has the name; an option that no field sets; a function without a name of its own and no name given.

    Examples:
        >>> from ngrpo_ops import decode_step, register_strategy
        >>> @register_strategy("pair")
        ... def pair(policy):
        ...     ids = policy.likeliest(policy.k)
        ...     return ids, torch.full(ids.shape, 1 / policy.k)
        >>> logits = torch.tensor([[0.0, 3.0, 2.0]])
        >>> step = decode_step(logits, None, strategy="pair", k=2, mixing_rate=1.0, seed=0, step=0)
        >>> step.ids.tolist(), step.weights.tolist()
        ([[1, 2]], [[0.5, 0.5]])
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be a string: write @register_strategy(), with parentheses, got {name!r}")
    if "has_kernel" in properties:
        raise TypeError("has_kernel cannot be given: the kernel knows the strategies of ngrpo_ops alone")
    settable = {option for known in _registry.values() if known.has_kernel for option in known.options}
    for option in options or {}:
        if option not in settable:
            raise ValueError(
                f"options must be among {sorted(settable)}, for which MixingConfig has fields, got {option!r}: read a "
                "number of your own from your module"
            )
    return _register(name, options, **properties)


def _register(
    name: str | None, options: Mapping[str, Option] | None = None, **properties: Any
) -> Callable[[StrategyFunction], StrategyFunction]:
    def decorate(function: StrategyFunction) -> StrategyFunction:
        if not inspect.isfunction(function):
            raise TypeError(f"a strategy must be a function of the policy, got {function!r}")
        if name is None and "<" in function.__qualname__:  # <lambda>, <locals>
            raise ValueError(f"name must be given for {function.__qualname__}, which its own name cannot import")
        called = f"{function.__module__}:{function.__qualname__}" if name is None else name
        known = _registry.get(called)
        if known is not None and (known.function.__module__, known.function.__qualname__) != (
            function.__module__,
            function.__qualname__,
        ):
            raise ValueError(f"strategy {called!r} is registered already, by {known.function.__module__}")
        _registry[called] = Strategy(called, function, MappingProxyType(dict(options or {})), **properties)
        return function

    return decorate


def strategy_names() -> tuple[str, ...]:
    """The names of the registered strategies."""
    return tuple(_registry)


def get_strategy(name: Any) -> Strategy:
    """The strategy of a name. Nothing is imported: `load_strategy` does that, for `MixingConfig` alone.

    Raises:
        ValueError: no strategy of that name is registered.
    """
    if not isinstance(name, str) or name not in _registry:
        raise ValueError(
            f"strategy must be one of {strategy_names()}, or 'package.module:function' after a MixingConfig has named "
            f"it, got {name!r}"
        )
    return _registry[name]


def load_strategy(name: Any) -> Strategy:
    """The strategy of a name, imported where the name is "package.module:function".

    Raises:
        ValueError: no strategy of that name, nothing to import, or not a function of one argument.
    """
    if isinstance(name, str) and name in _registry and ":" not in name:
        return _registry[name]
    module, separator, path = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not (module and separator and path):
        raise ValueError(f"strategy must be one of {strategy_names()}, or 'package.module:function', got {shown(name)}")
    try:
        function: Any = importlib.import_module(module)
        for part in path.split("."):
            function = getattr(function, part)
    except Exception as error:  # whatever the user's module raises
        if name in _registry:  # under a name that was given with a colon
            return _registry[name]
        raise ValueError(f"strategy {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    try:
        inspect.signature(function).bind(None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"strategy {name!r} must be a function of one argument, the policy: {error}") from error
    # What register_strategy knows of it, also under further decorators.
    registered = {id(known.function): known for known in _registry.values()}
    declared = registered.get(id(inspect.unwrap(function, stop=lambda wrapped: id(wrapped) in registered)))
    _registry[name] = replace(declared or Strategy(name, function), name=name, function=function)
    return _registry[name]


# The strategies ---------------------------------------------------------------------------------------------------


_builtin = functools.partial(_register, has_kernel=True)


@_builtin("neighbor", reads_neighbors=True, reads_filters=False, softmax_of_logits=True)
def neighbor(policy: Policy) -> tuple[Tensor, Tensor]:
    """N-GRPO (arXiv 2606.10768): the anchor and its nearest neighbors in the input embedding table."""
    ids = policy.neighbors()
    return ids, policy.softmax(ids, count_repeats=True)


@_builtin("topk", reads_filters=False, softmax_of_logits=True)
def topk(policy: Policy) -> tuple[Tensor, Tensor]:
    """Soft Thinking (arXiv 2505.15778): the k most likely tokens."""
    ids = policy.likeliest(policy.k)
    return ids, policy.softmax(ids)


@_builtin("gumbel", reads_filters=False)
def gumbel(policy: Policy) -> tuple[Tensor, Tensor]:
    """SofT-GRPO (arXiv 2511.06411): the k most likely tokens, weighted by softmax((log p + Gumbel noise) / tau). The
    heaviest one is emitted, which is a draw from the policy's top k."""
    ids = policy.likeliest(policy.k)
    weights = policy.softmax(ids, policy.relative_logits(ids) + policy.noise("gumbel", policy.k))
    return to_front(ids, weights, weights.argmax(-1, keepdim=True))


@_builtin(
    "gaussian",
    options={"noise_scale": Option(0.33, "size of the noise over the size of the mix (root mean square), STHT's")},
    reads_filters=False,
    softmax_of_logits=True,
)
def gaussian(policy: Policy) -> tuple[Tensor, Tensor]:
    """STHT (arXiv 2509.19170): the k most likely tokens, and Gaussian noise on their mix."""
    return topk(policy)


@_builtin(
    "moi",
    options={"moi_beta": Option(1.0, "weight of the sample over the weight of the distribution, MoI's")},
    emits_sample=True,
)
def moi(policy: Policy) -> tuple[Tensor, Tensor]:
    """Mixture of Inputs (arXiv 2505.14827), which mixes the whole vocabulary: here the sampled token and the k - 1 most
    likely others, weighted by (H p + (beta + 1 - H) [sampled]) / (beta + 1), with H the policy's entropy over log V."""
    beta, sampled = policy.options["moi_beta"], policy.draws(1)
    ids = policy.likeliest(policy.k)
    # The sample is among the likeliest, or takes the place of the last of them.
    found = ids == sampled
    place = torch.where(found.any(-1, keepdim=True), found.int().argmax(-1, keepdim=True), policy.k - 1)
    ids = ids.scatter(-1, place, sampled)
    weights, entropy = policy.softmax(ids), policy.normalized_entropy[:, None]
    bonus = torch.zeros_like(weights).scatter(-1, place, beta + 1 - entropy)
    return to_front(ids, (entropy * weights + bonus) / (beta + 1), place)


@_builtin("multiplex", emits_sample=True)
def multiplex(policy: Policy) -> tuple[Tensor, Tensor]:
    """Multiplex Thinking (arXiv 2601.08808): k independent draws, those that differ weighted by their probabilities.
    The first draw is emitted."""
    ids = policy.draws(policy.k)
    return ids, policy.softmax(ids)


@_builtin("anchor", reads_filters=False, softmax_of_logits=True, fixed_k=1)
def anchor(policy: Policy) -> tuple[Tensor, Tensor]:
    """The control: the argmax alone, on the steps that would be mixed."""
    return topk(policy)


def to_front(ids: Tensor, weights: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Candidates with the one at `place` [B, 1] moved to the front, the others in their order."""
    order = torch.arange(ids.shape[-1], device=ids.device).expand(ids.shape).clone()
    order.scatter_(-1, place, -1)
    order = order.argsort(dim=-1)
    return ids.gather(-1, order), weights.gather(-1, order)
