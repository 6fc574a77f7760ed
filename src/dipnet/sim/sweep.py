"""Scenarios × devices: what is swept, and what a trace comes to in each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dipnet.errors import InputError
from dipnet.sim.device import Device
from dipnet.sim.replay import Progress
from dipnet.sim.scenario import Figures, Needs, Run, Scenario, cache_slots, check_device, run
from dipnet.sim.shape import ModelShape
from dipnet.sim.sizes import unit_bytes
from dipnet.sim.target import Key, Target, own_target, same_depth, stretched
from dipnet.sim.trace import Trace, TraceSite
from dipnet.store.geometry import Weights
from dipnet.units import parse_size

DENSE = "dense"
DEFAULT_POLICY = "lfu"


@dataclass(frozen=True)
class Memory:
    """An amount of memory: ``size`` bytes, or that share of what holds the whole model."""

    size: float
    relative: bool = False

    def bytes(self, whole: int) -> int:
        """Bytes for a model that takes ``whole`` bytes with everything in memory."""
        return int(self.size * whole) if self.relative else int(self.size)


def parse_memory(text: str) -> Memory:
    """Read ``4GiB`` or ``50%`` (of what the model takes); InputError for anything else."""
    if not text.strip().endswith("%"):
        return Memory(parse_size(text))
    try:
        share = float(text.strip()[:-1]) / 100
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise InputError(f"{text!r} is no share of a model: write 50% or a size such as 4GiB")
    return Memory(share, relative=True)


@dataclass(frozen=True)
class Asked:
    """A method as it was asked for, with its density and γ, where it has them."""

    label: str
    density: float | None = None
    gamma: float | None = None

    @property
    def line(self) -> str:
        """Its name in tables and pictures, with γ where that is not in it."""
        shown = self.gamma is None or "cache_aware" in self.label
        return self.label if shown else f"{self.label}, γ = {self.gamma:g}"


@dataclass(frozen=True)
class Outcome:
    """A row: one method in one scenario on one device; the perplexity where it was measured."""

    asked: Asked
    scenario: Scenario
    device: Device
    figures: Figures
    perplexity: float | None


@dataclass(frozen=True)
class Grid:
    """What is swept, and the model that it is swept for.

    Without ``memories`` it is what the smallest device has, without ``policies`` LFU. With a
    ``shape`` a trace's statistics are stretched over that.
    """

    devices: Sequence[Device]
    memories: Sequence[Memory]
    policies: Sequence[str]
    weights: Weights
    shape: ModelShape | None = None
    look_ahead: bool = True

    def target(self, shape: ModelShape, sites: Sequence[TraceSite], added: int = 0) -> Target:
        """What is simulated of a model with masks at ``sites``; none for the dense model.

        Deciding them reads ``added`` numbers of the method's own.
        """
        if self.shape is None:
            return own_target(shape, sites, added)
        return stretched(shape, sites, self.shape, added)

    def needs(self, shape: ModelShape, context: int) -> Needs:
        """What the dense model takes."""
        return Needs.of(self.target(shape, ()), self.weights, context)

    def scenarios(self, shape: ModelShape, context: int) -> list[Scenario]:
        """Every memory with every policy, checked before anything is run.

        Raises InputError for a memory that is too small, or more than a device has.
        """
        dense = self.target(shape, ())
        whole = self.needs(shape, context).total
        default = Memory(min(device.dram.capacity for device in self.devices))
        sizes = dict.fromkeys(memory.bytes(whole) for memory in self.memories or [default])
        made = [
            Scenario(size, policy, self.weights, context)
            for size in sizes
            for policy in self.policies or (DEFAULT_POLICY,)
        ]
        for scenario in made:
            cache_slots(dense, scenario)
            for device in self.devices:
                check_device(device, dense, scenario)
        return made

    def outcomes(self, asked: Asked, made: Run, perplexity: float | None) -> Iterator[Outcome]:
        """What a run comes to on every device."""
        for device in self.devices:
            figures = made.on(device, look_ahead=self.look_ahead)
            yield Outcome(asked, made.scenario, device, figures, perplexity)


def simulate_trace(trace: Trace, grid: Grid, progress: Progress | None = None) -> Iterator[Outcome]:
    """The dense model, then the trace, in every scenario on every device.

    Masks that a cache decided are replayed with that cache only. Raises InputError for what does
    not fit, and when such a trace is to be swept over memories or policies.
    """
    target = grid.target(trace.shape, trace.sites, trace.added_weights)
    context = longest_sequence(trace)
    gamma = trace.cache.gamma if trace.cache else None
    if trace.cache:
        slots = _recorded_slots(trace, target)
        scenarios = [_recorded_scenario(trace, target, grid, slots, context)]
    else:
        scenarios = grid.scenarios(trace.shape, context)
    yield from simulate_dense(trace.shape, grid, scenarios, trace.tokens)
    for scenario in scenarios:
        given = slots if trace.cache else None
        made = run(target, scenario, trace, slots=given, progress=progress)
        yield from grid.outcomes(Asked(trace.method, None, gamma), made, None)


def simulate_dense(
    shape: ModelShape,
    grid: Grid,
    scenarios: Sequence[Scenario],
    tokens: int,
    perplexity: float | None = None,
) -> Iterator[Outcome]:
    """The dense model in every memory: the first records stay, whatever the policy but "none"."""
    target = grid.target(shape, ())
    chosen: dict[int, Scenario] = {}
    for scenario in sorted(scenarios, key=lambda scenario: scenario.policy == "none"):
        chosen.setdefault(scenario.memory, scenario)
    for scenario in chosen.values():
        made = run(target, scenario, None, tokens=tokens)
        yield from grid.outcomes(Asked(DENSE), made, perplexity)


def longest_sequence(trace: Trace) -> int:
    """Tokens of the trace's longest sequence."""
    return int(np.diff(np.append(trace.starts, trace.tokens)).max())


def _recorded_slots(trace: Trace, target: Target) -> dict[Key, int]:
    """The caches that the trace's masks were decided with, as shares of the target's units."""
    assert trace.cache is not None
    held = {
        site.key: slots / site.units
        for site, slots in zip(trace.sites, trace.cache.slots, strict=True)
    }
    found = {site.key: site.units for site in target.whole}
    for site in target.sites:
        layer = same_depth(site.layer, target.shape.layers, trace.shape.layers)
        found[site.key] = round(held[layer, site.name] * site.units)
    return found


def _recorded_scenario(
    trace: Trace, target: Target, grid: Grid, slots: dict[Key, int], context: int
) -> Scenario:
    """The memory that the recorded caches take."""
    assert trace.cache is not None
    if grid.memories or set(grid.policies) - {trace.cache.policy}:
        raise InputError(
            f"a cache ({trace.cache.policy}) decided the masks of this trace and they fit no "
            "other: leave out --memory and --policy, or simulate from the model, which decides "
            "them anew for every memory"
        )
    cached = sum(slots[site.key] * unit_bytes(site, grid.weights) for site in target.cached)
    memory = Needs.of(target, grid.weights, context).fixed + cached
    return Scenario(memory, trace.cache.policy, grid.weights, context)
