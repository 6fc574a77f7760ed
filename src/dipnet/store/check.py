"""Read a whole store and compare everything with its checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dipnet.errors import InputError
from dipnet.store.checksum import record_checksums, stored_checksums
from dipnet.store.index import (
    ALLOCATION_NAME,
    RECORDS_NAME,
    REST_NAME,
    Group,
    Index,
    read_index,
)

PIECE_BYTES = 16 << 20
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Damage:
    """A record that is not what was packed: its group's number and its unit."""

    group: int
    unit: int


def check_store(folder: str | Path, progress: Progress | None = None) -> Index:
    """The index of a store that is intact: every record, the rest and the allocation, if there is
    one, agree with their checksums.

    ``progress`` is called with the bytes read so far and in all. Raises InputError otherwise; it
    names the first damaged record, and how many there are.
    """
    folder = Path(folder)
    index = read_index(folder)
    total = sum(group.bytes for group in index.groups) + index.rest_bytes
    meter = _Meter(progress, total)
    damaged = damaged_records(folder, index, meter.add)
    if damaged:
        first = damaged[0]
        raise InputError(
            f"record {first.unit} of {index.groups[first.group].label} in {folder / RECORDS_NAME} "
            f"is damaged, {len(damaged)} of {records(index)} records are: copy the store again or "
            "pack the model again"
        )
    check_rest(folder, index, meter.add)
    check_allocation(folder, index)
    return index


def check_rest(
    folder: Path, index: Index, add: Callable[[int], object] = lambda _size: None
) -> None:
    """Raise InputError when what lies beside the records is not what was packed.

    ``add`` is called with the size of every piece that was read.
    """
    _check_file(folder / REST_NAME, index.rest_sha256, add)


def check_allocation(folder: Path, index: Index) -> None:
    """Raise InputError when a store's allocation, if it has one, is not what was packed."""
    if index.allocation_sha256 is not None:
        _check_file(folder / ALLOCATION_NAME, index.allocation_sha256, lambda _size: None)


def records(index: Index) -> int:
    """The number of a store's records."""
    return sum(group.units for group in index.groups)


def damaged_records(folder: Path, index: Index, add: Callable[[int], object]) -> list[Damage]:
    """The records whose checksum is wrong, in order; ``add`` is called with the bytes read."""
    found = []
    with _opened(folder / RECORDS_NAME) as file:
        for number in range(len(index.groups)):
            for _, piece, damaged in _pieces(file, index, number):
                found += damaged
                add(piece.nbytes)
    return found


def read_group(
    folder: Path, index: Index, number: int
) -> Iterator[tuple[int, NDArray[np.uint8], list[Damage]]]:
    """The records of a group, some at a time.

    The first one's unit, (units, record_bytes) records, and which of them are damaged. Raises
    InputError when they cannot be read.
    """
    with _opened(folder / RECORDS_NAME) as file:
        yield from _pieces(file, index, number)


def _pieces(
    file: BinaryIO, index: Index, number: int
) -> Iterator[tuple[int, NDArray[np.uint8], list[Damage]]]:
    group = index.groups[number]
    step = max(1, PIECE_BYTES // group.record_bytes)
    for first in range(0, group.units, step):
        piece = _read(file, group, first, min(step, group.units - first))
        expected = record_checksums(piece, group=number, first_unit=first)
        wrong = np.flatnonzero(stored_checksums(piece) != expected)
        yield first, piece, [Damage(number, first + int(unit)) for unit in wrong]


def _read(file: BinaryIO, group: Group, first: int, units: int) -> NDArray[np.uint8]:
    """(units, record_bytes) records as they are in the file."""
    try:
        file.seek(group.offset_of(first))
        content = file.read(units * group.record_bytes)
    except OSError as error:
        raise InputError(
            f"{group.label}: the disk cannot read the records from {first} on "
            f"({error.strerror}): copy the store from where it is intact"
        ) from None
    if len(content) != units * group.record_bytes:
        raise InputError(f"{RECORDS_NAME} became shorter while it was read: copy the store again")
    return np.frombuffer(content, np.uint8).reshape(units, group.record_bytes)


def _check_file(path: Path, sha256: str, add: Callable[[int], object]) -> None:
    if _sha256(path, add) != sha256:
        raise InputError(
            f"{path} is damaged, its SHA-256 is not that of the index: copy the store again or "
            "pack the model again"
        )


def _sha256(path: Path, add: Callable[[int], object]) -> str:
    digest = hashlib.sha256()
    with _opened(path) as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            add(len(piece))
    return digest.hexdigest()


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


class _Meter:
    """Adds up what was read."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def add(self, count: int) -> None:
        self._done += count
        if self._progress:
            self._progress(self._done, self._total)
