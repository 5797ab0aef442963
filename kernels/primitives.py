"""What the kernels share: offsets that do not overflow, division by a temperature, random words, and the launch."""

from __future__ import annotations

import functools
import inspect
import operator
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver
from triton.runtime.interpreter import InterpretedFunction

from . import configs

_P = ParamSpec("_P")
_R = TypeVar("_R")


@triton.jit
def widen(index, INT64: tl.constexpr):
    """An index wide enough to be multiplied by a stride; 32 bits where every offset is known to fit."""
    return index.to(tl.int64) if INT64 else index.to(tl.int32)


LEAST_UNIT = tl.constexpr(2.0**-100)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def power_of_two(x):
    """The power of two at or below |x|, kept far from the ends of float32's range."""
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.minimum(tl.maximum(bits.to(tl.float32, bitcast=True), LEAST_UNIT), 1 / LEAST_UNIT)


@triton.jit
def inverse_of_power(unit):
    """1 / unit of a power of two, exactly: a division would be approximate."""
    return (0x7F000000 - unit.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def scale(z, inverse, residual):
    """z / temperature, to the last bit or so, without a division: 1 / temperature is inverse + residual. -inf stays."""
    scaled = z * inverse
    # Not `scaled - scaled == 0.0`: the compiler makes that fma(z, inverse, -scaled), which is seldom 0.
    return tl.where(tl.abs(scaled) < float("inf"), tl.fma(z, inverse, z * residual), scaled)


@triton.jit
def exponentials(x, top_x, slope):
    """exp(z - largest) and its product with log2 of itself, where z is the logits x over the temperature and slope
    log2(e) / temperature. Of a NaN, and of +inf, which is then the largest, it is NaN."""
    # Nothing but -inf: any finite reference will do.
    below = (x - tl.where(top_x == float("-inf"), 0.0, top_x)) * slope
    e = tl.exp2(below)
    # Whatever is 2^-200 of the largest counts for nothing, and 0 times -inf would be NaN.
    return e, e * tl.maximum(below, -200.0)


@triton.jit
def merged(tops_x, masses, moments, slope):
    """Pieces of a row put together: largest logit, sum of the exponentials, its logarithm, entropy.

    A piece has its largest logit, the sum of its exponentials and their moment in nats. Without logits above -inf, or
    without logits, it counts for nothing.
    """
    top_x = tl.max(tops_x, axis=0)
    empty = tops_x == float("-inf")
    shift = tl.where(empty, 0.0, (tops_x - top_x) * slope)
    shrink = tl.exp2(shift)
    total = tl.sum(tl.where(empty & (masses == masses), 0.0, masses * shrink), axis=0)
    log_total = tl.log(total)
    moments += shift * LN_2 * masses
    return top_x, total, log_total, log_total - tl.sum(tl.where(empty, 0.0, shrink * moments), axis=0) / total


@triton.jit
def random_words(seed, step, row_id, stream):
    """The four words of `ngrpo_ops.random.philox`, uint32."""
    key = seed ^ ((stream.to(tl.int64) * 0x85EBCA6B) << 32)
    return tl.philox(
        key, step.to(tl.uint32), (step >> 32).to(tl.uint32), row_id.to(tl.uint32), (row_id >> 32).to(tl.uint32)
    )


def needs_int64(*tensors: Tensor | None) -> bool:
    """Whether an element of one of the tensors lies 2^31 elements or more from its first. Reads shapes and strides
    only, so it works on meta tensors too."""
    for x in tensors:
        if x is None or not (count := x.numel()) or (count <= 2**31 and x.is_contiguous()):
            continue
        if sum((size - 1) * abs(stride) for size, stride in zip(x.shape, x.stride(), strict=True)) >= 2**31:
            return True
    return False


# triton's own cdiv and next_power_of_2 are for kernels too, which costs them some five microseconds a call.


def ceil_div(x: int, y: int) -> int:
    """How many pieces of `y` cover `x`."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    """The least power of 2 that is at least `x`, which is at least 1."""
    return 1 << (x - 1).bit_length()


# Of every launch. Products and sums are contracted where the code does not forbid it by `tl.fma`: the default differs
# between versions of triton.
OPTIONS = {"enable_fp_fusion": True}


def aligned_rows(rows: int, width: int, device: torch.device) -> Tensor:
    """float32 [rows, width], or a few columns more, so that every row begins at a multiple of 16 bytes: a kernel is
    compiled anew for pointers that do not."""
    return torch.empty(rows, ceil_div(width, 4) * 4, dtype=torch.float32, device=device)


class Launch(NamedTuple):
    """One launch as it would have been made: the kernel, its arguments by name, its configuration and its programs."""

    kernel: Any
    arguments: dict[str, Any]
    config: triton.Config
    grid: tuple[int, ...]


_recorded: list[Launch] | None = None
_force_int64 = False


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches are noted instead of made, so launchers can be run on meta tensors: what `make resources` compiles for
    GPUs that are not here, and what the tests of the 64-bit offsets read."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


@contextmanager
def forced_int64() -> Iterator[None]:
    """Every launch takes its 64-bit form, which small inputs would not need."""
    global _force_int64
    before, _force_int64 = _force_int64, True
    try:
        yield
    finally:
        _force_int64 = before


def interpreted(kernel: Any) -> bool:
    """Whether the kernel was defined under TRITON_INTERPRET=1, and so runs on CPU tensors."""
    return isinstance(kernel, InterpretedFunction)


def launcher(*contiguous: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorates a function that launches kernels: runs it on the device of its first tensor, whatever the current
    device is, and makes the arguments named contiguous. The others are passed with their strides."""

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        places = [(list(inspect.signature(function).parameters).index(name), name) for name in contiguous]

        @functools.wraps(function)
        def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            given: Any = args
            for place, name in places:
                x = given[place] if place < len(given) else kwargs.get(name)
                if not isinstance(x, Tensor) or x.is_contiguous():
                    continue
                if place < len(given):
                    given = (*given[:place], x.contiguous(), *given[place + 1 :])
                else:
                    kwargs[name] = x.contiguous()
            first = next(x for x in (*given, *kwargs.values()) if isinstance(x, Tensor))
            if first.is_cuda and first.device.index != torch.cuda.current_device():
                with torch.cuda.device(first.device):
                    return function(*given, **kwargs)
            return function(*given, **kwargs)

        return guarded

    return decorate


def launch(
    kernel: Any,
    grid: Callable[[dict[str, Any]], tuple[int, ...]],
    *,
    width: int,
    int64_for: tuple[Tensor | None, ...],
    tunable: bool = True,
    **arguments: Any,
) -> None:
    """Launches a kernel in its pinned configuration for rows of `width` elements, or, under NGRPO_OPS_AUTOTUNE=1 and if
    it has tuning keys, in the fastest one found here; INT64 is decided by `int64_for`. A deterministic program is never
    tuned: another configuration may sum in another order."""
    name = kernel.__name__
    arguments["INT64"] = _force_int64 or needs_int64(*int64_for)
    config = configs.pinned(name, width, interpreted=interpreted(kernel))
    if _recorded is not None:
        _recorded.append(Launch(kernel, arguments, config, grid({**arguments, **config.kwargs})))
    elif tunable and name in configs.TUNING_KEYS and _autotune() and not interpreted(kernel):
        _tuned(kernel)[grid](**arguments, **OPTIONS)
    elif isinstance(kernel, JITFunction) and not torch.version.hip:
        if (bound := _bound.get(id(kernel))) is None:
            bound = _bound[id(kernel)] = _Bound(kernel)
        bound.launch(grid, config, arguments)
    else:
        kernel[grid](**arguments, **config.all_kwargs(), **OPTIONS)


class _Bound:
    """A kernel whose launches are bound once for each signature.

    triton binds and specializes every argument at every launch, for some thirty microseconds. Here the first launch of
    a signature goes that way, and the compiled kernel that it returns is called directly from then on. The signature
    tells apart at least what triton does: constants, element types, 16-byte alignment, integers that are 1, multiples
    of 16, or more than 32 bits wide. On AMD's GPUs triton also asks for the size of a tensor's memory: there every
    launch is triton's own.
    """

    def __init__(self, kernel: JITFunction[Any]) -> None:
        self.kernel = kernel
        self.in_order = _getter(list(kernel.arg_names))
        self.constants = _getter([p.name for p in kernel.params if p.is_constexpr])
        self.values = _getter([p.name for p in kernel.params if not p.is_constexpr])
        # The configuration is kept, so that its id is no other's.
        self.compiled: dict[tuple[Any, ...], tuple[CompiledKernel, triton.Config]] = {}

    def launch(self, grid: Callable[[dict[str, Any]], tuple[int, ...]], config: triton.Config, arguments: Any) -> None:
        arguments |= config.kwargs
        one, two, three = (*grid(arguments), 1, 1)[:3]
        signature = (
            id(config), driver.active.get_current_device(), self.constants(arguments),
            tuple([
                _integer_kind(value) if (kind := type(value)) is int
                else kind if kind in _ALL_ALIKE
                else (value.dtype, value.data_ptr() & 15 == 0)
                for value in self.values(arguments)
            ]),
        )  # fmt: skip
        if (found := self.compiled.get(signature)) is not None:
            found[0][one, two, three](*self.in_order(arguments))
            return
        options = {name: value for name, value in config.all_kwargs().items() if name not in config.kwargs}
        compiled = self.kernel[one, two, three](**arguments, **options, **OPTIONS)
        if isinstance(compiled, CompiledKernel):
            self.compiled[signature] = compiled, config


_bound: dict[int, _Bound] = {}  # by the id of the kernel, whose hash would be that of its source


def _getter(names: list[str]) -> Callable[[dict[str, Any]], Any]:
    return operator.itemgetter(*names) if names else lambda arguments: ()


# Of these triton compiles one form. To ask whether they are tensors takes longer than all else.
_ALL_ALIKE = frozenset((float, bool, type(None)))


def _integer_kind(value: int) -> int:
    """What triton compiles an integer that is no constant for."""
    width = 0 if -(2**31) <= value < 2**31 else 8 if value < 2**63 else 16
    return width | (value & 15 == 0) << 1 | (value == 1)


def _autotune() -> bool:
    return os.environ.get("NGRPO_OPS_AUTOTUNE") == "1" and not torch.are_deterministic_algorithms_enabled()


@functools.cache
def _tuned(kernel: Any) -> Any:
    """The kernel under triton's autotuner with its cache on disk. Number of rows and batch are not part of the key."""
    name = kernel.__name__
    tune = triton.autotune(
        configs=list(configs.candidates(name)),
        key=list(configs.TUNING_KEYS[name]),
        reset_to_zero=configs.ACCUMULATED.get(name),
        cache_results=True,
    )
    return tune(kernel)
