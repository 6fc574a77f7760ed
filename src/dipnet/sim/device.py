"""Devices: how fast their memories are, and what our engine costs on those that were probed.

A device is a JSON file: one of the presets in ``devices/`` or what `dipnet probe` wrote. Nothing in
it is trusted. docs/devices.md explains every field.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator

from dipnet.described import CLOSED, Described
from dipnet.errors import InputError
from dipnet.registry import unknown
from dipnet.store.geometry import Weights

FORMAT = "dipnet-device"
VERSION = 1

Positive = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(ge=0)]
Bytes = Annotated[int, Field(gt=0, lt=2**62)]
PerUnit = tuple[Seconds, Seconds]
"""Seconds of a mask, or of a product, and of each unit of its group."""
Array = NDArray[np.float64]


class Point(BaseModel):
    """Bandwidth in bytes/s of ``depth`` reads of ``read_bytes`` that are asked for at once.

    From the first one's request to the last one's end: the latency is in it.
    """

    model_config = CLOSED

    read_bytes: Bytes
    depth: Annotated[int, Field(ge=1, lt=2**31)]
    bandwidth: Positive


class Tier(BaseModel):
    """A memory: bytes that it holds, bytes/s, and seconds before the first byte of a read.

    ``curve`` says the bandwidth over the size and the number of reads, at every combination of its
    sizes and depths; without one, a request takes ``latency`` and its bytes over ``bandwidth``.
    """

    model_config = CLOSED

    capacity: Bytes
    bandwidth: Positive
    latency: Seconds
    curve: tuple[Point, ...] = ()

    @model_validator(mode="after")
    def _whole_grid(self) -> Self:
        points = {(p.read_bytes, p.depth) for p in self.curve}
        sizes, depths = ({point[axis] for point in points} for axis in (0, 1))
        if len(points) < len(self.curve):
            raise ValueError("curve has two points of the same read_bytes and depth")
        if len(points) < len(sizes) * len(depths):
            raise ValueError("curve must have a point for each of its read_bytes at each depth")
        return self

    @cached_property
    def _grid(self) -> tuple[Array, Array, Array]:
        """Logarithms of the (s,) sizes, the (d,) depths and the (s, d) bandwidths."""
        sizes = sorted({p.read_bytes for p in self.curve})
        depths = sorted({p.depth for p in self.curve})
        known = {(p.read_bytes, p.depth): p.bandwidth for p in self.curve}
        made = np.array([[known[size, depth] for depth in depths] for size in sizes])
        return np.log(sizes), np.log(depths), np.log(made)

    def with_bandwidth(self, bandwidth: float) -> Tier:
        """The same memory at another ``bandwidth``: its curve is as many times as fast."""
        factor = bandwidth / self.bandwidth
        curve = tuple(
            point.model_copy(update={"bandwidth": point.bandwidth * factor}) for point in self.curve
        )
        return self.model_copy(update={"bandwidth": bandwidth, "curve": curve})

    def seconds(self, reads: Array, size: Array) -> Array:
        """Seconds of ``reads`` reads asked for at once, ``size`` bytes together; 0 for none.

        Arrays of one shape. Between its points the curve is linear in logarithms; below its
        smallest size a read takes as long as one of that size.
        """
        reads, size = np.asarray(reads, np.float64), np.asarray(size, np.float64)
        some = reads > 0
        count = np.where(some, reads, 1.0)
        each = np.where(some, np.maximum(size / count, 1.0), 1.0)
        if not self.curve:
            return np.where(some, self.latency + size / self.bandwidth, 0.0)
        smallest = np.maximum(each, np.exp(self._grid[0][0]))
        return np.where(some, count * smallest / self._bandwidth(smallest, count), 0.0)

    def _bandwidth(self, each: Array, count: Array) -> Array:
        """Bytes/s of ``count`` reads of ``each`` bytes, the nearest point's outside the curve."""
        sizes, depths, grid = self._grid
        row, down = _between(sizes, np.log(each))
        column, right = _between(depths, np.log(count))
        below, next_column = (
            np.minimum(row + 1, len(sizes) - 1),
            np.minimum(column + 1, len(depths) - 1),
        )
        upper = grid[row, column] * (1 - right) + grid[row, next_column] * right
        lower = grid[below, column] * (1 - right) + grid[below, next_column] * right
        return np.asarray(np.exp(upper * (1 - down) + lower * down))


def _between(ticks: Array, at: Array) -> tuple[NDArray[np.intp], Array]:
    """The tick before each place, and the share of the way to the next; ends are clamped."""
    place = np.clip(np.interp(at, ticks, np.arange(len(ticks))), 0, len(ticks) - 1)
    before = place.astype(np.intp)
    return before, place - before


class Product(BaseModel):
    """Products with columns, when ``working_bytes`` are used in turn: what caches hold is faster.

    A column of so many bytes takes ``column`` seconds and its bytes over ``bandwidth``.
    """

    model_config = CLOSED

    working_bytes: Bytes
    column: Seconds
    bandwidth: Positive


class EngineCosts(BaseModel):
    """What our engine takes on a machine besides reading, in seconds; see docs/devices.md.

    Of a token: ``token`` and ``logit`` for each entry of the vocabulary. Of a layer: ``layer``,
    ``number`` for each number of its activations (width and neurons), ``key`` for each key or value
    that attention reads. Of a group's product: ``call``, besides its columns; but one of the
    ``threads`` computes alone until the others ``wake``. Of a mask: ``selection``, and ``exchange``
    more where records come and go; to guess it ``guess`` more, not counting reads. Of a product
    without a mask whose records come and go: ``streaming`` more. Of a read: ``submit``
    until it is on its way and ``land`` when it has come; of a record that is read: ``ask`` and
    ``take``, likewise, and its copy and check at ``check`` bytes/s. ``products`` has points for
    each kind of weights, in the order of ``working_bytes``.
    """

    model_config = CLOSED

    token: Seconds
    logit: Seconds
    layer: Seconds
    number: Seconds
    key: Seconds
    call: Seconds
    threads: Annotated[int, Field(ge=1, lt=2**15)]
    wake: Seconds
    selection: PerUnit
    exchange: PerUnit
    streaming: PerUnit
    guess: PerUnit
    submit: Seconds
    land: Seconds
    ask: Seconds
    take: Seconds
    check: Positive
    frame_bytes: Bytes
    products: dict[Weights, tuple[Product, ...]]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for kind, points in self.products.items():
            sizes = [point.working_bytes for point in points]
            if not sizes or sizes != sorted(set(sizes)):
                raise ValueError(f"products of {kind} must have points of growing working_bytes")
        return self

    def multiplying(self, kind: Weights, working: float) -> tuple[float, float]:
        """Seconds of a column and seconds of a byte, when ``working`` bytes are used in turn.

        Raises InputError when the device was not probed for that kind of weights.
        """
        if kind not in self.products:
            raise InputError(
                f"the device has no figures for {kind} weights: measure it again with dipnet probe"
            )
        return columns_cost(self.products[kind], working)


def columns_cost(points: Sequence[Product], working: float) -> tuple[float, float]:
    """Seconds of a column and of a byte, between ``points`` in the order of their bytes."""
    at = np.log([point.working_bytes for point in points])
    column, byte = (
        float(np.interp(np.log(max(working, 1.0)), at, values))
        for values in ([p.column for p in points], [1 / p.bandwidth for p in points])
    )
    return column, byte


class Device(BaseModel):
    """A machine: two memories, whether reading hides behind computing, our engine's costs.

    ``dram`` holds what is cached, ``flash`` everything. Without ``engine`` a token takes the time
    of its bytes alone, as in the paper's simulator.
    """

    model_config = CLOSED

    format: Literal["dipnet-device"] = "dipnet-device"
    version: Literal[1] = 1
    name: Annotated[str, Field(min_length=1, max_length=200)]
    description: Annotated[str, Field(max_length=2000)]
    dram: Tier
    flash: Tier
    overlap: bool
    engine: EngineCosts | None = None


def presets() -> list[str]:
    """The names of the devices that come with dipnet."""
    files = resources.files("dipnet.sim").joinpath("devices").iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def load_device(name_or_path: str | Path) -> Device:
    """A preset by its name, or the device of a file.

    Raises InputError, in one line, for a name that does not exist and a file that is no device or
    says what cannot be.
    """
    known = presets()
    name = str(name_or_path)
    if name in known:
        preset = resources.files("dipnet.sim").joinpath("devices", f"{name}.json")
        return _files().parse(preset.read_bytes(), name)
    path = Path(name_or_path)
    if not path.exists() and not name.endswith(".json") and path.name == name:
        raise unknown("device", name, known, " A file that dipnet probe wrote is one too.")
    return _files().read(path)


@cache
def _files() -> Described[Device]:
    """How a device's file is read."""
    known = ", ".join(presets())
    remedy = f"take a preset ({known}), or measure this machine with `dipnet probe --out FILE`"
    return Described("device", FORMAT, VERSION, Device, remedy)
