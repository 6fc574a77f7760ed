"""A cache on a GPU in Triton: `_access` decides, in one program; `_fetch` copies, in many.

Which misses are admitted follows from one number. Let t be the lowest priority for which the free
slots and the victims up to t are as many as the misses from t up: the best misses and the worst
victims meet there. It is found by bisection over priorities, as in csrc/cache.cpp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl
from torch import Tensor

from dipnet.kernels.gpu.common import after_previous, launch_options

if TYPE_CHECKING:
    from dipnet.kernels.gpu.cache import UnitCache

UNITS_A_WARP = 512
PROGRAMS, WORDS, COPY_WARPS = 1056, 512, 4
"""Programs that copy, and the words of four bytes that one of them has on its way."""


def access(
    cache: UnitCache, wanted: Tensor, alive: Tensor, first: int, past: int, most: int
) -> tuple[Tensor, ...]:
    """The parts of `Places`."""
    lists, counts = cache.slot_of.new_empty(4, most), cache.slot_of.new_empty(2)
    size = triton.next_power_of_2(cache.units)
    _access[(1,)](
        wanted,
        alive,
        cache.slot_of,
        cache.priority,
        cache.clock,
        cache.counts,
        cache.factor,
        cache.slot_of.new_empty(max(1, cache.slots)),
        lists,
        counts,
        cache.units,
        cache.slots,
        cache.gamma,
        first,
        past,
        most,
        LRU=cache.policy == "lru",
        SIZE=size,
        **launch_options(max(1, min(32, size // UNITS_A_WARP)), wanted.device),
    )
    return lists[0], lists[1], counts[:1], lists[2], lists[3], counts[1:]


def fetch(
    source: Tensor,
    units: Tensor,
    rows: Tensor,
    count: Tensor,
    into: Tensor,
    scales: tuple[Tensor, Tensor] | None,
) -> None:
    """Copy the records at ``units`` to ``rows``, and their scales."""
    words = source.shape[1] // 4
    pieces = triton.cdiv(words, WORDS)
    block = 1 if scales is None else scales[0].shape[1]
    _fetch[(max(1, min(PROGRAMS, len(units) * pieces)),)](
        source.view(units.dtype),
        units,
        rows,
        count,
        into.view(units.dtype),
        *(scales or (None, None)),
        words,
        pieces,
        BLOCK=block,
        BLOCK_SIZE=triton.next_power_of_2(block),
        WORDS=WORDS,
        **launch_options(COPY_WARPS, into.device),
    )


@triton.jit
def _before(numbers):
    """The sum of all numbers before each."""
    return tl.cumsum(numbers, 0) - numbers


@triton.jit(do_not_specialize=["first", "past", "slots", "most"])
def _access(
    wanted,
    alive,
    slot_of,
    priority,
    clock,
    counts,
    factor,
    freed,
    lists,
    listed,
    n,
    slots,
    gamma,
    first,
    past,
    most,
    LRU: tl.constexpr,
    SIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    unit = tl.arange(0, SIZE)
    inside = unit < n
    after_previous(OVERLAP)
    want = tl.load(wanted + unit, mask=inside, other=0) != 0
    slot = tl.load(slot_of + unit, mask=inside, other=-1)
    used = tl.load(priority + unit, mask=inside, other=0)
    counted = tl.load(alive) != 0
    taken, now = tl.load(clock), tl.load(clock + 1) + 1
    resident = slot >= 0
    miss, victim = want & (slot < 0), resident & (want == 0)
    used = tl.where(want, now if LRU else used + 1, used)

    free = slots - taken
    low, high = tl.full((), 0, tl.int32), now + 1
    while low < high:
        middle = (low + high) // 2
        leaving = (victim & (used <= middle)).to(tl.int32)
        coming = (miss & (used >= middle)).to(tl.int32)
        enough = free + tl.sum(leaving - coming, 0) >= 0
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle + 1)

    surely_in, maybe_in = miss & (used >= low), miss & (used == low - 1)
    surely_out, maybe_out = victim & (used < low), victim & (used == low)
    coming, leaving = tl.sum(surely_in.to(tl.int32), 0), tl.sum(surely_out.to(tl.int32), 0)
    admitted = tl.where(low > 0, tl.maximum(coming, free + leaving), coming)
    ties = _before((maybe_in.to(tl.int64) << 32) | maybe_out.to(tl.int64))
    comes = surely_in | (maybe_in & ((ties >> 32).to(tl.int32) < admitted - coming))
    leaves = surely_out | (maybe_out & (ties.to(tl.int32) < admitted - free - leaving))
    comes, leaves = comes & counted, leaves & counted

    # How many were chosen before each unit, 16 bits each: sums wrap, differences are right.
    both = want.to(tl.int64) | (miss.to(tl.int64) << 16)
    ranks = _before(both | (comes.to(tl.int64) << 32) | (leaves.to(tl.int64) << 48))
    place, missed = (ranks & 0xFFFF).to(tl.int32), ((ranks >> 16) & 0xFFFF).to(tl.int32)
    turn, gone = ((ranks >> 32) & 0xFFFF).to(tl.int32), ((ranks >> 48) & 0xFFFF).to(tl.int32)
    tl.store(freed + gone, slot, mask=leaves)
    tl.debug_barrier()  # every freed slot is written before one is taken
    inherited = tl.load(freed + turn - free, mask=comes & (turn >= free), other=0)
    given = tl.where(turn < free, taken + turn, inherited)
    slot = tl.where(comes, given, tl.where(leaves, -1, slot))
    row = tl.where(slot >= 0, first + slot, past + missed - turn)

    tl.store(lists + place, unit, mask=want & (place < most))
    tl.store(lists + most + place, row, mask=want & (place < most))
    tl.store(lists + 2 * most + missed, unit, mask=miss & (missed < most))
    tl.store(lists + 3 * most + missed, row, mask=miss & (missed < most))
    wants, misses = tl.sum(want.to(tl.int32), 0), tl.sum(miss.to(tl.int32), 0)
    tl.store(lists + unit, 0, mask=(unit >= wants) & (unit < most))
    tl.store(lists + most + unit, 0, mask=(unit >= wants) & (unit < most))
    tl.store(listed, tl.minimum(wants, most))
    tl.store(listed + 1, tl.minimum(misses, most))
    if counted:
        tl.store(slot_of + unit, slot, mask=comes | leaves)
        tl.store(factor + unit, tl.where(comes, 1.0, gamma), mask=comes | leaves)
        tl.store(priority + unit, used, mask=want)
        tl.store(clock, taken + tl.minimum(free, admitted))
        tl.store(clock + 1, now)
        tl.store(counts, tl.load(counts) + wants - misses)
        tl.store(counts + 1, tl.load(counts + 1) + misses)
        tl.store(counts + 2, tl.load(counts + 2) + admitted)


@triton.jit
def _fetch(
    source,
    units,
    rows,
    count,
    into,
    scales,
    copied_scales,
    words,
    pieces,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WORDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    after_previous(OVERLAP)
    end = tl.load(count) * pieces
    for at in tl.range(tl.program_id(0), end, tl.num_programs(0)):
        unit = tl.load(units + at // pieces).to(tl.int64)
        row = tl.load(rows + at // pieces).to(tl.int64)
        word = at % pieces * WORDS + tl.arange(0, WORDS)
        inside = word < words
        read = tl.load(source + unit * words + word, mask=inside, other=0)
        tl.store(into + row * words + word, read, mask=inside)
        if scales is not None:  # noqa: SIM102 (known when compiled)
            if at % pieces == 0:
                of_block = tl.arange(0, BLOCK_SIZE)
                scale = tl.load(scales + unit * BLOCK + of_block, mask=of_block < BLOCK)
                tl.store(copied_scales + row * BLOCK + of_block, scale, mask=of_block < BLOCK)
