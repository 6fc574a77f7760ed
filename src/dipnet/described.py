"""Our small JSON files, which say what they are: all of one is checked before any of it is used.

Knows no file's content, but the kinds of fields that several have; imports nothing of ours but the
errors.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dipnet.errors import InputError, complaint

Content = TypeVar("Content", bound=BaseModel)

CLOSED = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
"""Nothing unknown and nothing infinite."""
Size = Annotated[int, Field(ge=1, lt=2**31)]
"""A number of rows, columns, layers or units."""
Bytes = Annotated[int, Field(ge=0, lt=2**62)]
Word = Annotated[str, Field(min_length=1, max_length=200)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""A SHA-256."""

MAX_FILE_BYTES = 1 << 20
"""No file of this kind comes near it; what is larger is something else, and is not read."""


class _Head(BaseModel):
    """What must be understood before the rest can be."""

    format: object = None
    version: object = None


@dataclass(frozen=True)
class Described(Generic[Content]):
    """One kind of file: its name for people, its ``format`` and ``version``, and what it holds.

    ``remedy`` ends every error.
    """

    kind: str
    format: str
    version: int
    content: type[Content]
    remedy: str

    def read(self, path: Path) -> Content:
        """What a file holds; InputError, in one line, when it cannot be read or is wrong."""
        try:
            with path.open("rb") as file:
                found = file.read(MAX_FILE_BYTES + 1)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"cannot read the {self.kind} {path}: {reason}; {self.remedy}"
            ) from None
        if len(found) > MAX_FILE_BYTES:
            raise InputError(f"{path} is larger than any {self.kind}: {self.remedy}")
        return self.parse(found, str(path))

    def parse(self, found: bytes, source: str) -> Content:
        """What the bytes of ``source`` hold; InputError says what is wrong with it."""
        try:
            self._check_head(_Head.model_validate_json(found), source)
            return self.content.model_validate_json(found)
        except ValidationError as error:
            raise InputError(
                f"{source} is no {self.kind}: {complaint(error)}; {self.remedy}"
            ) from None

    def _check_head(self, head: _Head, source: str) -> None:
        if head.format != self.format:
            raise InputError(
                f"{source} is no {self.kind}, it has no format {self.format!r}: {self.remedy}"
            )
        if head.version != self.version:
            raise InputError(
                f"{source} is a {self.kind} of version {str(head.version)[:20]} and this dipnet "
                f"reads {self.version}: {self.remedy}"
            )
