"""How long a device takes for tokens whose hits and misses are known.

Without engine costs: the paper's model, bytes over bandwidths. With them: a walk through a token as
our engine makes it (walk.py), with what the probe measured for each step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dipnet.sim.device import Device
from dipnet.sim.groups import Array, Group, pinned_groups
from dipnet.sim.shape import ModelShape
from dipnet.sim.sizes import (
    is_streamed,
    kv_bytes,
    pinned_bytes,
    unit_bytes,
    unit_columns,
    unit_stride,
)
from dipnet.sim.trace import TraceSite
from dipnet.sim.walk import Walk
from dipnet.store.geometry import Weights


@dataclass(frozen=True)
class SiteLoad:
    """What every token asked of one site: (tokens,) units that were hits and misses.

    The misses take ``reads`` reads of ``records`` records, with those in the gaps. ``masked`` is
    False for a group of which every token wants everything.
    """

    site: TraceSite
    weights: Weights
    hits: NDArray[np.number]
    misses: NDArray[np.number]
    reads: NDArray[np.number]
    records: NDArray[np.number]
    masked: bool = True

    @property
    def record_bytes(self) -> int:
        """Bytes of a unit."""
        return unit_bytes(self.site, self.weights)

    @property
    def wanted_bytes(self) -> Array:
        """(tokens,) bytes that are multiplied."""
        return np.asarray((self.hits + self.misses) * float(self.record_bytes))

    @property
    def missed_bytes(self) -> Array:
        """(tokens,) bytes that were wanted and not in memory."""
        return np.asarray(self.misses * float(self.record_bytes))

    def group(self) -> Group:
        """The site's records, as the engine has them."""
        return Group(
            layer=self.site.layer,
            name=self.site.name,
            units=self.site.units,
            block=unit_columns(self.site),
            stride=unit_stride(self.site, self.weights),
            record_bytes=self.record_bytes,
            masked=self.masked,
            hits=np.asarray(self.hits, np.float64),
            misses=np.asarray(self.misses, np.float64),
            reads=np.asarray(self.reads, np.float64),
            records=np.asarray(self.records, np.float64),
        )


def seconds(
    device: Device,
    shape: ModelShape,
    loads: Sequence[SiteLoad],
    *,
    context: float | Array = 0.0,
    look_ahead: bool = False,
    recall: Mapping[str, float] | None = None,
    added_bytes: int = 0,
) -> Array:
    """(tokens,) seconds of each token; the ``loads`` are those of its MLP, and of masks elsewhere.

    All are of one kind of weights; an MLP matrix that no load has is not counted, attention and the
    head are. ``context`` is the number of tokens before each. ``look_ahead`` reads ahead on
    guesses where that pays, as the engine does; the share ``recall`` of them (by the sites' name)
    is right: both matter only to a device with engine costs. The method's own ``added_bytes`` are
    read from memory before anything is asked of Flash. Raises InputError when the engine's costs
    lack the loads' kind of weights.
    """
    deciding = added_bytes / device.dram.bandwidth
    past = np.broadcast_to(np.asarray(context, np.float64), loads[0].hits.shape)
    if device.engine is None:
        return _of_bytes(device, shape, loads, past) + deciding
    weights = loads[0].weights
    groups = {(group.layer, group.name): group for group in pinned_groups(shape, weights, past)}
    # A head is no record: attention's two groups are in memory whole, whatever heads are wanted.
    records = [load for load in loads if load.site.name != "attn.head"]
    groups |= {(load.site.layer, load.site.name): load.group() for load in records}
    ways = [None, recall or {}] if look_ahead else [None]  # a walk leaves its guesses in the groups
    walks = (Walk(device.flash, device.engine, shape, weights, groups, past) for _ in ways)
    times = [walk.token(way) for walk, way in zip(walks, ways, strict=True)]
    return deciding + min(times, key=lambda took: float(took.sum()))


def flash_bytes(device: Device, load: SiteLoad) -> Array:
    """(tokens,) bytes that are read from Flash: what is missed, and the gaps between it.

    Without a curve small reads are as fast as long ones, and nobody would read a gap.
    """
    if not device.flash.curve:
        return load.missed_bytes
    return np.asarray(load.records * float(load.record_bytes))


def _of_bytes(device: Device, shape: ModelShape, loads: Sequence[SiteLoad], past: Array) -> Array:
    """The time of a token's bytes: all that it touches in memory, what it misses in Flash."""
    touched = pinned_bytes(shape, loads[0].weights) + past * kv_bytes(shape, 1)
    flash = np.zeros_like(touched)
    for load in loads:
        if is_streamed(load.site):
            touched = touched + load.wanted_bytes
        flash += device.flash.seconds(np.asarray(load.reads, np.float64), flash_bytes(device, load))
    dram = device.dram.latency + touched / device.dram.bandwidth
    return np.maximum(dram, flash) if device.overlap else dram + flash
