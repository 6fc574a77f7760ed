"""One model in one memory, on any device: memory divided, masks replayed, tokens timed.

The masks come from a trace, of the model itself or of another one that is stretched over its shape
(`dipnet.sim.target`). Without a trace it is the dense model, which wants everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dipnet.errors import InputError
from dipnet.sim.clock import SiteLoad, flash_bytes, seconds
from dipnet.sim.device import Device
from dipnet.sim.replay import Progress, SiteCounts, replay
from dipnet.sim.shape import ModelShape
from dipnet.sim.sizes import (
    Split,
    divide_slots,
    is_streamed,
    kv_bytes,
    pinned_bytes,
    unit_bytes,
)
from dipnet.sim.target import Key, Target, place, same_depth
from dipnet.sim.trace import Trace, TraceSite
from dipnet.store.geometry import Weights
from dipnet.store.reads import READ_BYTES
from dipnet.units import size_text

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Scenario:
    """How a model is held: what decides hits and misses, on whatever device.

    ``memory`` are the bytes for weights, caches, keys and values; ``context`` the tokens that keys
    and values are reserved for. ``policy`` is one of `dipnet.sim.replay.POLICIES`, ``split`` the
    rule by which the caches share what is left for them.
    """

    memory: int
    policy: str
    weights: Weights
    context: int
    split: Split = "wanted"


@dataclass(frozen=True)
class Figures:
    """What a scenario comes to, in the mean over the tokens; the caches begin empty.

    ``used`` are the bytes of memory that are filled, of them ``cached`` by the sites' caches.
    ``density`` is the share of the MLP's weights that a token wants, ``hit_rate`` the share of
    their bytes that was in memory; ``hit_rates`` is by the name of the site, in units;
    both are None where nothing was wanted. ``bytes_per_token`` is what is read from Flash.
    """

    used: int
    cached: int
    density: float
    hit_rate: float | None
    hit_rates: dict[str, float | None]
    bytes_per_token: float
    tokens_per_second: float
    tokens: int


@dataclass(frozen=True)
class Needs:
    """Bytes of a model: what is always in memory, keys and values, the MLP's records."""

    pinned: int
    keys: int
    records: int

    @classmethod
    def of(cls, target: Target, weights: str, context: int) -> Needs:
        """The needs of a target with keys and values for ``context`` tokens."""
        records = sum(site.units * unit_bytes(site, weights) for site in target.cached)
        pinned = pinned_bytes(target.shape, weights) + target.added_bytes
        return cls(pinned, kv_bytes(target.shape, context), records)

    @property
    def fixed(self) -> int:
        """Bytes that no cache can do without."""
        return self.pinned + self.keys

    @property
    def total(self) -> int:
        """Bytes with everything in memory."""
        return self.fixed + self.records


def cache_slots(target: Target, scenario: Scenario) -> dict[Key, int]:
    """Slots of each streamed site when a scenario's memory is divided among them.

    Raises InputError when the memory is smaller than what is needed without caches.
    """
    needs = Needs.of(target, scenario.weights, scenario.context)
    if scenario.memory < needs.fixed:
        raise InputError(
            f"{size_text(scenario.memory)} of memory is too little for {target.shape.name}: "
            f"attention, the head,{_added(target)} and keys and values for {scenario.context} "
            f"tokens take {size_text(needs.fixed)} of the {size_text(needs.total)} that hold all "
            "of it; give more, or a shorter context"
        )
    fits = scenario.memory >= needs.total  # to the byte, where shares are rounded
    budget = None if fits else scenario.memory - needs.fixed
    if scenario.policy == "none":
        budget = 0
    divided = divide_slots(target.cached, scenario.weights, budget, scenario.split)
    return {site.key: slots for site, slots in zip(target.cached, divided, strict=True)}


def _added(target: Target) -> str:
    """What a method adds to what is always in memory, in a sentence."""
    return f" {size_text(target.added_bytes)} of the method's own" if target.added else ""


def check_device(device: Device, target: Target, scenario: Scenario) -> None:
    """Raise InputError when a device lacks the memory, or the model does not fit its Flash."""
    if scenario.memory > device.dram.capacity:
        raise InputError(
            f"{size_text(scenario.memory)} of memory is more than {device.name} has: "
            f"{size_text(device.dram.capacity)}"
        )
    needs = Needs.of(target, scenario.weights, scenario.context)
    if needs.pinned + needs.records > device.flash.capacity:
        raise InputError(
            f"{target.shape.name} takes {size_text(needs.pinned + needs.records)} of Flash, "
            f"{device.name} has {size_text(device.flash.capacity)}: take another device or smaller "
            "weights"
        )


def source_slots(
    target: Target, slots: dict[Key, int], layers: int, sites: tuple[TraceSite, ...]
) -> list[int]:
    """The slots of a recorded model's ``sites``: as large a share of the units as in the target.

    ``layers`` are the recorded model's. Attention's sites are held.
    """
    units = {site.key: site.units for site in target.sites}
    found = []
    for site in sites:
        key = same_depth(site.layer, layers, target.shape.layers), site.name
        share = slots[key] / units[key] if is_streamed(site) else 1.0
        found.append(round(share * site.units))
    return found


@dataclass(frozen=True)
class Run:
    """A scenario whose hits and misses are known, to be timed on devices.

    ``loads`` are in the order of computation; ``positions`` (tokens,) the tokens before each one in
    its sequence; ``recall`` what the trace knows of guesses.
    """

    target: Target
    scenario: Scenario
    slots: dict[Key, int]
    loads: list[SiteLoad]
    positions: Array
    recall: Mapping[str, float] | None

    def on(self, device: Device, *, look_ahead: bool = True) -> Figures:
        """What it comes to on a device; ``look_ahead`` matters where `dipnet probe` measured it.

        Raises InputError when the device lacks the memory or the Flash.
        """
        check_device(device, self.target, self.scenario)
        took = seconds(
            device,
            self.target.shape,
            self.loads,
            context=self.positions,
            look_ahead=look_ahead,
            recall=self.recall,
            added_bytes=self.target.added_bytes,
        )
        needs = Needs.of(self.target, self.scenario.weights, self.scenario.context)
        streamed = [load for load in self.loads if is_streamed(load.site)]
        cached = sum(self.slots[load.site.key] * load.record_bytes for load in streamed)
        wanted = sum(float(load.wanted_bytes.sum()) for load in streamed)
        missed = sum(float(load.missed_bytes.sum()) for load in streamed)
        return Figures(
            used=needs.fixed + cached,
            cached=cached,
            density=_density(self.target.shape, streamed),
            hit_rate=1 - missed / wanted if wanted else None,
            hit_rates=_by_name(streamed),
            bytes_per_token=sum(float(flash_bytes(device, load).sum()) for load in streamed)
            / len(took),
            tokens_per_second=len(took) / float(took.sum()),
            tokens=len(took),
        )


def run(
    target: Target,
    scenario: Scenario,
    trace: Trace | None,
    *,
    tokens: int | None = None,
    sequence: int | None = None,
    slots: dict[Key, int] | None = None,
    progress: Progress | None = None,
) -> Run:
    """Replay a trace in a scenario; without a trace the dense model, for so many ``tokens``.

    Those are of sequences of so many, by default as many as keys and values are kept for. ``slots``
    are `cache_slots`, unless the caches are given. Raises InputError for too little memory, and for
    a trace that another cache decided.
    """
    slots = cache_slots(target, scenario) if slots is None else slots
    tokens = trace.tokens if trace else tokens
    if not tokens:
        raise InputError("there is no token to simulate: give a longer text")
    loads = list(_whole_loads(target, scenario, slots, tokens))
    if trace:
        loads += _masked_loads(target, scenario, slots, trace, progress)
    loads.sort(key=lambda load: place(load.site))
    recall = trace.recall if trace else None
    positions = _positions(trace, tokens, sequence or scenario.context)
    return Run(target, scenario, slots, loads, positions, recall)


def _whole_loads(
    target: Target, scenario: Scenario, slots: dict[Key, int], tokens: int
) -> Iterator[SiteLoad]:
    """What no mask thins: the first records stay for good, every token reads the others."""
    for site in target.whole:
        held = slots[site.key]
        hits = np.full(tokens, float(held))
        if held < site.units:  # what fits whole is read before the first token
            hits[0] = 0.0
        misses = site.units - hits
        reads = _side_by_side(misses, unit_bytes(site, scenario.weights))
        yield SiteLoad(site, scenario.weights, hits, misses, reads, misses, masked=False)


def _side_by_side(records: Array, record_bytes: int) -> Array:
    """(tokens,) reads of so many records, all of them neighbours."""
    return np.ceil(records / max(1, READ_BYTES // record_bytes))


def _masked_loads(
    target: Target,
    scenario: Scenario,
    slots: dict[Key, int],
    trace: Trace,
    progress: Progress | None,
) -> Iterator[SiteLoad]:
    """What the trace's masks want, hit and miss, at the sizes of the target's sites."""
    theirs = source_slots(target, slots, trace.shape.layers, trace.sites)
    sizes = {at: unit_bytes(site, scenario.weights) for site, at in _sourced(target)}
    records = [sizes.get(at, unit_bytes(s, scenario.weights)) for at, s in enumerate(trace.sites)]
    counted = replay(trace, theirs, scenario.policy, records, progress)
    for site, at in _sourced(target):
        yield _load(site, scenario.weights, counted.counts[at], trace.sites[at])


def _sourced(target: Target) -> Iterator[tuple[TraceSite, int]]:
    """The target's sites, and the number of the trace's site that stands for each."""
    return zip(target.sites, target.sources, strict=True)


def _load(site: TraceSite, weights: Weights, counts: SiteCounts, source: TraceSite) -> SiteLoad:
    """The counts of a recorded site, in a site of another number of units."""
    if site.units == source.units:  # as they are, in their file
        return SiteLoad(site, weights, counts.hits, counts.misses, counts.reads, counts.records)
    scale = site.units / source.units
    return SiteLoad(
        site,
        weights,
        counts.hits * scale,
        counts.misses * scale,
        counts.reads * scale,
        counts.records * scale,
    )


def _positions(trace: Trace | None, tokens: int, sequence: int) -> Array:
    """(tokens,) tokens before each in its sequence."""
    at = np.arange(tokens)
    if trace is None:
        return (at % sequence).astype(np.float64)
    begins = trace.starts[np.searchsorted(trace.starts, at, side="right") - 1]
    return (at - begins).astype(np.float64)


def _density(shape: ModelShape, loads: list[SiteLoad]) -> float:
    """The share of the MLP's weights that a token wants in the mean."""
    wanted = sum(
        load.site.weights_per_unit * float((load.hits + load.misses).mean()) for load in loads
    )
    return wanted / (shape.layers * shape.mlp_weights)


def _by_name(loads: list[SiteLoad]) -> dict[str, float | None]:
    hits: dict[str, float] = {}
    wanted: dict[str, float] = {}
    for load in loads:
        name, found = load.site.name, float(load.hits.sum())
        hits[name] = hits.get(name, 0.0) + found
        wanted[name] = wanted.get(name, 0.0) + found + float(load.misses.sum())
    return {name: hits[name] / wanted[name] if wanted[name] else None for name in hits}
