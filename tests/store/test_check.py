"""Every change to a store's files is found."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

import dipnet
from dipnet.errors import InputError
from dipnet.pack.packing import pack
from dipnet.store.check import check_store, records
from dipnet.store.checksum import record_checksums, reference_checksums
from dipnet.store.index import read_index
from tests.families import shared
from tests.matrix import allocated


def flip(file: Path, position: int, mask: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= mask
    file.write_bytes(content)


def test_an_intact_store(store: Path) -> None:
    seen: list[tuple[int, int]] = []
    index = check_store(store, lambda done, total: seen.append((done, total)))
    assert index == read_index(store)
    assert records(index) == sum(group.channels // group.block for group in index.groups)
    assert seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("unit", ["store", "neurons"])
def test_any_flipped_bit_of_a_record(request: pytest.FixtureRequest, unit: str) -> None:
    store: Path = request.getfixturevalue(unit)
    index = read_index(store)
    chosen = random.Random(0)
    for _ in range(40):
        number = chosen.randrange(len(index.groups))
        group = index.groups[number]
        unit, byte = chosen.randrange(group.units), chosen.randrange(group.record_bytes)
        position, mask = group.offset_of(unit) + byte, 1 << chosen.randrange(8)
        flip(store / "records.bin", position, mask)
        message = f"record {unit} of {group.label} in .* is damaged, 1 of {records(index)}"
        with pytest.raises(InputError, match=message):
            check_store(store)
        flip(store / "records.bin", position, mask)
    check_store(store)


def test_zeroed_and_swapped_records(store: Path) -> None:
    group = read_index(store).group(1, "mlp.in")
    content = bytearray((store / "records.bin").read_bytes())
    whole = bytes(content)
    one, other, end = (group.offset_of(unit) for unit in (2, 3, 4))
    content[one:end] = whole[other:end] + whole[one:other]
    (store / "records.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"record 2 of mlp.in of layer 1 .*, 2 of"):
        check_store(store)
    content[one:end] = bytes(end - one)
    (store / "records.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"record 2 of mlp.in of layer 1 .*, 2 of \d+ records are"):
        check_store(store)


def test_the_rest(store: Path) -> None:
    flip(store / "rest.safetensors", 5000)
    with pytest.raises(InputError, match=r"rest.safetensors is damaged, its SHA-256 is not"):
        check_store(store)


def test_the_allocation(packed: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    model = packed.with_name("model")
    given = allocated(dipnet.describe(shared("llama"))).allocation
    index = pack(str(model), store, allocation=given)
    assert index.allocation_sha256 is not None
    check_store(store)
    file = store / "allocation.json"
    for position in range(0, file.stat().st_size, 97):
        flip(file, position)
        with pytest.raises(InputError, match=r"allocation.json is damaged, its SHA-256 is not"):
            check_store(store)
        flip(file, position)
    file.unlink()
    with pytest.raises(InputError, match=r"cannot read .*allocation.json: No such file"):
        check_store(store)


@pytest.mark.parametrize("name", ["records.bin", "rest.safetensors"])
def test_cut_off(store: Path, name: str) -> None:
    content = (store / name).read_bytes()
    for changed in (content[:-1], content + b"\0", b""):
        (store / name).write_bytes(changed)
        with pytest.raises(InputError, match=f"{name} has {len(changed)} bytes, its index says"):
            check_store(store)
    (store / name).unlink()
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        check_store(store)


@pytest.mark.parametrize("shape", [(1, 8), (3, 512), (700, 12288)])
def test_native_checksums_are_the_reference(shape: tuple[int, int]) -> None:
    content = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    arguments = {"group": 2**31, "first_unit": 12345}
    expected = reference_checksums(content, **arguments)
    assert np.array_equal(record_checksums(content, **arguments), expected)
    words = content[-1, :-8].view("<u4").tolist()
    number = 1 + 12345 + shape[0] - 1 + (2**31 << 32)
    total = 0x9E3779B97F4A7C15 * number + sum(w * (2 * j + 1) for j, w in enumerate(words))
    assert int(expected[-1]) == total % 2**64
