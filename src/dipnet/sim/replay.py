"""A trace through caches: what decoding its tokens one by one would find in memory, and read.

The caches are those of `dipnet.cache`, and so are the engine's: for the same masks and slots the
counts are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from dipnet.cache import POLICIES as CACHE_POLICIES
from dipnet.cache import make_cache
from dipnet.cache.belady import BLOCK, Belady, Masks
from dipnet.cache.scratch import scratch_array
from dipnet.errors import InputError
from dipnet.registry import unknown
from dipnet.sim.sizes import is_streamed
from dipnet.store.reads import count_reads

if TYPE_CHECKING:
    from dipnet.sim.trace import TraceCache, TraceSite

POLICIES = ("none", *CACHE_POLICIES, "belady")
"""What a cache keeps: nothing, the caches' own rules, and the best for the trace's future."""
Progress = Callable[[int, int], object]
"""Called with the tokens done so far and in all, each counted once a site."""


class Masked(Protocol):
    """What a replay needs of a trace; `dipnet.sim.trace.Trace` has it."""

    @property
    def tokens(self) -> int:
        """The number of tokens."""

    @property
    def sites(self) -> Sequence[TraceSite]:
        """Where masks were decided."""

    @property
    def cache(self) -> TraceCache | None:
        """The cache that the masks were decided with, where they depend on one."""

    def masks(self, site: int, start: int, stop: int) -> NDArray[np.bool_]:
        """(stop - start, units) what some tokens wanted at a site, by its position."""


class _Cache(Protocol):
    """What `make_cache` and `Belady` make, as far as a replay goes."""

    @property
    def resident(self) -> NDArray[np.bool_]:
        """(units,) what is in memory; a view that follows it."""

    def access(self, wanted: NDArray[np.bool_]) -> tuple[int, int, int]:
        """Use the (units,) wanted units: how many were hits, misses, and misses admitted."""


@dataclass(frozen=True)
class SiteCounts:
    """What the tokens did at one site, (tokens,) int32 each.

    Of the units that a token wanted ``hits`` were in memory and ``misses`` not; ``admitted``
    misses were kept, the others used and given up. The misses took ``reads`` reads, of
    ``records`` records: what lies between misses that are near is read, too.
    """

    hits: NDArray[np.int32]
    misses: NDArray[np.int32]
    admitted: NDArray[np.int32]
    reads: NDArray[np.int32]
    records: NDArray[np.int32]


@dataclass(frozen=True)
class Replay:
    """What a replay found; ``slots``, ``record_bytes`` and ``counts`` belong to the ``sites``."""

    sites: tuple[TraceSite, ...]
    policy: str
    slots: tuple[int, ...]
    record_bytes: tuple[int, ...]
    tokens: int
    counts: tuple[SiteCounts, ...]

    @property
    def hits(self) -> int:
        """Wanted units that were in memory, over all sites and tokens."""
        return sum(int(counts.hits.sum(dtype=np.int64)) for counts in self.counts)

    @property
    def misses(self) -> int:
        """Wanted units that had to be read."""
        return sum(int(counts.misses.sum(dtype=np.int64)) for counts in self.counts)

    @property
    def bytes(self) -> int:
        """Bytes that were read."""
        read = [int(counts.records.sum(dtype=np.int64)) for counts in self.counts]
        return sum(n * size for n, size in zip(read, self.record_bytes, strict=True))

    def hit_rate(self, name: str | None = None) -> float | None:
        """The share of the wanted units' weights that was in memory, of the sites of one name or
        of all; None when none was wanted."""
        hits = wanted = 0
        for site, counts in zip(self.sites, self.counts, strict=True):
            if name in (None, site.name):
                size = sum(site.matrices.values())
                hits += size * int(counts.hits.sum(dtype=np.int64))
                wanted += size * int((counts.hits + counts.misses).sum(dtype=np.int64))
        return hits / wanted if wanted else None


def replay(
    trace: Masked,
    slots: Sequence[int],
    policy: str,
    record_bytes: Sequence[int],
    progress: Progress | None = None,
) -> Replay:
    """The trace through a cache at every site, with so many ``slots`` each, empty at first.

    The ``record_bytes`` of each site decide which misses one read takes in (`sizes.unit_bytes`).
    As in the engine, a site whose units all have a slot is filled before the first token. Under
    "none" nothing that can be streamed has a slot, whatever ``slots`` says. Tokens are taken in
    blocks and counts go to a temporary file, so that memory does not grow with the trace.

    Raises InputError when the policy is unknown, the slots do not fit the sites, there is no room
    for the temporary files, or a cache-aware method decided the masks with another cache.
    """
    _check(trace, slots, policy, record_bytes)
    held = [_held(site, given, policy) for site, given in zip(trace.sites, slots, strict=True)]
    room = scratch_array((len(held), 5, trace.tokens), np.int32)
    for at, (site, given) in enumerate(zip(trace.sites, held, strict=True)):
        masks = partial(trace.masks, at)
        cache = _cache(site.units, given, policy, trace.tokens, masks)
        for done in _replay_site(cache, masks, record_bytes[at], room[at]):
            if progress is not None:
                progress(at * trace.tokens + done, len(held) * trace.tokens)
    counts = tuple(SiteCounts(*each) for each in room)
    sizes = tuple(record_bytes)
    return Replay(tuple(trace.sites), policy, tuple(held), sizes, trace.tokens, counts)


def _replay_site(
    cache: _Cache, masks: Masks, record_bytes: int, counts: NDArray[np.int32]
) -> Iterator[int]:
    """Fill in the (5, tokens) counts of a site; yields the tokens done after every block."""
    tokens = counts.shape[1]
    resident = cache.resident
    for start in range(0, tokens, BLOCK):
        stop = min(start + BLOCK, tokens)
        wanted = masks(start, stop)
        missed = np.empty_like(wanted)
        found = np.empty((stop - start, 3), np.int32)
        for at, row in enumerate(wanted):
            np.greater(row, resident, out=missed[at])
            found[at] = cache.access(row)
        counts[:3, start:stop] = found.T
        counts[3:, start:stop] = count_reads(missed, record_bytes=record_bytes).T
        yield stop


def _cache(units: int, slots: int, policy: str, tokens: int, masks: Masks) -> _Cache:
    if slots == units:
        cache = make_cache(units, slots)
        cache.access(np.ones(units, np.bool_))
        return cache
    if policy == "belady":
        return Belady(units, slots, tokens, masks)
    return make_cache(units, slots, "lru" if policy == "none" else policy)


def _held(site: TraceSite, slots: int, policy: str) -> int:
    return 0 if policy == "none" and is_streamed(site) else int(slots)


def _check(trace: Masked, slots: Sequence[int], policy: str, record_bytes: Sequence[int]) -> None:
    if policy not in POLICIES:
        raise unknown("cache policy", policy, POLICIES)
    for name, each in (("slots", slots), ("record_bytes", record_bytes)):
        if len(each) != len(trace.sites):
            raise InputError(
                f"{name} are for {len(each)} sites and the trace has {len(trace.sites)}: give a "
                "number for each of its sites"
            )
    for site, given in zip(trace.sites, slots, strict=True):
        if not 0 <= given <= site.units:
            raise InputError(
                f"{site.name} of layer {site.layer} cannot have {given} slots: it has "
                f"{site.units} units"
            )
    recorded = trace.cache
    if recorded and (policy, tuple(slots)) != (recorded.policy, tuple(recorded.slots)):
        raise InputError(
            "the masks of this trace were decided with a cache and fit no other: replay them with "
            f"policy {recorded.policy} and the trace's own slots, or simulate from the model, "
            "which decides them anew"
        )
