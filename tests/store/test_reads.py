"""Which records one read takes in: by hand, and native and reference alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dipnet import _native
from dipnet.sim.walk import BATCH, HELD
from dipnet.store.reads import GAP_BYTES, READ_BYTES, count_reads, reference_count_reads


def missed(*units: int, of: int = 40) -> NDArray[np.bool_]:
    row = np.zeros((1, of), bool)
    row[0, list(units)] = True
    return row


def test_the_engines_own_numbers() -> None:
    assert (READ_BYTES, GAP_BYTES) == (_native.READ_BYTES, _native.GAP_BYTES)
    assert (BATCH, HELD) == (_native.BATCH, _native.HELD)


@pytest.mark.parametrize(
    ("units", "record_bytes", "reads", "records"),
    [
        ((), 512, 0, 0),
        ((7,), 512, 1, 1),
        ((0, 39), 512, 2, 2),  # 38 records between them, 19 KiB
        ((0, 17), 512, 1, 18),  # 16 of them are 8 KiB
        ((0, 18), 512, 2, 2),
        ((3, 5, 6, 9), 4096, 1, 7),  # gaps of 1, 0 and 2 records of 4 KiB
        ((3, 5, 6, 10), 4096, 2, 5),
        ((3, 4, 6), 8704, 2, 3),  # too large for any gap
        (tuple(range(40)), 4096, 2, 40),  # 32 are as much as one read takes in
        (tuple(range(0, 40, 2)), 4096, 2, 38),  # 0 to 30, 32 to 38
        ((1, 2, 3), READ_BYTES, 3, 3),
    ],
)
def test_by_hand(units: tuple[int, ...], record_bytes: int, reads: int, records: int) -> None:
    asked = missed(*units)
    for count in (count_reads, reference_count_reads):
        assert count(asked, record_bytes=record_bytes).tolist() == [[reads, records]]


@given(st.integers(0, 2**32), st.sampled_from([512, 1024, 3072, 8192, 20480]), st.floats(0, 1))
def test_native_and_reference(seed: int, record_bytes: int, share: float) -> None:
    asked = np.random.default_rng(seed).random((3, 300)) < share
    found = count_reads(asked, record_bytes=record_bytes)
    assert found.dtype == np.int32
    assert (found == reference_count_reads(asked, record_bytes=record_bytes)).all()
    wanted = asked.sum(axis=1)
    assert (found[:, 0] <= wanted).all()
    assert (found[:, 1] >= wanted).all()
    assert (found[:, 1] * record_bytes <= found[:, 0] * max(READ_BYTES, record_bytes)).all()


def test_no_tokens() -> None:
    assert count_reads(np.zeros((0, 5), bool), record_bytes=512).shape == (0, 2)
