"""How fast the disk answers the engine's requests: bursts of reads, by their number and size."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
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
Progress = Callable[[float], object]
"""Called with the share that is done, 0 to 1."""


def probe_disk(path: Path, seconds: float, progress: Progress) -> tuple[Point, ...]:
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
    return tuple(
        Point(read_bytes=s, depth=d, bandwidth=s * d / median(took[s, d])) for s, d in points
    )


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


def _check(done: list[tuple[int, int, int]]) -> None:
    for _, error, _ in done:
        if error:
            raise InputError(f"the disk cannot read what was just written: {os.strerror(error)}")


def _rows(room: NDArray[np.uint8], depth: int, size: int) -> NDArray[np.uint8]:
    return room[: depth * size].reshape(depth, size)
