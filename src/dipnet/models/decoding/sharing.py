"""How the sequences of a batch read the weights of one site: decided once, from shapes.

Each may read what it keeps by a list of its own; all may share the list of what any of them keeps,
so that a weight is read once and tensor cores multiply it; or all weights are read, and what a
sequence drops is multiplied by zero. The values are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Way = Literal["own", "union", "whole"]
WAYS: tuple[Way, ...] = ("own", "union", "whole")
OF_HEADS: tuple[Way, ...] = ("union", "whole")
"""The ways of a batch to heads that are skipped: what one row lacks is completed for all."""

MOST_ROWS = 8
"""Sequences that are decoded together by the kernels; more of them run the reference."""

READ, READ_SHARED, READ_WHOLE = 3.75e6, 2.4e6, 4.3e6
"""Bytes in a microsecond: by own lists, by a shared one, and without a list. What two own lists
have in common costs as much as if nothing of it were in the GPU's cache."""
OF_ROW, OF_LIST, OF_UNIT = 0.8, 10.0, 0.003
"""Microseconds more for each own list but the first, for a shared one, and for each of the units
that it may list."""


def kept_together(rows: int, density: float) -> float:
    """The share of units that any of ``rows`` sequences keeps, where they choose independently."""
    return 1 - (1 - density) ** rows


def way(rows: int, density: float, units: int, size: float, among: Sequence[Way] = WAYS) -> Way:
    """The fastest way for ``rows`` sequences that keep a share of ``units``, of ``size`` bytes.

    The figures above are of one H200 (`benchmarks/batch_products.py`).
    """
    if rows == 1:
        return "own"
    microseconds: dict[Way, float] = {
        "own": rows * density * size / READ + OF_ROW * (rows - 1),
        "union": kept_together(rows, density) * size / READ_SHARED + OF_LIST + OF_UNIT * units,
        "whole": size / READ_WHOLE,
    }
    return min(among, key=lambda each: microseconds[each])
