"""Log-probabilities of chosen ids and the entropy, with their gradient: contract, registration and oracle.

The oracle is also the CPU form: it handles as many rows at a time as fit in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.library import custom_op

from ._checks import (
    FLOATING,
    require_flag,
    require_ids,
    require_ids_in_range,
    require_positive,
    require_same_device,
    require_tensor,
    within,
)
from ._library import Operation, choose_backend, flattened, load_kernels
from ._precision import ROW_BLOCK_ELEMENTS, compute_dtype

_MAX_KERNEL_IDS = 8192

# Contract ---------------------------------------------------------------------------------------------------------


@overload
def selective_log_softmax(
    logits: Tensor, ids: Tensor, *, temperature: float = ..., return_entropy: Literal[False] = ...,
    in_place_backward: bool = ..., backend: str | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def selective_log_softmax(
    logits: Tensor, ids: Tensor, *, temperature: float = ..., return_entropy: Literal[True],
    in_place_backward: bool = ..., backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def selective_log_softmax(
    logits: Tensor,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    in_place_backward: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-softmax of logits / temperature at the given ids, and the entropy, in one pass and without a second [N, V].

    Args:
        logits: [..., V], floating point, with any strides: logits[:, :-1] of [B, T, V] is not copied.
        ids: int64 [...] or [..., k] over the rows of logits, values in [0, V).
        temperature: tau > 0.
        return_entropy: also return the entropy of each row, in nats.
        in_place_backward: the gradient overwrites the logits. Nothing may read the logits after the backward pass;
            torch raises where its own autograd would read them. Ignored under torch.compile, which plans memory itself.
        backend: "eager", "triton" or None. None is "triton" on a GPU, or under TRITON_INTERPRET=1, for k <= 8192 and
            every dtype but float64; otherwise it is "eager".

    Returns:
        Log-probabilities of the shape of `ids`, float32 (float64 for float64 logits). With `return_entropy`, a pair:
        the log-probabilities and the entropy [...]. Differentiable once in `logits`; the gradient has their dtype.

    Raises:
        TypeError: an argument has the wrong type or dtype, or the logits are a DTensor.
        ValueError: shapes or devices do not fit, the batch is empty, `temperature` is out of range, ids are out of
            range, the gradient cannot overwrite the logits because their elements share memory, or the backend cannot
            be used. Ids are checked on the CPU only; on a GPU an id out of range gives NaN.

    Examples:
        >>> import torch
        >>> from ngrpo_ops import selective_log_softmax
        >>> probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])
        >>> ids = torch.tensor([0, 2])
        >>> logprobs, entropy = selective_log_softmax(probabilities.log(), ids, return_entropy=True)
        >>> logprobs.exp()
        tensor([0.5000, 0.7000])
        >>> entropy
        tensor([1.0397, 0.8018])
    """
    require_tensor(logits, "logits")
    require_ids(ids, "ids")
    if logits.dim() < 1 or logits.dtype not in FLOATING or logits.numel() == 0:
        raise ValueError(
            f"logits must be a non-empty floating-point [..., V], got {logits.dtype} of shape {tuple(logits.shape)}"
        )
    lead = logits.shape[:-1]
    many = ids.dim() == logits.dim()
    if ids.numel() == 0 or (ids.shape[:-1] if many else ids.shape) != lead:
        raise ValueError(f"ids must be {(*lead,)} or {(*lead, 'k')} for these logits, got shape {tuple(ids.shape)}")
    require_same_device("ids", ids, "logits", logits)
    require_positive(temperature, "temperature")
    require_flag(return_entropy, "return_entropy")
    require_flag(in_place_backward, "in_place_backward")
    rows = logits[(None,) * (3 - logits.dim())] if logits.dim() < 3 else logits.flatten(0, -3)  # [b, t, V]
    columns = ids.reshape(-1, ids.shape[-1] if many else 1)
    in_place = in_place_backward and not torch.compiler.is_compiling()
    if in_place and _overlaps(logits):
        raise ValueError(
            f"in_place_backward needs logits whose elements lie apart, got strides {logits.stride()}: an expanded view?"
        )
    k = columns.shape[1]
    unsupported = f"the kernel takes at most {_MAX_KERNEL_IDS} ids a row, got {k}" if k > _MAX_KERNEL_IDS else None
    logprobs, entropy, _ = _selective_log_softmax(
        rows, columns, temperature, return_entropy, in_place, choose_backend(backend, logits, unsupported)
    )
    logprobs = logprobs.view(ids.shape)
    return (logprobs, entropy.view(lead)) if return_entropy else logprobs


def _overlaps(x: Tensor) -> bool:
    """Whether two elements may share memory."""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False


# Registration -----------------------------------------------------------------------------------------------------


@Operation
def _selective_log_softmax(
    logits: Tensor, ids: Tensor, temperature: float, entropy: bool, in_place_backward: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [b t, k], entropy [b t] or empty, and normalizer [2, b t] of logits [b, t, V] and ids [b t, k].

    The normalizer is what the backward kernel needs of each row. The eager backward computes it again, and here the
    normalizer is empty. Only the backward reads `in_place_backward`.
    """
    if backend == "triton":
        return load_kernels("selective_log_softmax").forward(logits, ids, temperature, entropy)
    return *selective_log_softmax_reference(logits, ids, temperature, entropy), logits.new_empty(2, 0)


@_selective_log_softmax.register_fake
def _(
    logits: Tensor, ids: Tensor, temperature: float, entropy: bool, in_place_backward: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = ids.shape[0], compute_dtype(logits)
    return (
        logits.new_empty(ids.shape, dtype=dtype),
        logits.new_empty(n if entropy else 0, dtype=dtype),
        logits.new_empty(2, n, dtype=dtype) if backend == "triton" else logits.new_empty(2, 0),
    )


class _BackwardInputs(NamedTuple):
    """The incoming gradients of log-probabilities and entropy, and what the forward saved."""

    grad: Tensor
    grad_entropy: Tensor
    logits: Tensor
    ids: Tensor
    entropy: Tensor
    normalizer: Tensor
    temperature: float


def _grad_logits(inputs: _BackwardInputs, backend: str, in_place: bool) -> Tensor:
    if backend == "triton":
        return load_kernels("selective_log_softmax").backward(*inputs, in_place)
    grad, grad_entropy, logits, ids, entropy, _, temperature = inputs
    return selective_log_softmax_backward_reference(
        grad, grad_entropy, logits, ids, temperature, entropy.numel() > 0, in_place
    )


@Operation
def _selective_log_softmax_backward(inputs: _BackwardInputs, backend: str) -> Tensor:
    return _grad_logits(inputs, backend, in_place=False)


@_selective_log_softmax_backward.register_fake
def _(grad: Tensor, grad_entropy: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _overwrite_logits(inputs: _BackwardInputs, backend: str) -> None:
    _grad_logits(inputs, backend, in_place=True)


_selective_log_softmax_backward_ = custom_op(
    "ngrpo::selective_log_softmax_backward_", flattened(_overwrite_logits), mutates_args=("logits",)
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, ids, ctx.temperature, _, ctx.in_place, ctx.backend = inputs
    _, entropy, normalizer = output
    ctx.save_for_backward(logits, ids, entropy, normalizer)


def _backward(ctx: Any, grad: Tensor, grad_entropy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    if not ctx.in_place:
        grad_logits = _selective_log_softmax_backward(grad, grad_entropy, *saved, ctx.temperature, ctx.backend)
        return grad_logits, *[None] * 5
    if torch.is_grad_enabled():
        raise NotImplementedError("selective_log_softmax in place can be differentiated once: create_graph is refused")
    _selective_log_softmax_backward_(grad, grad_entropy, *saved, ctx.temperature, ctx.backend)
    return saved[0].detach(), *[None] * 5


_selective_log_softmax.register_autograd(_backward, setup_context=_setup_context)
_selective_log_softmax_backward.refuse_derivative("selective_log_softmax")


# Oracle: what the kernels are tested against, and what runs without them ------------------------------------------


def selective_log_softmax_reference(
    logits: Tensor, ids: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [b t, k] and entropy [b t], or empty without `entropy`, of logits [b, t, V] and ids [b t, k].

    On an accelerator an id out of range gives NaN.
    """
    require_ids_in_range(ids, logits.shape[-1], "ids")
    dtype, known = compute_dtype(logits), within(ids, logits.shape[-1])
    ids = ids.where(known, 0)
    logprobs = torch.empty(ids.shape, dtype=dtype, device=logits.device)
    entropies = torch.empty(ids.shape[0] if entropy else 0, dtype=dtype, device=logits.device)
    for rows, _, log_p in _row_blocks(logits, temperature, log=True):
        logprobs[rows] = log_p.gather(1, ids[rows])
        if entropy:
            entropies[rows] = -_p_log_p(log_p).sum(-1)
    return logprobs.masked_fill_(~known, torch.nan), entropies


def selective_log_softmax_backward_reference(
    grad: Tensor, grad_entropy: Tensor, logits: Tensor, ids: Tensor, temperature: float, entropy: bool, in_place: bool
) -> Tensor:
    """The gradient of logits [b, t, V], in their dtype; in their own memory with `in_place`.

    `grad_entropy` is read only with `entropy`.
    """
    dtype = compute_dtype(logits)
    out = logits if in_place else torch.empty_like(logits, memory_format=torch.contiguous_format)
    grad = grad.to(dtype) / temperature
    known = within(ids, logits.shape[-1])
    ids, grad_at_ids = ids.where(known, 0), grad.where(known, 0)
    for rows, (i, where), block in _row_blocks(logits, temperature, log=entropy):
        if entropy:
            p, p_log_p = block.exp(), _p_log_p(block)
            entropy_slope = grad_entropy[rows, None].to(dtype) / temperature
            entropy_slope = entropy_slope * (p_log_p - p * p_log_p.sum(-1, keepdim=True))
        else:
            p = block
        slope = p.mul_(-grad[rows].sum(-1, keepdim=True))
        slope.scatter_add_(1, ids[rows], grad_at_ids[rows])
        if entropy:
            slope -= entropy_slope
        out[i, where].copy_(slope)
    return out


def _row_blocks(logits: Tensor, temperature: float, log: bool) -> Iterator[tuple[slice, tuple[int, slice], Tensor]]:
    """The softmax or, with `log`, the log-softmax of logits [b, t, V] / temperature, a cache's worth of rows at a time.

    Yields the rows' numbers in [b t], their place in [b, t], and their (log-)probabilities. All blocks share memory: a
    block must be used before the next one is taken.
    """
    b, t, v = logits.shape
    threads = torch.get_num_threads()
    size = -(-max(1, ROW_BLOCK_ELEMENTS // v) // threads) * threads  # as many rows for every thread
    scaled = torch.empty(min(size, t), v, dtype=compute_dtype(logits), device=logits.device)
    softmax = torch.log_softmax if log else torch.softmax
    for i in range(b):
        for start in range(0, t, size):
            where = slice(start, min(start + size, t))
            count = where.stop - start
            if logits.dtype == scaled.dtype:
                torch.div(logits[i, where], temperature, out=scaled[:count])
            else:  # converted first, so that the division is not in bfloat16
                scaled[:count].copy_(logits[i, where]).div_(temperature)
            softmax(scaled[:count], -1, out=scaled[:count])  # a row's statistics are complete before it is written
            yield slice(i * t + start, i * t + where.stop), (i, where), scaled[:count]


def _p_log_p(log_p: Tensor) -> Tensor:
    """p log p, which is 0 where p is 0."""
    return torch.where(log_p == -torch.inf, 0, log_p.exp() * log_p)
