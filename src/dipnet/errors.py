"""The errors that dipnet raises on purpose; the command line prints them and exits with 2."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class DipnetError(Exception):
    """Base of every error that dipnet raises on purpose: one line, with the remedy."""


class InputError(DipnetError, ValueError):
    """The caller's input cannot be used: a density, a name, a file, a text."""


class BackendError(DipnetError):
    """The requested kernel backend cannot serve this call."""


def complaint(error: ValidationError) -> str:
    """The first complaint of pydantic about what a file says, in one line."""
    found = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(map(str, found["loc"]))[:80]
    message = " ".join(found["msg"].removeprefix("Value error, ").split())[:200]
    return f"{where}: {message}" if where else message
