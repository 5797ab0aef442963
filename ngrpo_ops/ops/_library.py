"""How an operation is registered with torch, and which implementation a call runs: the Triton kernels or plain torch.

`backend` is an argument of the operations that have kernels, so that a compiled graph shows what runs. A backward is an
operation of its own whose derivative is refused: a second derivative raises instead of being silently wrong.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS = ("eager", "triton")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Registration -----------------------------------------------------------------------------------------------------


class Operation:
    """An operation `torch.ops.ngrpo.<name>` that mutates nothing.

    <name> is the name of the implementation without leading underscores: the public function can then have the name
    itself.

    A parameter annotated with a NamedTuple stands for the tuple's fields: they are written out in the schema, and the
    implementation gets them as one tuple. So an argument list is written once.

    torch.library.custom_op does the same with a wrapper around every call, which takes as long as the rest of the
    dispatch.
    """

    def __init__(self, implementation: Callable[..., Any], tags: tuple[torch.Tag, ...] = ()) -> None:
        name = implementation.__name__.lstrip("_")
        self.name = f"ngrpo::{name}"
        flat = flattened(implementation)
        schema = torch.library.infer_schema(flat, mutates_args=())
        torch.library.define(self.name, schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        torch.library.impl(self.name, "default", flat)
        self._call = getattr(torch.ops.ngrpo, name).default
        self._differentiable = False

    def __call__(self, *args: Any) -> Any:
        # torch would drop the tangents of an operation that has a backward alone: a derivative of 0, silently.
        if self._differentiable and not torch.compiler.is_compiling() and _carries_tangents(args):
            raise NotImplementedError(f"{self.name} has no forward-mode derivative: use reverse mode, as backward()")
        return self._call(*args)

    def register_fake(self, function: Callable[..., Any]) -> None:
        torch.library.register_fake(self.name, function)

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None) -> None:
        torch.library.register_autograd(self.name, backward, setup_context=setup_context)
        self._differentiable = True

    def refuse_derivative(self, of: str) -> None:
        """Makes the derivative of this operation, the backward of the operation `of`, an error."""

        def refuse(ctx: Any, *grads: Any) -> None:
            raise NotImplementedError(f"{of} can be differentiated once: its gradient has no derivative")

        self.register_autograd(refuse)


def _carries_tangents(args: tuple[Any, ...]) -> bool:
    """Whether one of the arguments is a dual tensor, of torch.func.jvp or torch.autograd.forward_ad."""
    if getattr(forward_ad, "_current_level", 0) < 0:  # outside of forward mode, as nearly always: no tensor is dual
        return False
    return any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args)


#: An operation that reads numbers on the host, like a seed, step or temperature that is one. In a CUDA graph that
#: torch.compile captures it would go on with the numbers of the capture.
HostReadingOperation = functools.partial(Operation, tags=(torch.Tag.cudagraph_unsafe,))


def flattened(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation with the fields of its NamedTuple parameter as parameters of their own."""
    hints = get_type_hints(implementation)
    signature = inspect.signature(implementation)
    parameters: list[inspect.Parameter] = []
    packed: tuple[int, int, Any] | None = None
    for name, parameter in signature.parameters.items():
        if not hasattr(hints[name], "_fields"):
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        assert packed is None, "at most one NamedTuple"
        fields = get_type_hints(hints[name])
        packed = len(parameters), len(parameters) + len(fields), hints[name]
        parameters += [inspect.Parameter(field, parameter.kind, annotation=hint) for field, hint in fields.items()]
    if packed is None:
        return implementation
    start, stop, kind = packed

    def flat(*args: Any) -> Any:
        return implementation(*args[:start], kind._make(args[start:stop]), *args[stop:])

    flat.__name__ = implementation.__name__
    flat.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=parameters,
        return_annotation=None if hints["return"] is type(None) else hints["return"],  # as infer_schema wants it
    )
    return flat


# Choice of the implementation -------------------------------------------------------------------------------------


def choose_backend(backend: str | None, tensor: Tensor, unsupported: str | None = None) -> str:
    """ "eager" or "triton" for an operation on `tensor`.

    None is "triton" on a GPU, and on the CPU where TRITON_INTERPRET=1 asks for the kernels to be interpreted. None is
    "eager" elsewhere, in float64, and where the kernel cannot do what is asked.

    Args:
        backend: "eager", "triton" or None, as the user gave it.
        tensor: the tensor whose device and dtype decide.
        unsupported: why the kernel cannot do what is asked; None: it can.

    Raises:
        ValueError: an unknown backend, or "triton" where it cannot run, with the reason.
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend must be one of {BACKENDS}, or None to choose, got {backend!r}")
    if backend == "eager" or (backend is None and tensor.device.type == "cpu" and not _interpreting()):
        return "eager"
    reason = _unavailable(tensor) or unsupported
    if reason is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend='triton' cannot be used here: {reason}")
    return "eager"


def _unavailable(tensor: Tensor) -> str | None:
    if tensor.dtype not in _KERNEL_DTYPES:
        return f"the kernels take float32, bfloat16 and float16, got {tensor.dtype}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if tensor.device.type == "cpu" and not _kernels_are_interpreted():
        return "on the CPU the kernels run only under TRITON_INTERPRET=1, set before triton is imported"
    if tensor.device.type not in ("cpu", "cuda"):
        return f"no kernels for device {tensor.device}"
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _kernels_are_interpreted() -> bool:
    from ..kernels import mix_embeddings, primitives  # as a statement, which torch.compile can trace

    return primitives.interpreted(mix_embeddings.mix_forward_kernel)


def load_kernels(operation: str) -> ModuleType:
    """The module of an operation's kernels. Triton is imported with the first one."""
    return importlib.import_module(f"ngrpo_ops.kernels.{operation}")
