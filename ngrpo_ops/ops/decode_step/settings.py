"""The arguments of a decode step, once: what the public functions check is what operations, oracle and kernels get."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from ...config import Variant
from ...strategies import Strategy, get_strategy, strategy_names
from .._checks import (
    FLOATING,
    LEAST_POSITIVE,
    require_choice,
    require_counter,
    require_floating,
    require_ids,
    require_integer,
    require_mask,
    require_number,
    require_positive,
    require_same_device,
    require_shape,
    require_tensor,
    values_are_readable,
)

MAX_KERNEL_K = 32


class Settings(NamedTuple):
    """A decode step's arguments but for logits and embedding. Numbers of a row's own are tensors, 0-d or [B].

    strategy is a registered name, options are the values of its options in their order. mixing_temperature None stands
    for the sampling temperature. The last three are of `decode_step` alone: `mixing_candidates` has no gate.
    """

    neighbor_ids: Tensor | None
    k: int
    strategy: str
    options: Sequence[float]
    variant: str
    temperature: Tensor
    mixing_temperature: float | None
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    seed: Tensor
    step: Tensor
    row_ids: Tensor | None
    mixing_rate: float = 0.0
    entropy_threshold: float | None = None
    enabled: Tensor | None = None

    def counter(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """seed, row ids and step, by which every row draws, where the logits are."""
        rows = torch.arange(logits.shape[0], device=logits.device) if self.row_ids is None else self.row_ids
        return self.seed.to(logits.device), rows, self.step.to(logits.device)

    def of_rows(self, rows: slice, count: int) -> Settings:
        """The settings of some of `count` rows on the CPU."""
        row_ids = torch.arange(count, device="cpu") if self.row_ids is None else self.row_ids
        split: dict[str, Any] = {
            name: value[rows]
            for name, value in self._replace(row_ids=row_ids)._asdict().items()
            if name != "neighbor_ids" and isinstance(value, Tensor) and value.dim()
        }
        return self._replace(**split)


def resolve(logits: Tensor, options: Mapping[str, float | None], **given: Any) -> tuple[Settings, Strategy]:
    """The settings of a call, checked, and the strategy's entry.

    Args:
        logits: [B, V], as the user gave them.
        options: the strategies' options that the function has, None where they are not given.
        **given: the function's other arguments, by the names of the fields of `Settings`.

    Raises:
        TypeError, ValueError: see `decode_step`.
    """
    require_logits(logits)
    strategy = get_strategy(given["strategy"])
    given["k"] = _require_candidates(logits, strategy, **{name: given[name] for name in _CANDIDATES})
    given["options"] = strategy.option_values(options)
    given["temperature"] = _temperature(given["temperature"], logits)
    given["top_k"] = _top_k(given["top_k"], logits)
    given["top_p"] = _by_row(given["top_p"], "top_p", 0.0, 1.0, logits, open_below=True, no_filter=1.0)
    given["min_p"] = _by_row(given["min_p"], "min_p", 0.0, 1.0, logits, no_filter=0.0)
    given["seed"] = require_counter(given["seed"], "seed", "logits", logits)
    given["step"] = _step(given["step"], logits)
    settings = Settings(**given)
    rows = (logits.shape[0],)
    if settings.row_ids is not None:
        require_ids(settings.row_ids, "row_ids")
        require_shape(settings.row_ids, rows, "row_ids", "[B]")
        require_same_device("row_ids", settings.row_ids, "logits", logits)
    if settings.enabled is not None:
        require_mask(settings.enabled, rows, "enabled", "[B]")
        require_same_device("enabled", settings.enabled, "logits", logits)
    require_number(settings.mixing_rate, "mixing_rate", least=0)
    if not settings.mixing_rate <= 1.0:
        raise ValueError(f"mixing_rate must be within [0, 1], got {settings.mixing_rate!r}")
    if settings.entropy_threshold is not None:
        require_number(settings.entropy_threshold, "entropy_threshold", least=0)
    return settings, strategy


def unsupported_by_kernel(settings: Settings, strategy: Strategy) -> str | None:
    """Why the kernel cannot do a step; None: it can."""
    if not strategy.has_kernel:
        return f"strategy {strategy.name!r} has no kernel"
    if settings.k > MAX_KERNEL_K:
        return f"the kernel takes k <= {MAX_KERNEL_K}, got {settings.k}"
    if settings.variant == "released" and settings.mixing_temperature is not None:
        return "the kernel has the 'released' weights at the sampling temperature only"
    return None


def require_logits(logits: Tensor) -> None:
    require_tensor(logits, "logits")
    if logits.dim() != 2 or logits.dtype not in FLOATING or logits.numel() == 0:
        raise ValueError(
            f"logits must be a non-empty floating-point [B, V], got {logits.dtype} of shape {tuple(logits.shape)}"
        )


_CANDIDATES = ("neighbor_ids", "k", "variant", "mixing_temperature")


def _require_candidates(
    logits: Tensor,
    strategy: Strategy,
    neighbor_ids: Tensor | None,
    k: int | None,
    variant: str,
    mixing_temperature: float | None,
) -> int:
    """The number of candidates."""
    vocabulary = logits.shape[1]
    require_choice(variant, get_args(Variant), "variant")
    if mixing_temperature is not None:
        require_positive(mixing_temperature, "mixing_temperature")
    if variant == "released" and not strategy.softmax_of_logits:
        raise ValueError(f"variant='released' has no strategy {strategy.name!r}, whose weights are its own")
    if strategy.reads_neighbors:
        if neighbor_ids is None:
            raise ValueError(f"neighbor_ids must be given for strategy {strategy.name!r}; got None")
        require_ids(neighbor_ids, "neighbor_ids")
        if neighbor_ids.dim() != 2 or neighbor_ids.shape[0] != vocabulary:
            raise ValueError(f"neighbor_ids must be [V = {vocabulary}, k - 1], got shape {tuple(neighbor_ids.shape)}")
        require_same_device("neighbor_ids", neighbor_ids, "logits", logits)
        columns = neighbor_ids.shape[1] + 1
        if k is not None and k != columns:
            raise ValueError(f"k must be neighbor_ids' columns and 1 = {columns}, got {k!r}")
        if strategy.fixed_k is not None and strategy.fixed_k != columns:
            raise ValueError(
                f"neighbor_ids must have {strategy.fixed_k - 1} columns for strategy {strategy.name!r}, got "
                f"{columns - 1}"
            )
        return columns
    if neighbor_ids is not None:
        readers = " or ".join(repr(name) for name in strategy_names() if get_strategy(name).reads_neighbors)
        raise ValueError(f"neighbor_ids are read by strategy {readers} alone, got strategy {strategy.name!r}")
    if strategy.fixed_k is not None:
        if k not in (None, strategy.fixed_k):
            raise ValueError(f"k must be {strategy.fixed_k} for strategy {strategy.name!r}, got {k!r}")
        k = strategy.fixed_k
    require_integer(k, "k")
    assert k is not None
    if not 1 <= k <= vocabulary:
        raise ValueError(f"k must be within [1, V = {vocabulary}], got {k}")
    return k


def _top_k(value: int | Tensor | None, logits: Tensor) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        require_ids(value, "top_k")
        require_shape(value, (logits.shape[0],), "top_k", "[B]")
        require_same_device("top_k", value, "logits", logits)
        return value
    require_integer(value, "top_k", least=1)
    if value >= logits.shape[1]:  # filters nothing; as a filter it would cost passes over the logits
        return None
    return torch.full((), value, dtype=torch.int64, device="cpu")


def _by_row(
    value: float | Tensor | None,
    name: str,
    least: float,
    most: float,
    logits: Tensor,
    *,
    open_below: bool = False,
    optional: bool = True,
    no_filter: float | None = None,
) -> Tensor | None:
    """A floating-point setting: [B] where it differs from row to row, and 0-d on the CPU where it does not.

    The values of a tensor are looked at where that does not make the host wait. The number `no_filter` is as None: as a
    filter it would cost passes over the logits.
    """
    if value is None and optional:
        return None
    if isinstance(value, Tensor):
        require_floating(value, name)
        require_shape(value, (logits.shape[0],), name, "[B]")
        require_same_device(name, value, "logits", logits)
        if not values_are_readable(value):
            return value
        low, high = (float(x) for x in value.aminmax())
    else:
        require_number(value, name, least=least)
        assert value is not None
        low = high = value
    if not (least <= low and high <= most) or (open_below and low == least) or high == math.inf:
        bounds = f"{'(' if open_below else '['}{least:g}, {most:g}{')' if most == math.inf else ']'}"
        raise ValueError(f"{name} must be within {bounds}, got {low if low == high else (low, high)!r}")
    if not isinstance(value, Tensor) and value == no_filter:
        return None
    return value if isinstance(value, Tensor) else torch.full((), value, dtype=torch.float64, device="cpu")


def _temperature(value: float | Tensor, logits: Tensor) -> Tensor:
    """0 is greedy. What is nearly 0 would take finite logits to infinity."""
    temperature = _by_row(value, "temperature", 0.0, math.inf, logits, optional=False)
    assert temperature is not None
    tiny = None
    if not isinstance(value, Tensor):
        tiny = value if 0 < value < LEAST_POSITIVE else None
    elif values_are_readable(value):
        found = value[(value > 0) & (value < LEAST_POSITIVE)]
        tiny = float(found[0]) if len(found) else None
    if tiny is not None:
        raise ValueError(f"temperature must be 0 or at least {LEAST_POSITIVE}, got {tiny!r}")
    return temperature


def _step(step: int | Tensor, logits: Tensor) -> Tensor:
    """0-d, or [B]: rows at steps of their own."""
    if not isinstance(step, Tensor) or not step.dim():
        return require_counter(step, "step", "logits", logits)
    require_ids(step, "step")
    require_shape(step, (logits.shape[0],), "step", "0-d or [B]")
    require_same_device("step", step, "logits", logits)
    return step
