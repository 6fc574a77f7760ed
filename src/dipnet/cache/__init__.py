"""Which units of a site hold a slot of memory: the cache's rules, and the choice of its backend.

Knows ids only: no weights, no tensors, no model. `reference` says what a cache does, the native
one (`src/dipnet/csrc/cache.cpp`) does the same to the slot. An explicitly requested backend is
what is made, or `BackendError` is raised; only "auto" chooses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dipnet.cache import reference
from dipnet.errors import BackendError, InputError

try:
    from dipnet import _native
except ImportError:  # a source tree whose extension was never built
    _BUILT = False
else:
    _BUILT = True

BACKENDS = ("auto", "reference", "native")
POLICIES = ("lru", "lfu")


class Cache(Protocol):
    """The cache of one site, empty at first; the rules are in `dipnet.cache.reference`.

    The arrays are views of the cache's own state: they follow it, and are not to be written.
    """

    @property
    def units(self) -> int:
        """The number of units that can be wanted."""

    @property
    def slots(self) -> int:
        """The number of units that can be resident."""

    @property
    def resident(self) -> NDArray[np.bool_]:
        """(units,) whether a unit holds a slot."""

    @property
    def slot_of(self) -> NDArray[np.int32]:
        """(units,) the slot of a unit, -1 when it holds none."""

    @property
    def unit_in(self) -> NDArray[np.int32]:
        """(slots,) the unit in a slot, -1 when it is free."""

    @property
    def missed(self) -> NDArray[np.int32]:
        """The misses of the last access: those admitted in their order, then the others by unit."""

    def access(self, wanted: NDArray[np.bool_]) -> tuple[int, int, int]:
        """Use the (units,) wanted units: how many were hits, misses, and misses admitted."""

    def reset(self) -> None:
        """Back to the empty cache."""


@dataclass(frozen=True)
class CacheSettings:
    """How much of every site's units a cache holds, and what it evicts.

    ``share`` in 0..1 is of the units, rounded; ``policy`` is ``lru`` (the least recently used unit
    goes) or ``lfu`` (the least often used one). Raises InputError for anything else.
    """

    share: float
    policy: str = "lru"

    def __post_init__(self) -> None:
        number = isinstance(self.share, int | float) and not isinstance(self.share, bool)
        if not number or not 0 <= self.share <= 1:
            raise InputError(
                f"a cache's share must be in 0..1, got {self.share!r}: 0.5 holds half of each "
                "site's units"
            )
        check_policy(self.policy)

    def make(self, units: int, _site: tuple[int, str] | None = None) -> Cache:
        """The empty cache of a site of so many units."""
        return make_cache(units, round(self.share * units), self.policy)


@dataclass(frozen=True)
class CacheSlots:
    """The slots of each site's cache, by (layer, name), and what it evicts.

    A site with a slot for every unit needs no cache, and neither does one that is not named: all of
    it is in memory. Raises InputError for an unknown policy.
    """

    slots: Mapping[tuple[int, str], int]
    policy: str = "lru"

    def __post_init__(self) -> None:
        check_policy(self.policy)

    def make(self, units: int, site: tuple[int, str]) -> Cache | None:
        """The empty cache of a site of so many units; None where all are in memory."""
        slots = self.slots.get(site, units)
        return None if slots == units else make_cache(units, slots, self.policy)


def make_cache(units: int, slots: int, policy: str = "lru", backend: str = "auto") -> Cache:
    """An empty cache; every backend makes the same decisions.

    Raises InputError when slots are not in 0..units or the policy is unknown, BackendError when
    the backend is unknown or not built.
    """
    check_policy(policy)
    if not 0 <= slots <= units:
        raise InputError(f"slots must be between 0 and units = {units}, not {slots}")
    if backend not in BACKENDS:
        raise BackendError(f"no backend {backend!r}; there are: {', '.join(BACKENDS)}")
    if backend == "native" and not _BUILT:
        raise BackendError("backend 'native' is not built: run `pip install .`")
    if backend == "reference" or not _BUILT:
        return reference.Cache(units, slots, policy)
    return _native.Cache(units, slots, policy)


def check_policy(policy: str) -> str:
    """Return a policy that exists; else raise InputError."""
    if policy not in POLICIES:
        raise InputError(f"unknown cache policy {policy!r}; known: {', '.join(POLICIES)}")
    return policy


def check_integrity(cache: Cache) -> None:
    """Raise RuntimeError when a cache contradicts itself: a broken state is a bug, not an input."""
    unit_in, slot_of = np.asarray(cache.unit_in), np.asarray(cache.slot_of)
    taken = np.flatnonzero(unit_in >= 0)
    residents = np.flatnonzero(slot_of >= 0)
    if len(taken) != len(residents) or len(taken) > cache.slots:
        raise RuntimeError(f"{len(residents)} resident units hold {len(taken)} slots")
    if (taken >= len(taken)).any():
        raise RuntimeError("a slot is free below one that is taken")
    if (slot_of[unit_in[taken]] != taken).any():
        raise RuntimeError("a slot's unit holds another slot")
    if (np.asarray(cache.resident) != (slot_of >= 0)).any():
        raise RuntimeError("a unit is resident without a slot, or holds one and is not")
