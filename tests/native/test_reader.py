"""Reader through Python: what it reads, what it refuses, how it fails."""

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from dipnet._native import Reader, reader_backends

SECTOR = 512
SECTORS = 4096


def room(count: int, size: int) -> NDArray[np.uint8]:
    """Aligned (count, size) uint8."""
    return np.frombuffer(mmap.mmap(-1, count * size), np.uint8).reshape(count, size)


def finish(reader: Reader) -> dict[int, tuple[int, int]]:
    """Tag -> (errno, bytes) of all that is outstanding."""
    done = {}
    while reader.outstanding:
        for tag, error, size in reader.wait():
            assert tag not in done
            done[tag] = error, size
    assert reader.wait() == reader.poll() == []
    return done


@pytest.fixture(params=["disk", "memory"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file of random bytes, on disk and on tmpfs: O_DIRECT may be missing on either."""
    if request.param == "memory":
        if not os.access("/dev/shm", os.W_OK):
            pytest.skip("no /dev/shm")
        path = Path("/dev/shm") / f"dipnet-test-{os.getpid()}"
    else:
        path = tmp_path / "content"
    path.write_bytes(np.random.default_rng(0).bytes(SECTORS * SECTOR))
    yield path
    path.unlink()


@pytest.fixture(params=["io_uring", "pread"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A backend that this build and this kernel have."""
    (tmp_path / "empty").touch()
    try:
        Reader(tmp_path / "empty", 1, request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    return str(request.param)


def test_the_pread_backend_is_always_built(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert reader_backends()[-1] == "pread"
    assert Reader(tmp_path / "empty", 1, "auto").backend in reader_backends()
    if "io_uring" not in reader_backends():
        with pytest.raises(RuntimeError, match="liburing-dev"):
            Reader(tmp_path / "empty", 1, "io_uring")


@pytest.mark.parametrize("depth", [1, 64])
def test_random_reads(path: Path, backend: str, depth: int) -> None:
    content = np.fromfile(path, np.uint8)
    reader = Reader(path, depth, backend)
    offsets = np.random.default_rng(1).integers(0, SECTORS - 8, 300) * SECTOR
    rows = room(300, 8 * SECTOR)
    reader.submit_rows(offsets.tolist(), rows, 1000)
    done = finish(reader)
    assert done == {1000 + i: (0, 8 * SECTOR) for i in range(300)}
    for row, offset in zip(rows, offsets, strict=True):
        np.testing.assert_array_equal(row, content[offset : offset + 8 * SECTOR])
    totals = reader.totals()
    assert (totals["reads"], totals["failed"]) == (300, 0)
    assert totals["bytes"] == rows.size
    assert totals["busy_seconds"] > 0
    assert (reader.file_bytes, reader.backend) == (len(content), backend)
    assert reader.depth == (min(depth, 16) if backend == "pread" else depth)


def test_one_range_into_several_arrays(path: Path, backend: str) -> None:
    content = np.fromfile(path, np.uint8)
    reader = Reader(path, backend=backend)
    rows = room(6, SECTOR)
    reader.submit(7 * SECTOR, [rows[4], rows[0], rows[2:4]], tag=5)
    assert finish(reader) == {5: (0, 4 * SECTOR)}
    read = content[7 * SECTOR : 11 * SECTOR].reshape(4, SECTOR)
    np.testing.assert_array_equal(rows[[4, 0, 2, 3]], read)
    assert not rows[[1, 5]].any()


def test_arrays_stay_alive_while_they_are_read_into(path: Path, backend: str) -> None:
    reader = Reader(path, 2, backend)
    for tag in range(50):
        reader.submit(tag * SECTOR, [room(1, SECTOR)], tag)
    assert all(error == 0 for error, _ in finish(reader).values())
    for tag in range(50):
        reader.submit(tag * SECTOR, [room(1, SECTOR)], tag)
    del reader  # with reads in flight


def test_the_end_of_the_file(path: Path, backend: str) -> None:
    reader = Reader(path, backend=backend)
    rows = room(2, 4 * SECTOR)
    reader.submit_rows([(SECTORS - 1) * SECTOR, 2 * SECTORS * SECTOR], rows, 0)
    assert finish(reader) == {0: (errno.ENODATA, SECTOR), 1: (errno.ENODATA, 0)}


def test_a_file_that_is_cut_while_it_is_open(path: Path, backend: str) -> None:
    reader = Reader(path, backend=backend)
    os.truncate(path, 100)
    reader.submit_rows([0, SECTOR], room(2, SECTOR), 0)
    assert {tag: error for tag, (error, _) in finish(reader).items()} == dict.fromkeys(
        (0, 1), errno.ENODATA
    )


def test_faults(path: Path, backend: str) -> None:
    faults = [(SECTOR, SECTOR + 1, errno.EIO)]
    reader = Reader(path, backend=backend, faults=faults)
    reader.submit_rows([0, SECTOR, 2 * SECTOR], room(3, SECTOR), 0)
    assert finish(reader) == {0: (0, SECTOR), 1: (errno.EIO, 0), 2: (0, SECTOR)}
    reader.submit(0, [room(1, 8 * SECTOR)], 3)
    assert finish(reader) == {3: (errno.EIO, 0)}
    assert reader.totals()["failed"] == 2


def test_queued_reads_can_be_cancelled(path: Path, backend: str) -> None:
    reader = Reader(path, 1, backend)
    reader.submit_rows([0] * 10, room(10, SECTOR), 0)
    cancelled = reader.cancel_queued([0, 4, 5, 99])
    assert cancelled == [4, 5]
    assert finish(reader).keys() == set(range(10)) - {4, 5}


def test_what_cannot_be_opened(tmp_path: Path, backend: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"cannot open .*none"):
        Reader(tmp_path / "none", 1, backend)
    with pytest.raises(IsADirectoryError):
        Reader(tmp_path, 1, backend)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe is no regular file"):
        Reader(tmp_path / "pipe", 1, backend)


def test_bad_arguments(path: Path, backend: str) -> None:
    for depth in (0, 10**6):
        with pytest.raises(ValueError, match="depth must be in 1"):
            Reader(path, depth, backend)
    with pytest.raises(ValueError, match="no backend 'mmap'; there are: auto, io_uring, pread"):
        Reader(path, 1, "mmap")
    reader = Reader(path, 1, backend)
    with pytest.raises(ValueError, match="bytes to read"):
        reader.submit(0, [], 0)
    with pytest.raises(ValueError, match=r"rows must be \(len\(offsets\), bytes\)"):
        reader.submit_rows([0], room(2, SECTOR), 0)
    read_only = room(1, SECTOR)
    read_only.flags.writeable = False
    with pytest.raises(TypeError):
        reader.submit(0, [read_only], 0)
    if reader.direct:
        with pytest.raises(ValueError, match="multiples of 512"):
            reader.submit(1, [room(1, SECTOR)], 0)
        with pytest.raises(ValueError, match="multiples of 512"):
            reader.submit(0, [room(2, SECTOR).reshape(-1)[8 : SECTOR + 8]], 0)
    assert reader.outstanding == 0


def test_a_file_system_without_direct_reads(backend: str) -> None:
    path = Path("/proc/version")  # its size is given as 0, too
    content = path.read_bytes()
    reader = Reader(path, 2, backend)
    assert not reader.direct
    parts = room(2, SECTOR)[0, 1:4], room(1, SECTOR)[0, :4]
    reader.submit(5, list(parts), 0)
    reader.submit(1, [room(1, 2 * SECTOR)], 1)
    assert finish(reader) == {0: (0, 7), 1: (errno.ENODATA, len(content) - 1)}
    assert b"".join(part.tobytes() for part in parts) == content[5:12]
