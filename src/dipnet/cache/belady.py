"""The cache that knows the future: no other has more hits, so it is the bound for all of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from dipnet.cache.scratch import scratch_array
from dipnet.errors import InputError

Masks = Callable[[int, int], NDArray[np.bool_]]
"""(start, stop) -> (stop - start, units): what the accesses from ``start`` on want."""

Uses = NDArray[np.uint32]
"""(units,) the number of the access that wants a unit next."""

BLOCK = 128
"""Accesses whose next uses are in memory: 7 MiB of them for 14336 units."""


class Belady:
    """``slots`` slots for ``units`` units, empty at first; keeps what is wanted again the soonest.

    After an access it holds, of the residents and of what was wanted, those whose next use comes
    first, ties by the lowest unit. What was wanted may be passed by: it need not get a slot. One
    unit's stay from a use to the next is an interval of time, a hit is an interval that is held,
    and to drop the one that ends last whenever there are too many holds the most of them.

    ``masks`` tells all ``tokens`` accesses beforehand. A pass from the last to the first notes the
    next uses after every block in a temporary file; those inside a block are found when its first
    access comes. Raises InputError when there is no room for that file.
    """

    def __init__(self, units: int, slots: int, tokens: int, masks: Masks) -> None:
        if not 0 <= slots <= units:
            raise InputError(f"slots must be between 0 and units = {units}, not {slots}")
        self.units = units
        self.slots = slots
        self.tokens = tokens
        self.resident: NDArray[np.bool_] = np.zeros(units, np.bool_)
        self._masks = masks
        self._clock = 0
        self._after: Uses = np.empty((min(BLOCK, tokens), units), np.uint32)
        self._ends = scratch_array((-(-tokens // BLOCK), units), np.uint32)
        self._look_back()

    def access(self, wanted: NDArray[np.bool_]) -> tuple[int, int, int]:
        """Use the (units,) wanted units, those that ``masks`` told for this access.

        Returns how many were hits, misses, and misses admitted.
        """
        block, at = divmod(self._clock, BLOCK)
        if at == 0:
            self._note(block)
        self._clock += 1
        before = self.resident.copy()
        self._keep(before | wanted, self._after[at])
        hits = int(np.count_nonzero(wanted & before))
        admitted = int(np.count_nonzero(self.resident > before))
        return hits, int(np.count_nonzero(wanted)) - hits, admitted

    def _keep(self, candidates: NDArray[np.bool_], after: Uses) -> None:
        """Make those candidates resident whose next use comes first."""
        if np.count_nonzero(candidates) <= self.slots:
            self.resident[:] = candidates
            return
        if self.slots == 0:
            return
        order = _beyond(candidates) | after
        last = np.sort(order)[self.slots - 1]  # np.partition branches, and takes longer
        np.less(order, last, out=self.resident)
        tied = order == last
        places = self.slots - np.count_nonzero(self.resident)
        end = bisect_left(range(self.units), places, key=lambda n: np.count_nonzero(tied[:n]))
        self.resident[:end] |= tied[:end]

    def _look_back(self) -> None:
        """Note the units' next uses behind the end of every block; ``tokens`` stands for never."""
        upcoming: Uses = np.full(self.units, self.tokens, np.uint32)
        for block in reversed(range(len(self._ends))):
            self._ends[block] = upcoming
            for at, wanted in self._backwards(block):
                _use(upcoming, wanted, at)

    def _note(self, block: int) -> None:
        """Fill in the next uses after every access of a block."""
        upcoming = self._ends[block].copy()
        for at, wanted in self._backwards(block):
            self._after[at % BLOCK] = upcoming
            _use(upcoming, wanted, at)

    def _backwards(self, block: int) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        """The accesses of a block and what they want, the last one first."""
        start, stop = block * BLOCK, min((block + 1) * BLOCK, self.tokens)
        return zip(reversed(range(start, stop)), self._masks(start, stop)[::-1], strict=True)


def _use(upcoming: Uses, wanted: NDArray[np.bool_], at: int) -> None:
    """Wanted units are used at ``at``, which comes before all their other uses."""
    np.minimum(upcoming, _beyond(wanted) | np.uint32(at), out=upcoming)


def _beyond(mask: NDArray[np.bool_]) -> Uses:
    """0 where ``mask`` is true, elsewhere more than any number of accesses.

    With it a choice among units is arithmetic. What branches at every unit (`np.where`, boolean
    indices, `np.flatnonzero`) takes many times as long: no processor foresees a mask.
    """
    return mask.astype(np.uint32) - np.uint32(1)
