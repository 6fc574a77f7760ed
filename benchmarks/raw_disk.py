"""How fast this disk gives a store's records to a program that does nothing else with them.

    python benchmarks/raw_disk.py STORE [--seconds 2] [--depth 128] [--density 0.5]

Reads, layer by layer, a random share of the records of each MLP group in the order of their
offsets, one read a record: what decoding asks of the disk when nothing is cached, with the
engine's own reader. Then half as many of the smallest records, as many as miss a cache of half of
them, read in three ways. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import mmap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dipnet._native import Reader
from dipnet.store.index import RECORDS_NAME, Group, Index, read_index
from dipnet.store.reads import READ_BYTES, reads
from dipnet.streaming.budget import CACHED

CHUNK = 256  # reads that are handed over at a time
CHUNKS = 4  # buffers that are taken in turn; what is in them does not matter
WAYS = ("alone", "apart", "together")


def mlp_groups(index: Index) -> list[Group]:
    """The groups whose records may be streamed."""
    return [group for group in index.groups if group.name in CACHED]


def wanted(groups: list[Group], density: float, seed: int) -> Iterator[tuple[int, list[int]]]:
    """Record size and offsets of chunks of reads, for ever: pass after pass over the layers."""
    rng = np.random.default_rng(seed)
    while True:
        for group in groups:
            chosen = np.flatnonzero(rng.random(group.units) < density)
            offsets = group.offset + chosen * group.record_bytes
            for start in range(0, len(offsets), CHUNK):
                yield group.record_bytes, offsets[start : start + CHUNK].tolist()


def blocks(size: int, seed: int) -> Iterator[tuple[int, list[int]]]:
    """A large read's size and offsets of chunks of whole blocks of a file of so many bytes."""
    rng = np.random.default_rng(seed)
    while True:
        yield READ_BYTES, (rng.integers(0, size // READ_BYTES, 64) * READ_BYTES).tolist()


def record_speed(
    store: Path, seconds: float = 2.0, depth: int = 128, density: float = 0.5, seed: int = 0
) -> float:
    """Bytes per second of random records at this depth; OSError when a read fails."""
    groups = mlp_groups(read_index(store))
    size = CHUNK * max(group.record_bytes for group in groups)
    return read_speed(store, wanted(groups, density, seed), size, seconds, depth)


def block_speed(store: Path, seconds: float = 2.0, depth: int = 128, seed: int = 0) -> float:
    """Bytes per second of large reads: what the disk can do; OSError when a read fails."""
    chunks = blocks(read_index(store).records_bytes, seed)
    return read_speed(store, chunks, CHUNK * READ_BYTES, seconds, depth)


def read_speed(
    store: Path,
    chunks: Iterator[tuple[int, list[int]]],
    size: int,
    seconds: float,
    depth: int,
) -> float:
    """Bytes per second of chunks of reads that take ``size`` bytes at most."""
    buffers = [np.frombuffer(mmap.mmap(-1, size), np.uint8) for _ in range(CHUNKS)]
    reader = Reader(store / RECORDS_NAME, depth)
    start = time.perf_counter()
    for number, (record, offsets) in enumerate(chunks):
        rows = buffers[number % CHUNKS][: len(offsets) * record].reshape(-1, record)
        reader.submit_rows(offsets, rows, 0)
        while reader.outstanding > depth + CHUNK:
            for _, error, _ in reader.wait():
                if error:
                    raise OSError(error, f"cannot read {store / RECORDS_NAME}")
        if time.perf_counter() - start > seconds:
            break
    speed = reader.totals()["bytes"] / (time.perf_counter() - start)
    return speed


def ways_speed(store: Path, seconds: float, depth: int, density: float) -> dict[str, float]:
    """Bytes per second of wanted records of the smallest kind, by the way that they are read.

    "alone": one read a record. "apart": through gaps, each record to a place of its own.
    "together": through gaps, a read's records side by side, as the engine reads small ones.
    """
    index = read_index(store)
    group = min(mlp_groups(index), key=lambda group: group.record_bytes)
    reader = Reader(store / RECORDS_NAME, depth)
    room = np.frombuffer(mmap.mmap(-1, CHUNKS * READ_BYTES * depth), np.uint8)
    places = np.random.default_rng(0).permutation(len(room) // group.record_bytes)
    room[:] = 0  # no page is new to a read
    took, wanted = dict.fromkeys(WAYS, 0.0), 0
    for seed in itertools.count():
        units = np.flatnonzero(np.random.default_rng(seed).random(group.units) < density)
        wanted += len(units) * group.record_bytes
        for way in WAYS:
            asked = list(destinations(way, units, group.record_bytes, room, places))
            start = time.perf_counter()
            for first, into in asked:
                reader.submit(group.offset + first * group.record_bytes, into, 0)
            while reader.outstanding:
                reader.wait()
            took[way] += time.perf_counter() - start
        if sum(took.values()) > seconds:
            return {way: wanted / spent for way, spent in took.items()}
    raise AssertionError("counting does not end")


def destinations(
    way: str,
    units: NDArray[np.intp],
    record: int,
    room: NDArray[np.uint8],
    places: NDArray[np.int64],
) -> Iterator[tuple[int, list[NDArray[np.uint8]]]]:
    """The first unit of each read, and where its records and those in its gaps go."""
    begun = 0
    asked = units.tolist()
    alone = way == "alone"
    for first, last in zip(asked, asked, strict=True) if alone else reads(asked, record):
        records = last - first + 1
        if way == "apart":
            at = [int(place) * record for place in places[begun : begun + records]]
            yield first, [room[start : start + record] for start in at]
        else:
            yield first, [room[begun * record : (begun + records) * record]]
        begun = (begun + records) % (len(places) - max(1, READ_BYTES // record))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--depth", type=int, default=128)
    parser.add_argument("--density", type=float, default=0.5)
    args = parser.parse_args()
    speed = record_speed(args.store, args.seconds, args.depth, args.density)
    sizes = sorted({group.record_bytes for group in mlp_groups(read_index(args.store))})
    print(f"records of {sizes} bytes, depth {args.depth}: {speed / 1e6:.0f} MB/s")
    ways = ways_speed(args.store, args.seconds, args.depth, args.density / 2)
    for way, found in ways.items():
        print(f"{sizes[0]} bytes, half as many, {way}: {found / 1e6:.0f} MB/s of what is wanted")
    figures = {"record_bytes": sizes, "bytes_per_second": speed, "ways": ways}
    print(json.dumps({"benchmark": "raw_disk", **figures}))


if __name__ == "__main__":
    main()
