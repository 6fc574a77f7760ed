"""What reading records costs the processor, the engine's part and the system's: not the disk's.

Requests of many neighbours and of records that lie apart, each after one of the same records in
memory: what they take more is the reads'. The disk's own time passes while nobody looks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from dipnet.store.reads import GAP_BYTES, count_reads
from dipnet.streaming.probe_records import Region, Sites, fitted, regions

WEIGHTS = "int4"
"""The kind does not matter to reads."""
RECORDS = (32, 512)
"""Of a request, where the region has as many."""
ROUNDS = 8
PAUSE = 0.02
"""Seconds in which the reads of a request come, on most disks; what they take more is waiting."""


@dataclass(frozen=True)
class ReadCosts:
    """Seconds of the processor: for a read and for a record, to ask for it and to take it.

    ``check`` is the bytes/s at which records are copied to their places and verified;
    ``frame_bytes`` the engine's memory for records on their way.
    """

    submit: float
    land: float
    ask: float
    take: float
    check: float
    frame_bytes: int


@dataclass(frozen=True)
class _Asked:
    """A request of ``records`` in ``reads``, and its seconds more than those of one of hits."""

    reads: int
    records: int
    bytes: int
    begin: float
    end: float


def probe_reads(path: Path) -> ReadCosts:
    """Measure all costs on the regions of a scratch file."""
    asked = []
    frames = 0
    for region in regions():
        if region.weights == WEIGHTS:
            steps = (1, GAP_BYTES // region.record_bytes + 2)
            for step, count in itertools.product(steps, RECORDS):
                sets = _sets(region, step, count)
                sites = Sites(path, region, 1, int(sets[0].sum()))
                asked.append(_asked(sites, sets))
                frames = sites.engine.frame_bytes
    # What a request costs besides is measured in decoders, where it comes after other work.
    _, submit, ask = fitted([(1, a.reads, a.records) for a in asked], [a.begin for a in asked])
    _, land, take, byte = fitted(
        [(1, a.reads, a.records, a.bytes) for a in asked], [a.end for a in asked]
    )
    return ReadCosts(submit, land, ask, take, 1 / max(byte, 1e-15), frames)


def _sets(region: Region, step: int, most: int) -> list[NDArray[np.bool_]]:
    """Two (1, units) masks of ``most`` records, every ``step``-th, that have none in common."""
    count = min(most, region.units // (2 * step))
    made = []
    for first in (0, count * step):
        mask = np.zeros((1, region.units), bool)
        mask[0, first : first + count * step : step] = True
        made.append(mask)
    return made


def _asked(sites: Sites, sets: list[NDArray[np.bool_]]) -> _Asked:
    """Ask for one set and the other in turn: only one of them has a place."""
    size = sites.region.record_bytes
    (reads, records), wanted = count_reads(sets[0], record_bytes=size)[0], int(sets[0].sum())
    found = np.array(list(_more(sites, sets)))
    begin, end = (max(median(column), 1e-9) for column in found.T.tolist())
    return _Asked(int(reads), wanted, int(records) * size, begin, end)


def _more(sites: Sites, sets: list[NDArray[np.bool_]]) -> Iterator[tuple[float, float]]:
    """Seconds that begin and end take more with reads than without."""
    for number in range(ROUNDS):
        mask = sets[number % 2]
        missed, held = sites.call(0, mask, PAUSE), sites.call(0, mask)
        yield missed.begin - held.begin, missed.end - held.end
