"""The versions of the frameworks: which ones an adapter accepts, and which ones its tests are run with.

This is the one place that knows them. pyproject.toml and the pages state the same ranges, and a test compares them.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple


class Versions(NamedTuple):
    """The versions of one framework.

    Attributes:
        oldest: the oldest accepted version.
        newest: the newest accepted version, with all of its patches. None: every later version is accepted too.
        tested: the versions that the tests are run with, each with all of its patches.
    """

    oldest: str
    newest: str | None
    tested: tuple[str, ...]


VERSIONS = {
    "transformers": Versions("5.17", None, ("5.17", "5.19", "5.23")),
    "trl": Versions("1.9.2", "1.16", ("1.9.2", "1.16")),
    "vllm": Versions("0.29", "0.33", ("0.29", "0.31", "0.32")),
    "openrlhf": Versions("0.11.2", "0.11.2", ("0.11.2",)),
    "verl": Versions("0.9.1", "0.9.1", ("0.9.1",)),
}
"""The adapters, each with the versions of its framework."""


def standing(framework: str, version: str) -> Literal["tested", "untested", "refused"]:
    """What a version of a framework is to its adapter. An untested version is accepted.

    Examples:
        >>> from ngrpo_ops.versions import standing
        >>> standing("vllm", "0.29.1"), standing("vllm", "0.33.0"), standing("vllm", "0.290.0")
        ('tested', 'untested', 'refused')
    """
    oldest, newest, tested = VERSIONS[framework]
    found = _release(version)
    if found < _release(oldest) or (newest is not None and found > _release(newest) and not _is_of(found, newest)):
        return "refused"
    return "tested" if any(_is_of(found, one) for one in tested) else "untested"


def accepted(framework: str) -> str:
    """The accepted versions, for a message.

    Examples:
        >>> from ngrpo_ops.versions import accepted
        >>> accepted("vllm"), accepted("openrlhf"), accepted("transformers")
        ('0.29 to 0.33', '0.11.2', '5.17 and later')
    """
    oldest, newest, _ = VERSIONS[framework]
    if newest is None:
        return f"{oldest} and later"
    return oldest if oldest == newest else f"{oldest} to {newest}"


def tested(framework: str) -> str:
    """The tested versions, for a message.

    Examples:
        >>> from ngrpo_ops.versions import tested
        >>> tested("vllm")
        '0.29, 0.31, 0.32'
    """
    return ", ".join(VERSIONS[framework].tested)


def requirement(framework: str) -> str:
    """The accepted versions as an installer reads them.

    Examples:
        >>> from ngrpo_ops.versions import requirement
        >>> requirement("vllm"), requirement("transformers")
        ('>=0.29,<0.34', '>=5.17')
    """
    oldest, newest, _ = VERSIONS[framework]
    if newest is None:
        return f">={oldest}"
    if oldest == newest:
        return f"=={oldest}.*"
    *rest, last = _release(newest)
    return f">={oldest},<{'.'.join(map(str, (*rest, last + 1)))}"


def _release(version: str) -> tuple[int, ...]:
    """The numbers at the head of a version; () where there are none."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _is_of(release: tuple[int, ...], version: str) -> bool:
    numbers = _release(version)
    return release[: len(numbers)] == numbers
