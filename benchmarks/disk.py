"""Random reads of a file through dipnet's reader: throughput by size of a read and depth.

    python benchmarks/disk.py                                   # a temporary file, all sizes
    python benchmarks/disk.py --file F --size 22528 --depth 128

Offsets are uniform over the file, multiples of 4096. Ends with one JSON line.
"""

import argparse
import json
import mmap
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from dipnet._native import Reader

SIZES = (4096, 8192, 22528, 65536, 262144, 1048576)
DEPTHS = (1, 16, 128)
BATCH = 64  # reads submitted at a time, about as many as a site of a layer misses
MIB = 1 << 20


def measure(path: Path, size: int, depth: int, backend: str, seconds: float) -> dict[str, object]:
    """Read for about ``seconds``, with two batches or more than ``depth`` reads outstanding."""
    reader = Reader(path, depth, backend)
    rng = np.random.default_rng(0)
    last = (reader.file_bytes - size) // 4096
    rooms = [
        np.frombuffer(mmap.mmap(-1, BATCH * size), np.uint8).reshape(BATCH, size)
        for _ in range(2 + depth // BATCH)
    ]
    start, submitted = time.perf_counter(), 0
    left: dict[int, int] = {}  # reads of each batch that are outstanding
    free = list(range(len(rooms)))
    while time.perf_counter() < start + seconds or left:
        while free and time.perf_counter() < start + seconds:
            batch = free.pop()
            offsets = rng.integers(0, last + 1, BATCH) * 4096
            reader.submit_rows(offsets.tolist(), rooms[batch], batch * BATCH)
            left[batch] = BATCH
            submitted += BATCH
        for tag, error, _ in reader.wait():
            if error:
                raise OSError(error, os.strerror(error), str(path))
            left[tag // BATCH] -= 1
            if not left[tag // BATCH]:
                del left[tag // BATCH]
                free.append(tag // BATCH)
    took = time.perf_counter() - start
    return {
        "size": size,
        "depth": reader.depth,
        "backend": reader.backend,
        "direct": reader.direct,
        "mb_s": round(submitted * size / took / 1e6, 1),
        "reads_s": round(submitted / took),
    }


def write_file(path: Path, mib: int) -> None:
    """Random bytes: some disks shorten zeros."""
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(mib):
            file.write(rng.bytes(MIB))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--file", type=Path, help="the file to read; otherwise one is made")
    parser.add_argument("--mib", type=int, default=1024, help="size of the file that is made")
    parser.add_argument("--size", type=int, action="append", help="bytes of a read; repeatable")
    parser.add_argument("--depth", type=int, action="append", help="reads in flight; repeatable")
    parser.add_argument("--backend", default="auto", choices=("auto", "io_uring", "pread"))
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each case")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        path = args.file or Path(folder) / "content"
        if not args.file:
            write_file(path, args.mib)
        cases = []
        print(f"{'bytes':>8} {'depth':>6} {'MB/s':>8} {'reads/s':>9}")
        for size in args.size or SIZES:
            for depth in args.depth or DEPTHS:
                case = measure(path, size, depth, args.backend, args.seconds)
                cases.append(case)
                print(
                    f"{size:>8} {case['depth']:>6} {case['mb_s']:>8} {case['reads_s']:>9}"
                    f"  {case['backend']}{', direct' if case['direct'] else ''}"
                )
        print(json.dumps({"benchmark": "disk", "file_bytes": path.stat().st_size, "cases": cases}))


if __name__ == "__main__":
    main()
