"""One model in one memory on one device: golden figures, and what must not change them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dipnet.errors import InputError
from dipnet.sim.device import Device, Tier, load_device
from dipnet.sim.replay import POLICIES
from dipnet.sim.scenario import Needs, Scenario, cache_slots, run, source_slots
from dipnet.sim.sizes import kv_bytes, pinned_bytes
from dipnet.sim.target import own_target, stretched
from dipnet.sim.trace import Trace, open_trace
from dipnet.sim.trace_writer import TraceWriter
from tests.sim.recorded import SHAPE, SITES, random_masks, write

TOKENS, CONTEXT = 40, 16
RECORD = 512
"""Bytes of every record of the small model."""
UNITS = sum(site.units for site in SITES)
TARGET = own_target(SHAPE, SITES)
NEEDS = Needs.of(TARGET, "int4", CONTEXT)
PHONE = load_device("phone")
each_policy = pytest.mark.parametrize("policy", POLICIES)


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    return open_trace(write(tmp_path / "trace", random_masks(TOKENS), starts=(0, 25)))


def scenario(cache: int, policy: str = "lfu") -> Scenario:
    """One with so many bytes for the caches."""
    return Scenario(NEEDS.fixed + cache, policy, "int4", CONTEXT)


def test_needs() -> None:
    assert NEEDS.records == UNITS * RECORD
    assert NEEDS.fixed == pinned_bytes(SHAPE, "int4") + kv_bytes(SHAPE, CONTEXT)
    assert NEEDS.total == NEEDS.fixed + NEEDS.records


def test_without_a_cache_every_wanted_byte_is_read(trace: Trace) -> None:
    wanted = sum(int(mask.sum()) for mask in random_masks(TOKENS))
    figures = run(TARGET, scenario(0, "none"), trace).on(PHONE)
    assert figures.bytes_per_token == pytest.approx(wanted * RECORD / TOKENS)
    assert (figures.hit_rate, figures.cached, figures.used) == (0, 0, NEEDS.fixed)


def test_the_time_is_that_of_the_bytes(trace: Trace) -> None:
    wanted = sum(int(mask.sum()) for mask in random_masks(TOKENS)) * RECORD
    past = sum(range(25)) + sum(range(15))  # the sequences begin at 0 and 25
    touched = TOKENS * pinned_bytes(SHAPE, "int4") + past * kv_bytes(SHAPE, 1) + wanted
    took = touched / 60e9 + wanted / 1e9
    figures = run(TARGET, scenario(0, "none"), trace).on(PHONE)
    assert figures.tokens_per_second == pytest.approx(TOKENS / took)


def test_what_the_method_reads_takes_memory_and_time(trace: Trace) -> None:
    predicted = own_target(SHAPE, SITES, added=1000)
    needs = Needs.of(predicted, "int4", CONTEXT)
    assert needs.fixed == NEEDS.fixed + 4 * 1000
    held = Scenario(needs.fixed, "lfu", "int4", CONTEXT)
    plain, sparse = (run(target, held, trace).on(PHONE) for target in (TARGET, predicted))
    assert sparse.used == needs.fixed
    assert plain.cached > sparse.cached == 0  # the caches have what is left
    slow, fast = (run(each, scenario(0, "none"), trace) for each in (TARGET, TARGET))
    more = run(predicted, replace(held, policy="none"), trace).on(PHONE)
    less = slow.on(PHONE)
    assert fast.on(PHONE) == less
    extra = 1 / more.tokens_per_second - 1 / less.tokens_per_second
    assert extra == pytest.approx(4 * 1000 / 60e9)


def test_density_is_of_weights(trace: Trace) -> None:
    weights = [site.weights_per_unit for site in SITES]
    kept = sum(
        int(mask.sum()) * size for mask, size in zip(random_masks(TOKENS), weights, strict=True)
    )
    figures = run(TARGET, scenario(0), trace).on(PHONE)
    assert figures.density == pytest.approx(kept / (TOKENS * 2 * 3 * 8 * 20))


@each_policy
def test_memory_is_kept_to(trace: Trace, policy: str) -> None:
    budget = 17 * RECORD
    figures = run(TARGET, scenario(budget, policy), trace).on(PHONE)
    assert figures.cached <= budget
    assert figures.used == NEEDS.fixed + figures.cached
    assert set(figures.hit_rates) == {"mlp.in", "mlp.hidden"}


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_with_room_for_everything_nothing_is_read(trace: Trace, policy: str) -> None:
    figures = run(TARGET, scenario(NEEDS.records, policy), trace).on(PHONE)
    assert (figures.hit_rate, figures.bytes_per_token) == (1, 0)
    assert figures.used == NEEDS.total


def test_the_bound_is_one(trace: Trace) -> None:
    found = {
        policy: run(TARGET, scenario(15 * RECORD, policy), trace).on(PHONE).hit_rate or 0
        for policy in POLICIES
    }
    assert found["belady"] >= max(found["lru"], found["lfu"]) > found["none"] == 0


def test_the_dense_model_keeps_its_first_records() -> None:
    dense = own_target(SHAPE, ())
    held = scenario(0)
    whole = Needs.of(dense, "int4", CONTEXT)
    made = run(dense, replace(held, memory=whole.fixed + whole.records // 2), None, tokens=10)
    slots = sum(made.slots.values())
    units = whole.records // RECORD
    figures = made.on(PHONE)
    assert figures.density == 1
    assert figures.bytes_per_token == pytest.approx((units + 9 * (units - slots)) * RECORD / 10)


def test_the_dense_model_reads_sequences() -> None:
    """As long as keys and values are kept for, unless it is said: attention's time follows."""
    dense, held = own_target(SHAPE, ()), scenario(UNITS * RECORD)
    for sequence, longest in ((None, CONTEXT), (10, 10)):
        positions = run(dense, held, None, tokens=40, sequence=sequence).positions
        assert positions.tolist() == [at % longest for at in range(40)]


def test_half_thinned_layers_stream_the_other_half(tmp_path: Path) -> None:
    """With masks at one site only, the other's records are read by every token."""
    hidden = [site for site in SITES if site.name == "mlp.hidden"]
    with TraceWriter(tmp_path / "t", SHAPE, "glu", hidden) as writer:
        for site in hidden:
            writer.add(site.key, np.zeros((3, site.units), np.bool_))
        writer.end_tokens(3)
    target = own_target(SHAPE, hidden)
    figures = run(target, scenario(0, "none"), open_trace(tmp_path / "t")).on(PHONE)
    assert figures.bytes_per_token == 2 * 8 * RECORD
    assert figures.hit_rates == {"mlp.in": 0, "mlp.hidden": None}  # of which nothing was wanted


def test_stretched_over_itself_it_is_the_same(trace: Trace) -> None:
    target = stretched(SHAPE, SITES, SHAPE)
    found = run(target, scenario(15 * RECORD), trace).on(PHONE)
    assert found == run(TARGET, scenario(15 * RECORD), trace).on(PHONE)


def test_stretching_keeps_shares(trace: Trace) -> None:
    """Twice as deep: the same shares are cached, wanted and hit, so twice the bytes are read."""
    twice = replace(SHAPE, name="twice", layers=4)
    target = stretched(SHAPE, SITES, twice)
    needs = Needs.of(target, "int4", CONTEXT)
    assert needs.records == 2 * NEEDS.records
    one = run(TARGET, scenario(NEEDS.records // 2), trace).on(PHONE)
    other = run(target, Scenario(needs.fixed + needs.records // 2, "lfu", "int4", CONTEXT), trace)
    found = other.on(PHONE)
    assert found.hit_rate == one.hit_rate
    assert found.bytes_per_token == 2 * one.bytes_per_token


def test_recorded_sites_get_the_targets_shares() -> None:
    twice = replace(SHAPE, name="twice", layers=4)
    target = stretched(SHAPE, SITES, twice)
    slots = {(layer, name): 4 for layer in range(4) for name in ("mlp.in", "mlp.hidden")}
    assert source_slots(target, slots, SHAPE.layers, SITES) == [4, 4, 4, 4]
    slots[1, "mlp.in"] = 0
    slots[3, "mlp.in"] = 8  # the depth of the small model's layers 0 and 1
    assert source_slots(target, slots, SHAPE.layers, SITES) == [0, 4, 8, 4]


def test_devices_change_the_time_only(trace: Trace) -> None:
    made = run(TARGET, scenario(15 * RECORD), trace)
    faster = PHONE.model_copy(update={"flash": PHONE.flash.with_bandwidth(4e9)})
    slow, fast = made.on(PHONE), made.on(faster)
    assert fast.tokens_per_second > slow.tokens_per_second
    assert replace(fast, tokens_per_second=0.0) == replace(slow, tokens_per_second=0.0)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.7, 1 / 3, 0.59444])
def test_what_holds_all_holds_all_of_it(density: float) -> None:
    """To the last record, however the sites' shares are rounded."""
    sites = [replace(site, density=density) for site in SITES[::2]] + list(SITES[1::2])
    slots = cache_slots(own_target(SHAPE, sites), scenario(NEEDS.records))
    assert slots == {site.key: site.units for site in sites}


def test_too_little_memory() -> None:
    with pytest.raises(InputError, match=r"is too little for small: .* 16 tokens take") as caught:
        cache_slots(TARGET, replace(scenario(0), memory=NEEDS.fixed - 1))
    assert "\n" not in str(caught.value)


def test_a_device_without_that_memory(trace: Trace) -> None:
    small = Tier(capacity=NEEDS.fixed, bandwidth=1e9, latency=0)
    device = Device(name="tiny", description="", dram=small, flash=PHONE.flash, overlap=False)
    made = run(TARGET, scenario(RECORD), trace)
    with pytest.raises(InputError, match="of memory is more than tiny has"):
        made.on(device)
    flash = device.model_copy(update={"dram": PHONE.dram, "flash": small})
    with pytest.raises(InputError, match="of Flash, tiny has"):
        made.on(flash)


def test_no_token() -> None:
    with pytest.raises(InputError, match="no token to simulate"):
        run(own_target(SHAPE, ()), scenario(0), None, tokens=0)
