"""Which records one read takes in: neighbours, and small gaps between them (docs/streaming.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    made = [list(reads(np.flatnonzero(row).tolist(), record_bytes)) for row in missed]
    counts = [(len(row), sum(last - first + 1 for first, last in row)) for row in made]
    return np.array(counts, np.int32).reshape(-1, 2)


def reads(units: Sequence[int], record_bytes: int) -> Iterator[tuple[int, int]]:
    """The first and the last unit of each read for missed ``units``, in their order."""
    if not units:
        return
    first = last = units[0]
    for unit in units[1:]:
        near = (unit - last - 1) * record_bytes <= GAP_BYTES
        if not near or (unit - first + 1) * record_bytes > READ_BYTES:
            yield first, last
            first = unit
        last = unit
    yield first, last
