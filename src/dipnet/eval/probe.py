"""`dipnet probe`: measure this machine and its disk, and describe it as a device.

The disk, reads and products are measured alone (streaming/probe_*), all other steps where they are
made, in decoders that generate text (probe_decoding.py).
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from dipnet import __version__
from dipnet.errors import InputError
from dipnet.eval.disturbance import QUIET, Disturbance
from dipnet.eval.probe_decoding import decoding_costs
from dipnet.sim.device import Device, EngineCosts, Point, Product, Tier
from dipnet.store.geometry import WEIGHTS, Weights
from dipnet.streaming.engine import default_threads
from dipnet.streaming.probe_disk import probe_disk
from dipnet.streaming.probe_reads import probe_reads
from dipnet.streaming.probe_records import probe_products, write_regions

SCRATCH_BYTES = 256 << 20
PIECE = 4 << 20
DISK_SECONDS = 10.0
DRAM_BYTES = 512 << 20
PASSES = 5
"""Over memory."""

Progress = Callable[[str, float], object]
"""Called with what is being measured, and the share of all work that is done."""


def probe(folder: Path, name: str, progress: Progress) -> Device:
    """This machine with the disk of ``folder`` as a device; in under a minute on most.

    A scratch file of 256 MiB and some small stores are made in the folder and removed, whatever
    happens. The description says so when others took more than `QUIET` of the processors' time.
    Raises InputError when the folder cannot be written or the disk has no room.
    """
    others = Disturbance()
    with _scratch(folder) as scratch:
        progress("writing the scratch file", 0.0)
        file = scratch / "records"
        _write(file)
        curve = probe_disk(file, DISK_SECONDS, lambda s: progress("disk", 0.05 + 0.25 * s))
        products = _products(file, progress)
        reading = probe_reads(file)
        progress("memory", 0.5)
        bandwidth = _dram_bandwidth()
        steps, factor = decoding_costs(
            scratch, products, reading, lambda s: progress("decoding", 0.5 + 0.5 * s)
        )
        products = {kind: _slower(points, factor) for kind, points in products.items()}
    return Device(
        name=name,
        description=_description(folder, others.share),
        dram=Tier(capacity=_memory(), bandwidth=bandwidth, latency=0.0),
        flash=Tier(
            capacity=shutil.disk_usage(folder).total,
            bandwidth=max(point.bandwidth for point in curve),
            latency=_latency(curve),
            curve=curve,
        ),
        overlap=True,
        engine=EngineCosts(**asdict(steps), **asdict(reading), products=products),
    )


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder that is gone afterwards; what is wrong with the disk is said in one line."""
    try:
        with tempfile.TemporaryDirectory(prefix=".dipnet-probe-", dir=folder) as made:
            if shutil.disk_usage(folder).free < 2 * SCRATCH_BYTES:
                raise InputError(
                    f"the disk of {folder} has less than {2 * SCRATCH_BYTES >> 20} MiB left: free "
                    "some, or give another --folder"
                )
            yield Path(made)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"cannot measure the disk of {folder}: {reason}; give a folder that can be written"
        ) from None


def _write(file: Path) -> None:
    """Records, then random bytes: some disks shorten zeros."""
    rng = np.random.default_rng(0)
    with file.open("wb") as opened:
        write_regions(opened, rng)
        while (left := SCRATCH_BYTES - opened.tell()) > 0:
            opened.write(rng.bytes(min(PIECE, left)))
        opened.flush()
        os.fsync(opened.fileno())


def _products(file: Path, progress: Progress) -> dict[Weights, tuple[Product, ...]]:
    made = {}
    for number, weights in enumerate(WEIGHTS):
        progress("kernels", 0.3 + 0.2 * number / len(WEIGHTS))
        made[weights] = probe_products(file, weights)
    return made


def _slower(points: tuple[Product, ...], factor: float) -> tuple[Product, ...]:
    """Products that take so many times as long."""
    return tuple(
        point.model_copy(
            update={"column": point.column * factor, "bandwidth": point.bandwidth / factor}
        )
        for point in points
    )


def _dram_bandwidth() -> float:
    """Bytes/s of adding up what no processor cache holds, with all threads."""
    values = torch.ones(DRAM_BYTES // 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(default_threads())
    took = []
    try:
        for _ in range(PASSES):
            start = time.perf_counter()
            values.sum()
            took.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return DRAM_BYTES / statistics.median(took)


def _memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _latency(curve: Sequence[Point]) -> float:
    """Seconds of the smallest read alone."""
    return min(point.read_bytes * point.depth / point.bandwidth for point in curve)


def _description(folder: Path, others: float) -> str:
    """What was measured, for people."""
    when = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    disturbed = f"; others took {others:.0%} of the processors' time: probe again when it is quiet"
    machine = platform.processor() or platform.machine()
    return (
        f"measured by dipnet {__version__} on {when} UTC: {default_threads()} threads of "
        f"{machine}, the disk of {folder}{disturbed if others > QUIET else ''}"
    )
