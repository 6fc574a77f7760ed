"""What is swept for a trace: memories, policies, devices, and a trace with a cache of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dipnet.errors import InputError
from dipnet.sim.device import load_device
from dipnet.sim.report import Simulation, as_json
from dipnet.sim.sweep import Grid, Memory, Outcome, longest_sequence, parse_memory, simulate_trace
from dipnet.sim.trace import Trace, TraceCache, open_trace
from tests.sim.recorded import SHAPE, random_masks, write

TOKENS = 30
PHONE = load_device("phone")
WHOLE, MOST = Memory(1.0, relative=True), Memory(0.9, relative=True)
GRID = Grid([PHONE], [WHOLE, MOST], ["none", "lru"], "int4")
SLOTS = (2, 5, 4, 5)


@pytest.fixture
def trace(tmp_path: Path) -> Trace:
    return open_trace(write(tmp_path / "trace", random_masks(TOKENS), starts=(0, 20)))


@pytest.fixture
def aware(tmp_path: Path) -> Trace:
    """Random masks, and the claim that this cache decided them."""
    cache = TraceCache("lru", SLOTS, 0.5)
    return open_trace(write(tmp_path / "aware", random_masks(TOKENS), cache=cache))


def named(rows: list[Outcome]) -> list[tuple[str, str]]:
    return [(row.asked.label, row.scenario.policy) for row in rows]


def test_memories() -> None:
    assert parse_memory("2KiB") == Memory(2048)
    assert parse_memory(" 50 % ") == Memory(0.5, relative=True)
    assert Memory(0.5, relative=True).bytes(3000) == 1500
    for wrong in ("0%", "101%", "x%", "-5%", "nan%"):
        with pytest.raises(InputError, match="no share of a model"):
            parse_memory(wrong)
    with pytest.raises(InputError, match="no size in memory"):
        parse_memory("much")


def test_every_memory_with_every_policy(trace: Trace) -> None:
    rows = list(simulate_trace(trace, GRID))
    masked = ("dip:density=0.5", "none"), ("dip:density=0.5", "lru")
    assert named(rows) == [("dense", "lru"), ("dense", "lru"), *masked, *masked]
    sizes = [row.scenario.memory for row in rows]
    assert sizes == [sizes[0], sizes[1], sizes[0], sizes[0], sizes[1], sizes[1]]
    assert all(row.perplexity is None and row.scenario.context == 20 for row in rows)


def test_devices_share_a_replay(trace: Trace) -> None:
    devices = [PHONE, PHONE.model_copy(update={"flash": PHONE.flash.with_bandwidth(2e9)})]
    replays: list[int] = []
    grid = replace(GRID, devices=devices, policies=["lru"], memories=[MOST])
    rows = list(simulate_trace(trace, grid, lambda done, total: replays.append(done == total)))
    assert [row.device.flash.bandwidth for row in rows] == [1e9, 2e9, 1e9, 2e9]
    assert sum(replays) == 1


def test_by_default_it_is_the_devices_memory(trace: Trace) -> None:
    rows = list(simulate_trace(trace, replace(GRID, memories=[], policies=[])))
    assert [(row.scenario.memory, row.scenario.policy) for row in rows] == [(8000000000, "lfu")] * 2
    assert all(row.figures.hit_rate == 1 for row in rows)


def test_the_longest_sequence(trace: Trace) -> None:
    assert longest_sequence(trace) == 20


def test_a_trace_with_a_cache_keeps_it(aware: Trace) -> None:
    grid = replace(GRID, memories=[], policies=[])
    dense, row = simulate_trace(aware, grid)
    assert row.asked.gamma == 0.5
    assert row.scenario.policy == "lru"
    assert row.figures.cached == sum(SLOTS) * 512
    assert row.scenario.memory == row.figures.used == dense.scenario.memory
    assert dense.figures.used <= dense.scenario.memory


@pytest.mark.parametrize("swept", [{"policies": ["lfu"]}, {"memories": [Memory(10**6)]}])
def test_a_trace_with_a_cache_is_not_swept(aware: Trace, swept: dict) -> None:
    grid = replace(replace(GRID, memories=[], policies=[]), **swept)
    with pytest.raises(InputError, match=r"a cache \(lru\) decided the masks"):
        list(simulate_trace(aware, grid))


def test_a_cache_is_stretched_too(aware: Trace) -> None:
    grid = replace(GRID, memories=[], policies=[], shape=replace(SHAPE, name="twice", layers=4))
    _, row = simulate_trace(aware, grid)
    assert row.figures.cached == 2 * sum(SLOTS) * 512


def test_a_memory_that_fits_no_device_is_refused_first(trace: Trace) -> None:
    for memory in (Memory(10), Memory(9e9)):
        rows = simulate_trace(trace, replace(GRID, memories=[WHOLE, memory]))
        with pytest.raises(InputError, match="of memory is"):
            next(rows)


def test_what_is_stretched_says_so(trace: Trace) -> None:
    rows = list(simulate_trace(trace, GRID))
    needs = GRID.needs(SHAPE, 20)
    assert Simulation("a", "a", "trace", rows, needs).remark is None
    remark = Simulation("a", "b", "trace", rows, needs).remark
    assert remark is not None
    assert "those of a, laid over the shape of b" in remark
    found = as_json(Simulation("a", "b", "trace", rows, needs))
    assert (found["stretched"], found["remark"]) == (True, remark)
    assert found["bytes"]["records"] == needs.records
