"""The cache in plain Python: the rules that every other backend follows, to the slot."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_NONE = -1


class Cache:
    """``slots`` slots of memory for ``units`` units, empty at first.

    An access wants a set of units. Those that are resident are hits, the others misses. Every
    wanted unit's priority grows, resident or not: under ``lru`` it is the number of the access
    that wanted it last, under ``lfu`` how many have wanted it. Then, in this order:

    1. Misses are considered from the highest priority down, ties by the lowest unit. (Under LRU
       all of an access are tied.)
    2. They take the free slots, the lowest first.
    3. They take the slots of the residents that are *not* wanted now, from the lowest priority up,
       ties by the lowest unit; under LFU only while the miss's priority is not below the victim's.
    4. Misses that are left are streamed past the cache: used, and not kept.

    So a unit that is wanted and resident is never evicted. With every unit wanted each time, the
    first ``slots`` units stay for good, which is the best that a dense model can have.
    """

    def __init__(self, units: int, slots: int, policy: str) -> None:
        self.units = units
        self.slots = slots
        self.policy = policy
        self.slot_of: NDArray[np.int32] = np.empty(units, np.int32)
        self.unit_in: NDArray[np.int32] = np.empty(slots, np.int32)
        self.resident: NDArray[np.bool_] = np.empty(units, np.bool_)
        self.priority: NDArray[np.int64] = np.empty(units, np.int64)
        self.reset()

    def reset(self) -> None:
        """Back to the empty cache."""
        self.clock = 0
        self.slot_of[:] = _NONE
        self.unit_in[:] = _NONE
        self.resident[:] = False
        self.priority[:] = 0
        self.missed: NDArray[np.int32] = np.empty(0, np.int32)

    def access(self, wanted: NDArray[np.bool_]) -> tuple[int, int, int]:
        """Use the (units,) wanted units: how many were hits, misses, and misses admitted."""
        self.clock += 1
        hits = int((wanted & self.resident).sum())
        self.priority[wanted] = self.clock if self.policy == "lru" else self.priority[wanted] + 1
        misses = np.flatnonzero(wanted & ~self.resident)
        ordered = misses[np.argsort(-self.priority[misses], kind="stable")]
        victims = np.flatnonzero(self.resident & ~wanted)
        victims = victims[np.argsort(self.priority[victims], kind="stable")]
        free = np.flatnonzero(self.unit_in == _NONE)
        admitted = 0
        for unit, slot in zip(ordered, [*free, *self.slot_of[victims]], strict=False):
            if not self._may_take(unit, slot):
                break
            self._place(unit, slot)
            admitted += 1
        self.missed = np.r_[ordered[:admitted], np.sort(ordered[admitted:])].astype(np.int32)
        return hits, len(misses), admitted

    def _may_take(self, unit: int, slot: int) -> bool:
        """Whether a miss may have a slot that is free or a victim's."""
        held = self.unit_in[slot]
        if held == _NONE or self.policy == "lru":
            return True
        return bool(self.priority[unit] >= self.priority[held])

    def _place(self, unit: int, slot: int) -> None:
        """Put a unit into a slot, in the place of the unit that holds it."""
        held = self.unit_in[slot]
        if held != _NONE:
            self.slot_of[held] = _NONE
            self.resident[held] = False
        self.unit_in[slot] = unit
        self.slot_of[unit] = slot
        self.resident[unit] = True
