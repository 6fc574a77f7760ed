"""Arrays in files without a name."""

import errno
import gc
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from dipnet.cache.scratch import scratch_array
from dipnet.errors import InputError


def test_an_array_of_zeros_outside_the_heap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = scratch_array((3, 5), np.int32)
    assert made.dtype == np.int32
    assert made.tolist() == [[0] * 5] * 3
    part = made[1]
    del made
    gc.collect()
    part[:] = 7  # a view keeps the file
    assert part.tolist() == [7] * 5
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
def test_nothing_needs_no_file(shape: tuple[int, ...]) -> None:
    assert scratch_array(shape, np.int64).shape == shape


def test_a_full_disk_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=r"^no room for 80 bytes .*No space left.*TMPDIR.*$"):
        scratch_array((10,), np.int64)
