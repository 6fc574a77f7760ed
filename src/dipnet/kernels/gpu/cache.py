"""A cache of units in a GPU's memory, of records in the host's: decided and filled by the GPU.

The rules are those of `dipnet.cache.reference`: the same hits and misses, the same units resident
after every access, by the same policies. Only which of its slots a unit takes may differ, and
nothing depends on that. Nothing waits for the device, so that a CUDA graph holds a token with all
of its caches; the records of missing units are read by a kernel, from pinned memory.

Knows ids, and rows of bytes; knows no site, no method and no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dipnet.errors import InputError
from dipnet.kernels.gpu import cache_reference
from dipnet.kernels.gpu.choice import kernels_serve
from dipnet.kernels.gpu.weights import shape_text

MOST_UNITS = 1 << 16
"""Units of a cache: their numbers take 16 bits while they are counted."""


@dataclass(frozen=True, eq=False)
class UnitCache:
    """The state of one site's cache, on the device: ``slots`` slots for the units, empty at first.

    ``slot_of`` (units,) int32 is -1 where a unit is not resident; ``priority`` (units,) int32 is
    what the policy compares; ``clock`` (2,) int32 are the slots that are taken and the accesses so
    far; ``counts`` (3,) int64 the hits, the misses and the misses admitted. ``factor`` (units,)
    float32 is 1 where a unit is resident, ``gamma`` elsewhere: what a cache-aware selection
    multiplies scores with.
    """

    slots: int
    policy: str
    gamma: float
    slot_of: Tensor
    priority: Tensor
    clock: Tensor
    counts: Tensor
    factor: Tensor

    @property
    def units(self) -> int:
        """The number of units that can be wanted."""
        return len(self.slot_of)

    def reset(self) -> None:
        """Back to the empty cache, with nothing counted."""
        self.slot_of.fill_(-1)
        self.factor.fill_(self.gamma)
        for each in (self.priority, self.clock, self.counts):
            each.zero_()


class Places(NamedTuple):
    """Where the records of a token's units lie, (most,) int32 and (1,) int32 on the device.

    ``units`` are the wanted ones, ascending, and ``rows`` where each of them is; ``count`` of both
    are valid, and 0 follows. ``missed`` are those that have to be brought to ``missed_rows`` first,
    ``misses`` of them.
    """

    units: Tensor
    rows: Tensor
    count: Tensor
    missed: Tensor
    missed_rows: Tensor
    misses: Tensor


def make_cache(
    units: int, slots: int, policy: str, device: torch.device, gamma: float = 1.0
) -> UnitCache:
    """An empty cache on a device; `dipnet.cache` has checked the policy.

    Raises InputError when slots are not in 0..units, or there are too many units.
    """
    if not 0 <= slots <= units:
        raise InputError(f"slots must be between 0 and units = {units}, not {slots}")
    if units > MOST_UNITS:
        raise InputError(f"a cache on a GPU has {MOST_UNITS} units at most, not {units}")
    ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
    made = UnitCache(
        slots,
        policy,
        gamma,
        slot_of=torch.empty(units, **ints),
        priority=torch.empty(units, **ints),
        clock=torch.empty(2, **ints),
        counts=torch.empty(3, dtype=torch.int64, device=device),
        factor=torch.empty(units, dtype=torch.float32, device=device),
    )
    made.reset()
    return made


def access(
    cache: UnitCache,
    wanted: Tensor,
    alive: Tensor,
    *,
    first: int,
    past: int,
    most: int,
    backend: str = "auto",
) -> Places:
    """Use the (units,) bool ``wanted`` units of which there are ``most`` at most.

    Slot s is row ``first + s``; a unit that finds no slot is used from a row of its own, counted
    from ``past`` on, where there are ``most`` of them. Where (1,) int64 ``alive`` is 0 the cache
    stays as it is, and nothing is counted: all that is missing goes past it.

    Raises InputError for a mask of another shape, BackendError where the backend cannot serve.
    """
    if wanted.shape != cache.slot_of.shape or wanted.dtype != torch.bool:
        raise InputError(
            f"wanted must be torch.bool of shape ({cache.units},), not {shape_text(wanted)}"
        )
    kernels = _serving(backend, wanted, cache.slot_of)
    made: Places = Places(*kernels.access(cache, wanted.contiguous(), alive, first, past, most))
    return made


def fetch(
    source: Tensor,
    units: Tensor,
    rows: Tensor,
    count: Tensor,
    into: Tensor,
    scales: tuple[Tensor, Tensor] | None = None,
    *,
    backend: str = "auto",
) -> None:
    """Copy records: (n, width) bytes ``source`` at ``units`` to (m, width) ``into`` at ``rows``.

    Both lists are int32, (1,) ``count`` of them are valid. ``source`` may lie in pinned memory of
    the host, which the device then reads. ``scales`` are (n, block) float32 on the device and their
    (m, block) copies, which follow. A width is a multiple of 4.

    Raises InputError where records differ in size, BackendError where the backend cannot serve.
    """
    if source.shape[1:] != into.shape[1:] or source.shape[1] % 4:
        raise InputError(
            f"records must be of one size, a multiple of 4 bytes, not {shape_text(source)} and "
            f"{shape_text(into)}"
        )
    kernels = _serving(backend, units, into)
    kernels.fetch(source, units, rows, count, into, scales)


def _serving(backend: str, *tensors: Tensor) -> ModuleType:
    """The module that serves a call with these tensors."""
    if not kernels_serve(backend, *tensors):
        return cache_reference
    from dipnet.kernels.gpu import cache_kernels  # it imports triton

    return cache_kernels
