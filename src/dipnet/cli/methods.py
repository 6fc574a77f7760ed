"""Methods on the command line: what is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from dipnet.methods.request import MethodRequest as MethodRequest
from dipnet.methods.request import parse_method as parse_method

T = TypeVar("T")


def unique(values: Iterable[T]) -> list[T]:
    """The values without repetitions, in order."""
    return list(dict.fromkeys(values))
