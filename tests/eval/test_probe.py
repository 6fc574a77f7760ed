"""`dipnet probe` in small: a whole device, nothing left behind, and what it is made from."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from dipnet.errors import InputError
from dipnet.eval import probe as whole
from dipnet.eval import probe_decoding
from dipnet.eval.probe import probe
from dipnet.eval.probe_decoding import Sample, between_operations
from dipnet.sim.device import Device, load_device
from dipnet.sim.walk import late
from dipnet.store.checksum import record_checksums, stored_checksums
from dipnet.streaming import probe_disk, probe_reads, probe_records
from dipnet.streaming.probe_disk import burst_offsets
from dipnet.streaming.probe_records import fitted, regions, write_regions

SAMPLES = (
    Sample(128, 256, 1, 8192, 4, streamed=True),
    Sample(128, 256, 2, 8192, 4),
    Sample(256, 512, 1, 8192, 4, streamed=True),
    Sample(128, 256, 1, 16384, 4),
    Sample(128, 256, 2, 8192, 32),
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe in two seconds: its figures say little then."""
    monkeypatch.setattr(probe_disk, "SIZES", (512, 8192))
    monkeypatch.setattr(probe_disk, "DEPTHS", (1, 8))
    monkeypatch.setattr(probe_records, "REGION_BYTES", 1 << 18)
    monkeypatch.setattr(probe_records, "COPIES", (1, 2))
    monkeypatch.setattr(probe_records, "CALLS", 4)
    sizes = {"SCRATCH_BYTES": 8 << 20, "DISK_SECONDS": 0.05, "DRAM_BYTES": 1 << 20}
    for name, value in sizes.items():
        monkeypatch.setattr(whole, name, value)
    monkeypatch.setattr(probe_reads, "ROUNDS", 2)
    monkeypatch.setattr(probe_decoding, "SAMPLES", SAMPLES)
    monkeypatch.setattr(probe_decoding, "TRIES", 1)


def ignore(_what: str, _share: float) -> None:
    """No progress."""


@pytest.mark.usefixtures("small")
def test_a_device_and_nothing_else(tmp_path: Path) -> None:
    shares: list[float] = []
    made = probe(tmp_path, "here", lambda _what, share: shares.append(share))
    assert os.listdir(tmp_path) == []
    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[-1] <= 1
    file = tmp_path / "here.json"
    file.write_text(made.model_dump_json())
    assert load_device(file) == made
    check_plausible(made)


def check_plausible(device: Device) -> None:
    """In the units that are meant: wide bounds, as the machine may be busy."""
    assert 1e5 < device.dram.bandwidth < 1e13
    assert {(p.read_bytes, p.depth) for p in device.flash.curve} == {
        (size, depth) for size in (512, 8192) for depth in (1, 8)
    }
    assert all(1e2 < point.bandwidth < 1e12 for point in device.flash.curve)
    costs = device.engine
    assert costs is not None
    assert set(costs.products) == {"int4", "int8", "bf16"}
    assert all(p.bandwidth > 1e4 for points in costs.products.values() for p in points[:1])
    assert costs.token + costs.layer + costs.logit > 0
    assert sum(costs.selection) > 0
    assert costs.threads >= 1
    assert costs.submit + costs.ask > 0


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_what_products_take_between_operations_is_found_again(threads: int) -> None:
    loop = [8e-6, 1e-5, 2e-5, 6e-5, 1e-4, 3e-4, 6e-4]
    factor, wake, call = 2 ** (20 / 28), 8e-5, 1e-5
    real = [factor * each + float(late(factor * each, wake, threads)) + call for each in loop]
    found = between_operations(list(zip(loop, real, strict=True)), threads)
    expected = [each + float(late(each, found[0], threads)) for each in np.array(loop) * found[2]]
    assert np.add(expected, found[1]) == pytest.approx(real, rel=0.05)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("when", ["writing the scratch file", "disk", "kernels", "decoding"])
def test_nothing_is_left_after_an_interruption(when: str, tmp_path: Path) -> None:
    def interrupt(what: str, _share: float) -> None:
        if what == when:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe(tmp_path, "here", interrupt)
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("small")
def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "SCRATCH_BYTES", 1 << 60)
    with pytest.raises(InputError, match="MiB left"):
        probe(tmp_path, "here", ignore)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^[^\n]*give a folder that can be written$"):
        probe(tmp_path / "missing", "here", ignore)


def test_regions_are_records_that_the_engine_accepts(tmp_path: Path) -> None:
    file = tmp_path / "records"
    with file.open("wb") as opened:
        write_regions(opened, np.random.default_rng(0))
    content = np.fromfile(file, np.uint8)
    assert len(regions()) == 9
    for region in regions():
        size = region.units * region.record_bytes
        records = content[region.offset : region.offset + size].reshape(region.units, -1)
        expected = record_checksums(records, group=0, first_unit=0)
        assert (stored_checksums(records) == expected).all()


@pytest.mark.parametrize(("size", "depth"), [(512, 1), (512, 256), (131072, 256)])
def test_bursts_stay_in_the_file(size: int, depth: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        offsets = burst_offsets(rng, 256 << 20, size, depth)
        assert len(offsets) == depth
        assert (offsets % 512 == 0).all()
        assert offsets[0] >= 0
        assert offsets[-1] + size <= 256 << 20
        assert (np.diff(offsets) > size).all()  # neighbours would be one read


def test_costs_are_found_again() -> None:
    terms = [(1.0, 2.0, 0.0), (1.0, 5.0, 1.0), (1.0, 7.0, 9.0), (2.0, 3.0, 4.0)]
    values = [3 * a + 0.5 * b + 2 * c for a, b, c in terms]
    assert fitted(terms, values) == pytest.approx([3, 0.5, 2])


def test_no_cost_is_below_nothing() -> None:
    found = fitted([(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)], [3.0, 2.0, 1.0])
    assert min(found) == 0
    assert max(found) > 0
