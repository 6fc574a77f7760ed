"""Which records one read takes in: neighbours, and small gaps between them (docs/streaming.md)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

try:
    from dipnet import _native
except ImportError:  # a source tree whose extension was never built
    _BUILT = False
else:
    _BUILT = True

READ_BYTES = 128 << 10
"""What one read takes in at most; a test holds the engine's own constants to these two."""
GAP_BYTES = 8 << 10
"""A read goes on through so much that nobody wants."""


def count_reads(missed: NDArray[np.bool_], *, record_bytes: int) -> NDArray[np.int32]:
    """(tokens, 2): the reads for (tokens, units) missed records, and the records they take in.

    Those are the missed ones and the gaps between them.
    """
    if _BUILT:
        return _native.count_reads(np.ascontiguousarray(missed), record_bytes=record_bytes)
    return reference_count_reads(missed, record_bytes=record_bytes)


def reference_count_reads(missed: NDArray[np.bool_], *, record_bytes: int) -> NDArray[np.int32]:
    """The same in plain Python: the definition."""
    counts = [_counted(np.flatnonzero(row), record_bytes) for row in missed]
    return np.array(counts, np.int32).reshape(-1, 2)


def _counted(units: NDArray[np.intp], record_bytes: int) -> tuple[int, int]:
    reads = records = first = last = 0
    for unit in units.tolist():
        near = (unit - last - 1) * record_bytes <= GAP_BYTES
        if reads and near and (unit - first + 1) * record_bytes <= READ_BYTES:
            records += unit - last
        else:
            reads, records, first = reads + 1, records + 1, unit
        last = unit
    return reads, records
