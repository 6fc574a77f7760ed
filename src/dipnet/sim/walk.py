"""A token's way through our engine, step by step, with the costs that a probe measured.

The steps and their order are those of docs/streaming.md; what overlaps there overlaps here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from dipnet.sim.device import EngineCosts, PerUnit, Tier
from dipnet.sim.groups import HEAD, Array, Group, Key
from dipnet.sim.shape import ModelShape
from dipnet.store.geometry import Weights

BATCH = 64
"""Records that the engine verifies and multiplies together when they have arrived."""
HELD = 256
"""Records in memory that it multiplies together while others arrive."""
RECALL = 0.7
"""Share of the guesses that are right, where nobody measured it."""


def late(work: Array | float, wake: float, threads: int) -> Array:
    """Seconds that products of ``work`` seconds of all threads take more, when all but one sleep.

    Until the others ``wake``, one computes alone.
    """
    return np.asarray((1 - 1 / threads) * np.minimum(wake, threads * np.asarray(work)))


def parts(hits: Array, misses: Array) -> Array:
    """In how many parts such records are multiplied, in the mean, when some of them arrive."""
    return hits / HELD + misses / BATCH


class Walk:
    """One walk for all tokens at once: every time is (tokens,) seconds from a token's beginning."""

    def __init__(
        self,
        flash: Tier,
        costs: EngineCosts,
        shape: ModelShape,
        weights: Weights,
        groups: Mapping[Key, Group],
        past: Array,
    ) -> None:
        self.flash = flash
        self.costs = costs
        self.shape = shape
        self.groups = groups
        self.attending = costs.key * shape.kv_width * past
        self.ordered = weights == "bf16"
        self.now = np.zeros_like(past)
        self.disk = np.zeros_like(past)  # when it has done all that it was asked for
        resident = sum(float((g.hits * g.record_bytes).mean()) for g in groups.values())
        largest = max(group.record_bytes for group in groups.values())
        self.held = costs.multiplying(weights, resident)
        self.arrived = costs.multiplying(weights, BATCH * largest)
        self.frame_bytes = costs.frame_bytes // 2 // largest * largest  # what guesses may take
        self.rate = self._rate()

    def _rate(self) -> float:
        """Bytes/s of wanted records that the disk brings while it reads."""
        streamed = [group for group in self.groups.values() if group.streamed]
        asked = [group.read(group.misses) for group in streamed]
        took = sum(float(self.flash.seconds(reads, size).sum()) for reads, size in asked)
        wanted = sum(float((group.misses * group.record_bytes).sum()) for group in streamed)
        return wanted / took if took else 0.0

    def token(self, recall: Mapping[str, float] | None) -> Array:
        """(tokens,) seconds; ``recall`` by the sites' name when it reads ahead, None: it does not.

        A walker walks once.
        """
        self.recall = recall
        self.now += self.costs.token + self.costs.logit * self.shape.vocabulary
        for layer in range(self.shape.layers):
            self._layer(layer)
        if head := self.groups.get((self.shape.layers, HEAD)):
            self._call(head)
        return self.now

    def _layer(self, layer: int) -> None:
        costs, shape = self.costs, self.shape
        reads = self.groups.get((layer, "mlp.in")) or self.groups.get((layer, "mlp.neuron"))
        hidden = self.groups.get((layer, "mlp.hidden"))
        if reads:
            self._read_ahead(reads, self._before_mlp(layer, reads))
        self._call(self.groups[layer, "attn.in"])
        self.now += costs.layer + costs.number * shape.width + self.attending
        self._call(self.groups[layer, "attn.out"])
        if reads:
            self._call(reads, hidden)
        self.now += costs.number * shape.matrices["down"][1]
        if hidden:
            follows = self.groups.get((layer + 1, "mlp.in"))
            self._call(hidden, None if follows is None or follows.masked else follows)

    def _before_mlp(self, layer: int, reads: Group) -> Array:
        """Seconds from the guess of the MLP's input to its request: attention."""
        inside = (self.groups[layer, name] for name in ("attn.in", "attn.out"))
        taken = self.costs.layer + self.costs.number * self.shape.width + self.attending
        return taken + sum(self._all_held(group) for group in inside) + self._selecting(reads)

    def _selecting(self, group: Group) -> float:
        return _of(self.costs.selection, group) if group.masked else 0.0

    def _late(self, group: Group) -> Array:
        work = self._multiplying(group, group.hits + group.misses, self.held)
        return late(work, self.costs.wake, self.costs.threads)

    def _calling(self, group: Group) -> Array | float:
        """A product besides its columns, in parts where records arrive or the order counts."""
        if self.ordered:
            return self.costs.call * math.ceil(group.units / BATCH)
        return self.costs.call * (1 + (parts(group.hits, group.misses) if group.streamed else 0.0))

    def _guessing(self, group: Group) -> float:
        return self._selecting(group) + _of(self.costs.guess, group)

    def _multiplying(self, group: Group, records: Array, cost: tuple[float, float]) -> Array:
        column, byte = cost
        return records * group.block * (column + byte * group.stride)

    def _all_held(self, group: Group) -> Array:
        held = self._multiplying(group, group.hits, self.held)
        return self._selecting(group) + self._calling(group) + self._late(group) + held

    def _read_ahead(self, group: Group, idle: Array) -> None:
        """Read guessed records, as many as the disk brings in the ``idle`` time."""
        if self.recall is None or not group.streamed:
            return
        most = np.full_like(self.now, self.frame_bytes / group.record_bytes)
        right = 1.0
        if group.masked and group.name != "mlp.neuron":  # a predictor's masks are no guess
            right = self.recall.get(group.name, RECALL)
            self.now += self._guessing(group)
            most = np.minimum(most, idle * self.rate / group.record_bytes)
        records = np.minimum(group.misses, most)
        reads, size = group.read(records)
        self.disk = np.maximum(self.now, self.disk) + self.flash.seconds(reads, size)
        self.now += reads * self.costs.submit + records * self.costs.ask
        group.early, group.early_end = right * records, self.disk

    def _call(self, group: Group, ahead: Group | None = None) -> None:
        """The product of one group; ``ahead`` is guessed while its records arrive."""
        costs = self.costs
        self.now += self._selecting(group) + self._calling(group) + self._late(group)
        if group.streamed:
            self.now += _of(costs.exchange if group.masked else costs.streaming, group)
        multiplied = self._multiplying(group, group.hits, self.held)
        if not group.streamed:
            self.now += multiplied
            return
        missing = group.misses - group.early
        reads, size = group.read(missing)
        asked = np.maximum(self.now, self.disk)
        there = np.where(missing > 0, asked + self.flash.seconds(reads, size), 0.0)
        self.disk = np.maximum(self.disk, there)
        there = np.maximum(there, group.early_end)
        self.now += reads * costs.submit + missing * costs.ask
        arriving = self._multiplying(group, group.misses, self.arrived) + reads * costs.land
        arriving += group.misses * (costs.take + group.record_bytes / costs.check)
        last = np.minimum(1.0, BATCH / np.maximum(group.misses, 1.0))
        if self.ordered:  # float sums wait for the first record before they multiply the second
            arriving += multiplied
            last = np.minimum(1.0, BATCH / np.maximum(group.hits + group.misses, 1.0))
        else:
            self.now += multiplied
        if ahead is not None:
            self._guess_meanwhile(ahead)
        self.now = np.maximum(self.now + arriving, there + last * arriving)

    def _guess_meanwhile(self, group: Group) -> None:
        """Guess another group from what is there: for the neurons, their activation as it is."""
        if self.recall is None or not group.streamed or (group.masked and self.ordered):
            return
        idle = self.costs.number * group.channels + self._selecting(group)
        self._read_ahead(group, np.full_like(self.now, idle))


def _of(cost: PerUnit, group: Group) -> float:
    return cost[0] + cost[1] * group.units
