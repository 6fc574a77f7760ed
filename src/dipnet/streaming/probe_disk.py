"""How fast the disk answers the engine's requests: bursts of reads, by their number and size."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dipnet.errors import InputError
from dipnet.sim.device import Point
from dipnet.streaming.engine import DEPTH

SIZES = (512, 2048, 8192, 32768, 131072)
"""Bytes of a read: from a record of a tiny model to the longest read of the engine."""
DEPTHS = (1, 4, 16, 64, 256)
SECTOR = 512
GAP = 3
"""A burst's reads lie so many times their size apart on average, as the records of a mask do."""
LEAST_ROUNDS = 5
UNDISTURBED = 0.2
"""The quantile that counts of what is repeated: other programs, and other guests of a host, make it
slower at times and never faster."""

Progress = Callable[[float], object]
"""Called with the share that is done, 0 to 1."""


@dataclass(frozen=True)
class Reading:
    """What a disk showed: its curve, and the CPU's seconds for a read's request and for its end."""

    curve: tuple[Point, ...]
    submit: float
    land: float


def probe_disk(path: Path, seconds: float, progress: Progress) -> Reading:
    """The curve of the file at ``path``, measured for ``seconds`` and five rounds at least.

    Every round asks for one burst at each point, so that all see the same disk. Raises InputError
    when a read fails.
    """
    from dipnet import _native

    reader = _native.Reader(path, DEPTH)
    rng = np.random.default_rng(0)
    room = np.frombuffer(mmap.mmap(-1, max(SIZES) * max(DEPTHS)), np.uint8)
    points = [(size, depth) for size in SIZES for depth in DEPTHS]
    took: dict[tuple[int, int], list[float]] = {point: [] for point in points}
    begun = time.perf_counter()
    rounds = 0
    while rounds < LEAST_ROUNDS or time.perf_counter() - begun < seconds:
        for size, depth in points:
            offsets = burst_offsets(rng, reader.file_bytes, size, depth)
            took[size, depth].append(burst(reader, offsets, _rows(room, depth, size)))
        rounds += 1
        share = max(rounds / LEAST_ROUNDS, 0.0), (time.perf_counter() - begun) / seconds
        progress(min(1.0, *share))
    submit, land = _handling(reader, rng, room)
    curve = tuple(
        Point(read_bytes=s, depth=d, bandwidth=s * d / undisturbed(took[s, d])) for s, d in points
    )
    return Reading(curve, submit, land)


def undisturbed(seconds: Sequence[float]) -> float:
    """What something takes that was done again and again, when nobody is in its way."""
    return float(np.quantile(seconds, UNDISTURBED))


def burst_offsets(
    rng: np.random.Generator, file_bytes: int, size: int, depth: int
) -> NDArray[np.int64]:
    """(depth,) ascending offsets of reads of ``size`` bytes, none beside another."""
    gaps = rng.integers(1, 2 * (GAP - 1), depth) + 1
    offsets = np.cumsum(gaps) * size
    room = file_bytes - int(offsets[-1]) - size
    first = int(rng.integers(0, max(1, room // SECTOR))) * SECTOR
    return np.asarray(first + offsets, np.int64)


def burst(reader: Any, offsets: NDArray[np.int64], room: NDArray[np.uint8]) -> float:
    """Seconds until all reads have come that are asked for at once, into (reads, size) ``room``."""
    start = time.perf_counter()
    reader.submit_rows(offsets.tolist(), room, 0)
    while reader.outstanding:
        _check(reader.wait())
    return time.perf_counter() - start


def _handling(
    reader: Any, rng: np.random.Generator, room: NDArray[np.uint8]
) -> tuple[float, float]:
    """Seconds of the caller's own for a read: to ask for it, and to take it when it has come."""
    depth, size = max(DEPTHS), SIZES[1]
    asking, taking = [], []
    for _ in range(LEAST_ROUNDS):
        offsets = burst_offsets(rng, reader.file_bytes, size, depth).tolist()
        start = time.perf_counter()
        reader.submit_rows(offsets, _rows(room, depth, size), 0)
        asking.append((time.perf_counter() - start) / depth)
        time.sleep(0.05)  # by then all has come
        start = time.perf_counter()
        landed = reader.poll()
        taking.append((time.perf_counter() - start) / max(1, len(landed)))
        _check(landed)
        while reader.outstanding:
            _check(reader.wait())
    return undisturbed(asking), undisturbed(taking)


def _check(done: list[tuple[int, int, int]]) -> None:
    for _, error, _ in done:
        if error:
            raise InputError(f"the disk cannot read what was just written: {os.strerror(error)}")


def _rows(room: NDArray[np.uint8], depth: int, size: int) -> NDArray[np.uint8]:
    return room[: depth * size].reshape(depth, size)
