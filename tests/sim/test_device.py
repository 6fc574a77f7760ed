"""Device files: presets, what a curve means, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dipnet.errors import InputError
from dipnet.sim.device import Device, EngineCosts, Point, Product, Tier, load_device, presets

GB = 10**9


def device(**changes: Any) -> dict[str, Any]:
    """A small device as JSON says it, with some fields changed."""
    tier = {"capacity": 8 * GB, "bandwidth": 60.0 * GB, "latency": 0.0}
    made = {
        "format": "dipnet-device",
        "version": 1,
        "name": "small",
        "description": "for tests",
        "dram": tier,
        "flash": {**tier, "bandwidth": 1.0 * GB},
        "overlap": False,
    }
    return made | changes


def costs(**changes: Any) -> EngineCosts:
    """Engine costs of nothing, with some changed: memory that is infinitely fast, almost."""
    free = Product(working_bytes=1, column=0, bandwidth=1e18)
    named = {"check": 1e18, "frame_bytes": 32 << 20, "threads": 2, "products": {"int4": (free,)}}
    pairs = dict.fromkeys(("selection", "exchange", "streaming", "guess"), (0.0, 0.0))
    others = EngineCosts.model_fields.keys() - named.keys() - pairs.keys()
    return EngineCosts(**{**dict.fromkeys(others, 0.0), **pairs, **named, **changes})


def written(folder: Path, content: Any) -> Path:
    file = folder / "device.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def refused(name: str | Path) -> str:
    with pytest.raises(InputError) as caught:
        load_device(name)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", presets())
def test_presets_are_devices(name: str) -> None:
    found = load_device(name)
    assert found.name == name
    assert found.dram.bandwidth > found.flash.bandwidth
    assert found.dram.capacity < found.flash.capacity


def test_the_phone_is_the_papers() -> None:
    phone = load_device("phone")
    assert (phone.dram.bandwidth, phone.flash.bandwidth) == (60 * GB, GB)
    assert phone.flash.seconds(np.array([3.0]), np.array([2.0 * GB])) == pytest.approx(2.0)


def test_an_unknown_name_says_which_there_are() -> None:
    message = refused("phoen")
    assert "Did you mean 'phone'" in message
    assert all(name in message for name in presets())


def test_what_was_written_is_read(tmp_path: Path) -> None:
    made = Device(**device(engine=costs().model_dump()))
    assert load_device(written(tmp_path, made.model_dump(mode="json"))) == made


TIER = device()["flash"]
POINT = {"read_bytes": 4096, "depth": 1, "bandwidth": 1.0}
ENGINE = costs().model_dump(mode="json")
NONSENSE = {
    "not JSON": ("{", "Invalid JSON"),
    "a list": ([], "be an object"),
    "something else": ({"name": "x"}, "no format 'dipnet-device'"),
    "another version": (device(version=2), "version 2"),
    "an unknown key": (device(colour="red"), "colour"),
    "an unknown key inside": (device(flash={**TIER, "speed": 1}), "flash.speed"),
    "negative bandwidth": (device(flash={**TIER, "bandwidth": -1}), "flash.bandwidth"),
    "no bandwidth": (device(dram={**TIER, "bandwidth": 0}), "dram.bandwidth"),
    "infinite bandwidth": (json.dumps(device()).replace("1000000000.0", "1e999"), "bandwidth"),
    "zero capacity": (device(dram={**TIER, "capacity": 0}), "dram.capacity"),
    "negative latency": (device(flash={**TIER, "latency": -1e-6}), "flash.latency"),
    "a part of a curve": (
        device(flash={**TIER, "curve": [POINT, {**POINT, "read_bytes": 512, "depth": 2}]}),
        "for each of its read_bytes at each depth",
    ),
    "a point twice": (device(flash={**TIER, "curve": [POINT, POINT]}), "two points"),
    "no depth": (device(flash={**TIER, "curve": [{**POINT, "depth": 0}]}), "curve.0.depth"),
    "a missing tier": ({k: v for k, v in device().items() if k != "dram"}, "dram"),
    "a negative cost": (device(engine={**ENGINE, "layer": -1}), "engine.layer"),
    "weights nobody knows": (device(engine={**ENGINE, "products": {"int3": []}}), "products"),
    "no products": (device(engine={**ENGINE, "products": {"int4": []}}), "int4"),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_is_refused_in_one_line(what: str, tmp_path: Path) -> None:
    content, named = NONSENSE[what]
    message = refused(written(tmp_path, content))
    assert named in message
    assert "dipnet probe" in message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "laptop-nvme" in refused(tmp_path / "missing.json")
    assert "laptop-nvme" in refused(tmp_path)
    assert "larger than any device" in refused(written(tmp_path, " " * (1 << 20) + "{}"))


def curve() -> Tier:
    """Sizes of 1000 and 4000 bytes, 1 and 4 at once."""
    rates = {(1000, 1): 1e6, (1000, 4): 3e6, (4000, 1): 2e6, (4000, 4): 8e6}
    points = tuple(Point(read_bytes=s, depth=d, bandwidth=b) for (s, d), b in rates.items())
    return Tier(capacity=GB, bandwidth=8e6, latency=1e-3, curve=points)


@pytest.mark.parametrize(
    ("reads", "size", "bandwidth"),
    [
        (1, 1000, 1e6),
        (4, 4000, 3e6),
        (1, 4000, 2e6),
        (4, 16000, 8e6),
        (2, 2000, 3**0.5 * 1e6),  # half of the way between the depths, in logarithms
        (1, 2000, 2**0.5 * 1e6),  # and between the sizes
        (2, 4000, (1 * 3 * 2 * 8) ** 0.25 * 1e6),
        (100, 100 * 4000, 8e6),  # behind its ends
        (1, 400_000, 2e6),
    ],
)
def test_a_curve_at_and_between_its_points(reads: int, size: int, bandwidth: float) -> None:
    took = curve().seconds(np.array([float(reads)]), np.array([float(size)]))
    assert took == pytest.approx(size / bandwidth)


def test_small_reads_take_as_long_as_the_smallest() -> None:
    small, smallest, none = curve().seconds(np.array([4.0, 4.0, 0.0]), np.array([40.0, 4000.0, 0]))
    assert small == pytest.approx(smallest)
    assert none == 0


def test_without_a_curve_latency_and_bytes_count() -> None:
    tier = Tier(capacity=GB, bandwidth=1e6, latency=1e-3)
    took = tier.seconds(np.array([0.0, 1.0, 50.0]), np.array([0.0, 1000.0, 1000.0]))
    assert took == pytest.approx([0, 2e-3, 2e-3])


def test_another_bandwidth_moves_the_whole_curve() -> None:
    reads, size = np.array([1.0, 3.0]), np.array([1000.0, 9000.0])
    faster = curve().with_bandwidth(16e6)
    assert faster.bandwidth == 16e6
    assert faster.seconds(reads, size) == pytest.approx(curve().seconds(reads, size) / 2)


def test_products_between_what_was_measured() -> None:
    near = Product(working_bytes=1000, column=1e-8, bandwidth=4e9)
    far = Product(working_bytes=100_000, column=3e-8, bandwidth=1e9)
    found = costs(products={"int4": (near, far)})
    assert found.multiplying("int4", 10) == pytest.approx((1e-8, 1 / 4e9))
    assert found.multiplying("int4", 10_000) == pytest.approx((2e-8, (1 / 4e9 + 1e-9) / 2))
    assert found.multiplying("int4", 1e9) == pytest.approx((3e-8, 1e-9))
    with pytest.raises(InputError, match="no figures for bf16"):
        found.multiplying("bf16", 1)
