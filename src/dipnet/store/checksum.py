"""The checksum at the end of every record (docs/store-format.md)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dipnet.store.geometry import CHECKSUM_BYTES

try:
    from dipnet import _native
except ImportError:  # a source tree whose extension was never built
    _BUILT = False
else:
    _BUILT = True

FACTOR = 0x9E3779B97F4A7C15
PIECE = 1 << 22
"""Bytes that the reference widens at a time: eight-byte words take twice the records' memory."""


def record_checksums(
    records: NDArray[np.uint8], *, group: int, first_unit: int
) -> NDArray[np.uint64]:
    """What the checksums of (n, record_bytes) records have to be: (n,) uint64.

    The records are those of the ``group``-th group's units from ``first_unit`` on. At the speed of
    memory where the extension is built.
    """
    if _BUILT:
        return _native.record_checksums(records, group=group, first_unit=first_unit)
    return reference_checksums(records, group=group, first_unit=first_unit)


def reference_checksums(
    records: NDArray[np.uint8], *, group: int, first_unit: int
) -> NDArray[np.uint64]:
    """The same in numpy: the definition."""
    factors = 2 * np.arange((records.shape[1] - CHECKSUM_BYTES) // 4, dtype=np.uint64)
    factors += np.uint64(1)
    numbers = np.arange(first_unit, first_unit + len(records), dtype=np.uint64)
    sums = np.uint64(FACTOR) * (numbers + np.uint64(1 + (group << 32)))
    step = max(1, PIECE // records.shape[1])
    for start in range(0, len(records), step):
        piece = np.ascontiguousarray(records[start : start + step, :-CHECKSUM_BYTES])
        sums[start : start + step] += (piece.view("<u4") * factors).sum(axis=1, dtype=np.uint64)
    return sums


def stored_checksums(records: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The checksums that (n, record_bytes) records end with: (n,) uint64."""
    last = np.ascontiguousarray(records[:, -CHECKSUM_BYTES:])
    return last.view("<u8").reshape(-1).astype(np.uint64)


def seal(records: NDArray[np.uint8], *, group: int, first_unit: int) -> None:
    """Write the checksums of (n, record_bytes) records at their ends."""
    sums = record_checksums(records, group=group, first_unit=first_unit)
    records[:, -CHECKSUM_BYTES:] = sums.astype("<u8").view(np.uint8).reshape(-1, CHECKSUM_BYTES)
