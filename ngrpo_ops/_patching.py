"""How an adapter changes and checks what belongs to a framework: replace and restore, signatures, refusals."""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

_MISSING: Any = object()


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[Any]:
    """Within it `owner.name` is `value`. Yields what `owner.name` was.

    Afterwards `owner` has again what it had itself: a method of the owner's class comes back by removing the value from
    the instance.
    """
    original = getattr(owner, name)
    own = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    try:
        yield original
    finally:
        if own is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def wrap(owner: Any, name: str, make: Callable[[Any], Any]) -> Any:
    """Puts `make(original)` in the place of `owner.name` for good, under the original's name. Returns the original."""
    original = getattr(owner, name)
    made = make(original)
    setattr(owner, name, made if isinstance(original, type) else functools.wraps(original)(made))
    return original


def check_signature(
    owner: Any,
    name: str,
    expected: Sequence[str],
    framework: str,
    tested: str,
    *,
    prefix: bool = False,
    where: str = "",
) -> None:
    """Checks the parameters of a method that is private to a framework.

    Args:
        owner: the class or module that has the method; None: there is no such class.
        expected: the names of the parameters that an adapter relies on.
        framework: the framework's name and version, for the message.
        tested: the versions that the adapter is tested with.
        prefix: whether further parameters may follow, and `*args` stand for the last of the expected.
        where: what the message calls the method; "": `name`.

    Raises:
        ImportError: the method is missing or abstract, or has other parameters.
    """
    method = None if owner is None else getattr(owner, name, None)
    found = None
    if callable(method) and not getattr(method, "__isabstractmethod__", False):
        parameters = [p for p in inspect.signature(method).parameters.values() if p.name != "_ray_trace_ctx"]
        found = [parameter.name for parameter in parameters]
        if prefix:
            kinds = [parameter.kind for parameter in parameters]
            if (rest := inspect.Parameter.VAR_POSITIONAL) in kinds[: len(expected)]:
                found = [*found[: kinds.index(rest)], *expected[kinds.index(rest) :]]
            found = found[: len(expected)]
    if found != list(expected):
        raise ImportError(
            f"{framework} has changed {where or name}: expected parameters {list(expected)}, found {found}. This "
            f"version of ngrpo-ops is tested with {framework.split()[0]} {tested}."
        )


def resolve(target: str) -> tuple[Any, str]:
    """The owner of a target "module:Class.name" or "module:name", and the name there.

    Returns:
        The class or module, and the name. The owner is None where the module has no such class. Of a class that Ray has
        made an actor, the owner is the class as it was written.

    Examples:
        >>> from ngrpo_ops._patching import resolve
        >>> resolve("collections:Counter.update")
        (<class 'collections.Counter'>, 'update')
    """
    module, _, path = target.partition(":")
    *parents, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent, None)
        metadata = getattr(owner, "__ray_metadata__", None)  # set on a class that Ray has made an actor
        owner = owner if metadata is None else metadata.modified_class
    return owner, name


class Refusal(NamedTuple):
    """A setting that an adapter does not support: its name as the user writes it, whether it is set, and the reason."""

    setting: str
    is_set: Any
    reason: str


def refuse(refusals: Iterable[Refusal], verb: str = "cannot be mixed") -> None:
    """Raises for the first setting that is set.

    Raises:
        ValueError: "SETTING VERB: REASON".
    """
    for setting, is_set, reason in refusals:
        if is_set:
            raise ValueError(f"{setting} {verb}: {reason}")


def renamed(values: Mapping[str, Any], names: Mapping[str, str], owner: str) -> dict[str, Any]:
    """Keywords with their old names replaced. Each old name gives a DeprecationWarning, except under torch.compile.

    Args:
        values: keywords as the user gave them.
        names: {old name: new name}.
        owner: whose keywords they are, for the messages.

    Raises:
        TypeError: an old and its new name are both given.
    """
    found = dict(values)
    for old, new in names.items():
        if old not in found:
            continue
        if new in found:
            raise TypeError(f"{owner} got both {new!r} and its old name {old!r}")
        if not torch.compiler.is_compiling():  # torch.compile cannot trace a warning
            warnings.warn(f"{old!r} of {owner} is called {new!r} now", DeprecationWarning, stacklevel=3)
        found[new] = found.pop(old)
    return found
