"""The records' checksum: native, numpy and a plain loop agree, and damage is found."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from dipnet import _native
from dipnet.store.checksum import (
    record_checksums,
    reference_checksums,
    seal,
    stored_checksums,
)


def plain(group: int, unit: int, record: bytes) -> int:
    words = [int.from_bytes(record[at : at + 4], "little") for at in range(0, len(record) - 8, 4)]
    total = sum(word * (2 * j + 1) for j, word in enumerate(words))
    return (0x9E3779B97F4A7C15 * (1 + unit + (group << 32)) + total) % 2**64


def random_records(units: int, size: int) -> NDArray[np.uint8]:
    return np.random.default_rng(size).integers(0, 256, (units, size), dtype=np.uint8)


@pytest.mark.parametrize("size", [8, 12, 40, 512, 2560, 22528])
@pytest.mark.parametrize(("group", "first"), [(0, 0), (3, 17), (200, 2**31)])
def test_all_agree(size: int, group: int, first: int) -> None:
    records = random_records(40, size)
    records[0] = 0
    records[1] = 255  # the largest sums
    expected = [plain(group, first + i, record.tobytes()) for i, record in enumerate(records)]
    assert record_checksums(records, group=group, first_unit=first).tolist() == expected
    assert reference_checksums(records, group=group, first_unit=first).tolist() == expected
    native = _native.record_checksums(records, group=group, first_unit=first)
    assert native.dtype == np.uint64
    assert native.tolist() == expected
    seal(records, group=group, first_unit=first)
    assert stored_checksums(records).tolist() == expected


@pytest.mark.parametrize("checksums", [reference_checksums, _native.record_checksums])
def test_damage_is_found(checksums: Callable[..., NDArray[np.uint64]]) -> None:
    records = random_records(4, 1024)
    seal(records, group=2, first_unit=10)

    def broken(damaged: NDArray[np.uint8], group: int = 2, first: int = 10) -> list[int]:
        found = checksums(damaged, group=group, first_unit=first) != stored_checksums(damaged)
        return np.flatnonzero(found).tolist()

    assert broken(records) == []
    assert broken(records, group=3) == broken(records, first=11) == [0, 1, 2, 3]
    assert broken(records[[0, 2, 1, 3]]) == [1, 2]
    zeroed = records.copy()
    zeroed[3] = 0
    assert broken(zeroed) == [3]
    for bit in range(0, 8192, 37):
        flipped = records.copy()
        flipped[1, bit // 8] ^= 1 << bit % 8
        assert broken(flipped) == [1]


def test_no_records() -> None:
    none = np.empty((0, 512), np.uint8)
    assert reference_checksums(none, group=0, first_unit=0).shape == (0,)
    assert _native.record_checksums(none, group=0, first_unit=0).shape == (0,)


@pytest.mark.parametrize("size", [4, 510])
def test_sizes_that_no_record_has(size: int) -> None:
    with pytest.raises(ValueError, match="multiple of 4 bytes, at least 8"):
        _native.record_checksums(np.zeros((2, size), np.uint8), group=0, first_unit=0)
