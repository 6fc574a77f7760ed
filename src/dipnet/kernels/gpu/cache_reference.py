"""What the kernels of a cache on a GPU do, in plain torch: for CPUs and for tests, since it waits.

Shapes and meaning are those of `dipnet.kernels.gpu.cache`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from dipnet.kernels.gpu.cache import UnitCache


def access(
    cache: UnitCache, wanted: Tensor, alive: Tensor, first: int, past: int, most: int
) -> tuple[Tensor, ...]:
    """The parts of `Places`."""
    missing = wanted & (cache.slot_of < 0)
    if int(alive):
        _use(cache, wanted, missing)
    slots, streamed = cache.slot_of, missing & (cache.slot_of < 0)
    rows = torch.where(streamed, past + streamed.cumsum(0) - 1, first + slots).int()
    return (*_listed(wanted, rows, most), *_listed(missing, rows, most))


def _listed(chosen: Tensor, rows: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """The chosen units, their rows, and how many there are."""
    units = chosen.nonzero().flatten().int()
    room = (0, most - len(units))
    count = torch.tensor([len(units)], dtype=torch.int32, device=rows.device)
    return functional.pad(units, room), functional.pad(rows[units.long()], room), count


def _use(cache: UnitCache, wanted: Tensor, missing: Tensor) -> None:
    """One access: priorities grow, units come and go, as in `dipnet.cache.reference`."""
    cache.clock[1] += 1
    used = cache.clock[1] if cache.policy == "lru" else cache.priority + 1
    cache.priority.copy_(torch.where(wanted, used, cache.priority))
    resident = cache.slot_of >= 0
    comers = _ordered(missing, -cache.priority)
    goers = _ordered(resident & ~wanted, cache.priority)
    free = cache.slots - int(cache.clock[0])
    admitted = _admitted(cache.priority[comers].tolist(), cache.priority[goers].tolist(), free)
    comers = comers[:admitted].sort().values
    goers = goers[: max(0, admitted - free)].sort().values
    empty = torch.arange(cache.slots - free, cache.slots, device=wanted.device)
    places = torch.cat([empty.int(), cache.slot_of[goers]])[:admitted]
    for units, slots, factor in ((goers, -1, cache.gamma), (comers, places, 1.0)):
        cache.slot_of[units] = slots
        cache.factor[units] = factor
    cache.clock[0] += min(free, admitted)
    found = [int((wanted & resident).sum()), int(missing.sum()), admitted]
    cache.counts.add_(torch.tensor(found, device=wanted.device))


def _ordered(chosen: Tensor, priority: Tensor) -> Tensor:
    """The chosen units by priority, the lowest unit first among equals."""
    units = chosen.nonzero().flatten()
    return units[priority[units].sort(stable=True).indices]


def _admitted(comers: list[int], goers: list[int], free: int) -> int:
    """How many of the misses find a place, given their priorities and those of the victims."""
    for number, priority in enumerate(comers):
        if number >= free and (number - free >= len(goers) or priority < goers[number - free]):
            return number
    return len(comers)


def fetch(
    source: Tensor,
    units: Tensor,
    rows: Tensor,
    count: Tensor,
    into: Tensor,
    scales: tuple[Tensor, Tensor] | None,
) -> None:
    """Copy the records at ``units`` to ``rows``, and their scales."""
    valid = int(count)
    taken, places = units[:valid].long(), rows[:valid].long()
    into[places] = source[taken.to(source.device)].to(into.device)
    if scales is not None:
        scales[1][places] = scales[0][taken]
