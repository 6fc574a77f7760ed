"""How fast this disk gives a store's records to a program that does nothing else with them.

    python benchmarks/raw_disk.py STORE [--seconds 2] [--depth 128] [--density 0.5]

Reads, layer by layer, a random share of the records of each MLP group in the order of their
offsets, one read a record: what decoding asks of the disk when nothing is cached, with the
engine's own reader. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import mmap
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dipnet._native import Reader
from dipnet.store.index import RECORDS_NAME, Group, Index, read_index
from dipnet.streaming.budget import CACHED

CHUNK = 256  # reads that are handed over at a time
BLOCK = 128 << 10  # bytes of a large read
CHUNKS = 4  # buffers that are taken in turn; what is in them does not matter


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
    """The block's size and offsets of chunks of whole blocks of a file of so many bytes."""
    rng = np.random.default_rng(seed)
    while True:
        yield BLOCK, (rng.integers(0, size // BLOCK, 64) * BLOCK).tolist()


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
    return read_speed(store, chunks, CHUNK * BLOCK, seconds, depth)


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
    print(json.dumps({"benchmark": "raw_disk", "record_bytes": sizes, "bytes_per_second": speed}))


if __name__ == "__main__":
    main()
