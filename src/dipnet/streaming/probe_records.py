"""What products cost here, by the kind of the weights.

Measured with the native engine on records of random weights, a region of the scratch file for each
kind of weights and each length of a column. Sites that read the same region hold copies of it, so
that more memory is in use than the file has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dipnet.sim.device import Product
from dipnet.store.checksum import seal
from dipnet.store.geometry import (
    GROUP_ALIGNMENT,
    WEIGHTS,
    Weights,
    column_stride,
    record_bytes,
    round_up,
    weight_bytes,
)
from dipnet.streaming.engine import DEPTH, FRAME_BYTES, default_threads

REGION_BYTES = 4 << 20
OUTPUTS = (512, 2048, 8192)
"""Lengths of the columns: those of a tiny model, and of one with some billions of weights."""
KEPT = 0.5
"""The masks' density."""
MASKS = 8
COPIES = (1, 20)
"""Regions that are multiplied in turn: as many as a core's own cache holds, and far more."""
CALLS = 60


@dataclass(frozen=True)
class Region:
    """Records of ``outputs`` weights, ``units`` of them from ``offset`` on."""

    weights: Weights
    outputs: int
    offset: int

    @property
    def stride(self) -> int:
        """Bytes of a column."""
        return column_stride(self.weights, self.outputs)

    @property
    def record_bytes(self) -> int:
        """Bytes of a record, which is one column."""
        return record_bytes(self.stride, 1)

    @property
    def units(self) -> int:
        """The number of records."""
        return REGION_BYTES // self.record_bytes


def regions() -> list[Region]:
    """All that the scratch file begins with."""
    made: list[Region] = []
    end = 0
    for weights in WEIGHTS:
        for outputs in OUTPUTS:
            made.append(Region(weights, outputs, end))
            end = round_up(end + REGION_BYTES, GROUP_ALIGNMENT)
    return made


def write_regions(file: BinaryIO, rng: np.random.Generator) -> None:
    """Write the records of all regions to the beginning of a file."""
    for region in regions():
        records = np.zeros((region.units, region.record_bytes), np.uint8)
        used = weight_bytes(region.weights, region.outputs)
        records[:, : region.stride] = rng.integers(0, 256, (1, region.stride), np.uint8)
        if region.weights == "bf16":  # random bits would be NaN here and there
            values = rng.standard_normal((1, region.outputs), np.float32).view(np.uint32) >> 16
            records[:, :used] = values.astype(np.uint16).view(np.uint8)
        seal(records, group=0, first_unit=0)
        file.seek(region.offset)
        file.write(records.tobytes())


def probe_products(path: Path, weights: Weights) -> tuple[Product, ...]:
    """What columns of one kind cost, in the order of the bytes that are used in turn."""
    ours = [region for region in regions() if region.weights == weights]
    return tuple(_product([_Run(path, region, copies) for region in ours]) for copies in COPIES)


def _product(runs: Sequence[_Run]) -> Product:
    """The line through columns of several lengths."""
    column, byte = fitted(
        [(1.0, run.region.stride) for run in runs], [run.kernel / run.wanted for run in runs]
    )
    working = mean(run.copies * run.wanted * run.region.stride for run in runs)
    return Product(working_bytes=round(working), column=column, bandwidth=1 / max(byte, 1e-15))


def fitted(terms: Sequence[tuple[float, ...]], values: Sequence[float]) -> list[float]:
    """Coefficients, none below 0, with which the sums of ``terms`` come closest to ``values``.

    Errors count relative to the values.
    """
    scale = 1 / np.asarray(values)
    table = np.asarray(terms) * scale[:, None]
    kept = list(range(table.shape[1]))
    while True:
        found = np.linalg.lstsq(table[:, kept], np.ones(len(table)), rcond=None)[0]
        if (found >= 0).all():
            break
        kept = [at for at, value in zip(kept, found, strict=True) if value > 0]
    made = dict(zip(kept, found.tolist(), strict=True))
    return [made.get(at, 0.0) for at in range(table.shape[1])]


class Sites:
    """A native engine with some sites on one region; ``slots`` of its records have a place."""

    def __init__(self, path: Path, region: Region, copies: int, slots: int) -> None:
        from dipnet import _native

        self.region = region
        self.engine = _native.Engine(
            str(path),
            depth=DEPTH,
            backend="auto",
            threads=default_threads(),
            frame_bytes=FRAME_BYTES,
            largest_record=region.record_bytes,
        )
        scale = None if region.weights == "bf16" else np.ones(region.units, np.float32)
        self.sites = [self._add(scale, slots) for _ in range(copies)]
        rng = np.random.default_rng(0)
        self.x = rng.standard_normal((1, region.units)).astype(np.float32)
        self.y = np.empty((1, region.outputs), np.float32)

    def _add(self, scale: NDArray[np.float32] | None, slots: int) -> int:
        region = self.region
        return self.engine.add(
            kind=region.weights,
            channels=region.units,
            block=1,
            outputs=region.outputs,
            rows=region.outputs,
            stride=region.stride,
            record_bytes=region.record_bytes,
            offset=region.offset,
            group=0,
            scale=scale,
            slots=slots,
            policy="lru",
        )

    def call(self, number: int, mask: NDArray[np.bool_], pause: float = 0.0) -> Called:
        """One product with a (1, units) mask; ``pause`` seconds pass before its end."""
        site = self.sites[number % len(self.sites)]
        self.engine.access(site, mask[0])
        begin = self._timed(site, lambda: self.engine.begin(site, self.x, mask))
        time.sleep(pause)
        end = self._timed(site, lambda: self.engine.finish(self.y))
        return Called(begin[0] + end[0], begin[1], end[1])

    def _timed(self, site: int, call: Callable[[], object]) -> tuple[float, float]:
        """Seconds of a call in the kernels, and all others but those of waiting for the disk."""
        before = self.engine.totals(site)
        start = time.perf_counter()
        call()
        took = time.perf_counter() - start
        after = self.engine.totals(site)
        kernels, wait = (after[name] - before[name] for name in ("kernels", "wait"))
        return kernels, took - kernels - wait


@dataclass(frozen=True)
class Called:
    """Seconds of a product: in the kernels, and all others until it has begun and at its end."""

    kernels: float
    begin: float
    end: float


class _Run:
    """Products with records that are all in memory, ``copies`` of a region in turn."""

    def __init__(self, path: Path, region: Region, copies: int) -> None:
        sites = Sites(path, region, copies, region.units)
        masks = np.random.default_rng(0).random((MASKS, 1, region.units)) < KEPT
        for site in sites.sites:
            sites.engine.access(site, np.ones(region.units, bool))
            sites.engine.load(site)
        calls = [sites.call(at, masks[at % MASKS]) for at in range(copies + CALLS)][copies:]
        self.region = region
        self.copies = copies
        self.wanted = float(masks.sum() / MASKS)
        self.kernel = median(call.kernels for call in calls)
