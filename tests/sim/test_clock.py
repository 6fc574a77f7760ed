"""Tokens on a clock: the paper's model, and each step of the engine's walk alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dipnet.errors import InputError
from dipnet.sim.clock import SiteLoad, seconds
from dipnet.sim.device import Device, EngineCosts, Point, Product, Tier
from dipnet.sim.groups import pinned_groups
from dipnet.sim.shape import ModelShape
from dipnet.sim.sizes import kv_bytes, pinned_bytes, unit_bytes
from dipnet.sim.trace import TraceSite
from dipnet.sim.walk import BATCH, Walk, late
from dipnet.store.geometry import Weights
from tests.sim.test_device import GB, costs, device

WIDTH, NEURONS, VOCABULARY, LAYERS = 128, 512, 256, 3
SHAPE = ModelShape(
    name="tiny",
    family="llama",
    activation="silu",
    layers=LAYERS,
    matrices={
        "q": (WIDTH, WIDTH),
        "k": (64, WIDTH),
        "v": (64, WIDTH),
        "o": (WIDTH, WIDTH),
        "gate": (NEURONS, WIDTH),
        "up": (NEURONS, WIDTH),
        "down": (WIDTH, NEURONS),
    },
    other_weights=WIDTH * VOCABULARY + 1000,
    vocabulary=VOCABULARY,
    kv_width=128,
)
CALLS = 4 * LAYERS + 1
MASKS = 2 * LAYERS


def reads_of(layer: int) -> TraceSite:
    return TraceSite(layer, "mlp.in", WIDTH, 1, 0.5, {"gate": NEURONS, "up": NEURONS})


def hidden_of(layer: int) -> TraceSite:
    return TraceSite(layer, "mlp.hidden", NEURONS // 2, 2, 0.5, {"down": 2 * WIDTH})


def loads(
    hits: tuple[int, int] = (64, 128),
    misses: tuple[int, int] = (0, 0),
    runs: tuple[int, int] | None = None,
    weights: Weights = "int4",
    masked: bool = True,
    tokens: int = 1,
) -> list[SiteLoad]:
    """What every token asks of each layer's ``mlp.in`` and ``mlp.hidden``, in units."""
    made = []
    for layer in range(LAYERS):
        for at, site in enumerate((reads_of(layer), hidden_of(layer))):
            counts = (hits[at], misses[at], (runs or misses)[at], misses[at])
            arrays = (np.full(tokens, count) for count in counts)
            made.append(SiteLoad(site, weights, *arrays, masked))
    return made


def machine(engine: EngineCosts | None = None, **changes: Any) -> Device:
    return Device(**device(engine=engine, **changes))


def flash(bandwidth: float, latency: float = 0.0) -> Tier:
    return Tier(capacity=GB, bandwidth=bandwidth, latency=latency)


def one(where: Device, asked: list[SiteLoad], **options: Any) -> float:
    return float(seconds(where, SHAPE, asked, **options)[0])


def test_the_papers_model() -> None:
    asked = loads(misses=(8, 16), tokens=2)
    reads, hidden = (unit_bytes(site(0), "int4") for site in (reads_of, hidden_of))
    missed = LAYERS * (8 * reads + 16 * hidden)
    touched = pinned_bytes(SHAPE, "int4") + LAYERS * (72 * reads + 144 * hidden)
    dram = np.array([touched, touched + kv_bytes(SHAPE, 10)]) / (60 * GB)
    context = np.array([0.0, 10.0])
    found = seconds(machine(), SHAPE, asked, context=context)
    assert found == pytest.approx(dram + missed / GB)
    hidden_behind = seconds(machine(overlap=True), SHAPE, asked, context=context)
    assert hidden_behind == pytest.approx(np.maximum(dram, missed / GB))


def test_flash_waits_once_a_site_where_it_has_a_latency() -> None:
    quick = one(machine(flash=flash(GB)), loads(misses=(4, 4)))
    slow = one(machine(flash=flash(GB, 0.5)), loads(misses=(4, 4)))
    assert slow - quick == pytest.approx(0.5 * 2 * LAYERS)


STEPS = {
    "token": 1,
    "logit": VOCABULARY,
    "layer": LAYERS,
    "number": LAYERS * (WIDTH + NEURONS),
    "key": LAYERS * SHAPE.kv_width * 7,
    "call": CALLS,
}
UNITS = LAYERS * (WIDTH + NEURONS // 2)


@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_paid_as_often_as_it_is_made(step: str) -> None:
    found = one(machine(costs(**{step: 1.0})), loads(), context=7)
    assert found == pytest.approx(STEPS[step])


def test_masks_are_paid_for_themselves_and_their_units() -> None:
    assert one(machine(costs(selection=(1.0, 0.0))), loads()) == pytest.approx(MASKS)
    assert one(machine(costs(selection=(0.0, 1.0))), loads()) == pytest.approx(UNITS)
    assert one(machine(costs(selection=(1.0, 1.0))), loads(masked=False)) < 1e-9


def test_products_take_longer_where_records_come_and_go() -> None:
    where = machine(costs(exchange=(1.0, 0.0), streaming=(0.5, 0.0)), flash=flash(1e18))
    assert one(where, loads()) == pytest.approx(0, abs=1e-6)
    assert one(where, loads(misses=(1, 0))) == pytest.approx(LAYERS)
    assert one(where, loads(misses=(1, 1), masked=False)) == pytest.approx(0.5 * 2 * LAYERS)
    where = machine(costs(exchange=(0.0, 1.0)), flash=flash(1e18))
    assert one(where, loads(misses=(1, 0))) == pytest.approx(LAYERS * WIDTH)


@pytest.mark.parametrize(
    ("wake", "threads", "more"),
    [
        (0.0, 2, 0.0),
        (4.0, 1, 0.0),  # nobody to wake
        (4.0, 2, 2.0),  # in 4 s one does what both do in 2
        (40.0, 2, 10.0),  # they come when all is done
        (8.0, 4, 6.0),
    ],
)
def test_threads_that_sleep_are_late(wake: float, threads: int, more: float) -> None:
    """A product of 10 s with all threads."""
    assert late(10.0, wake, threads) == pytest.approx(more)


def test_every_product_wakes_the_threads() -> None:
    product = Product(working_bytes=1, column=1.0, bandwidth=1e18)
    asleep, awake = (
        one(machine(costs(products={"int4": (product,)}, wake=wake)), loads())
        for wake in (2.0, 0.0)
    )
    assert asleep - awake == pytest.approx(CALLS)


def test_every_column_in_memory_is_multiplied() -> None:
    product = Product(working_bytes=1, column=1.0, bandwidth=1e18)
    found = one(machine(costs(products={"int4": (product,)})), loads())
    assert found == pytest.approx(LAYERS * (2 * WIDTH + 64 + 2 * 128) + WIDTH)


def test_reads_hide_behind_products_and_not_the_other_way() -> None:
    product = Product(working_bytes=1, column=1e-3, bandwidth=1e18)
    engine = costs(products={"int4": (product,)})
    held = one(machine(engine, flash=flash(GB)), loads(hits=(64, 128)))
    size = unit_bytes(reads_of(0), "int4")
    # One record: it is multiplied when it has come. That takes 60 ms, the records in memory 64 ms.
    soon = one(machine(engine, flash=flash(size / 0.06)), loads((64, 128), (1, 0)))
    assert soon - held == pytest.approx(LAYERS * 1e-3)
    late = one(machine(engine, flash=flash(size / 0.1)), loads((64, 128), (1, 0)))
    assert late - held == pytest.approx(LAYERS * (0.1 - 0.064 + 1e-3))


def test_bf16_multiplies_nothing_before_its_first_records_are_there() -> None:
    product = Product(working_bytes=1, column=1e-3, bandwidth=1e18)
    engine = costs(products={"int4": (product,), "bf16": (product,)})
    took = {}
    for weights in ("int4", "bf16"):
        size = unit_bytes(reads_of(0), weights)
        slow = machine(engine, flash=flash(size / 0.1))
        took[weights] = one(slow, loads((32, 128), (1, 0), weights=weights))
    # 33 records make one batch, which the last of them ends.
    assert took["bf16"] - took["int4"] == pytest.approx(LAYERS * 0.032)


def test_records_are_multiplied_as_they_arrive() -> None:
    """All but the last batch of many records is done when the last one comes."""
    product = Product(working_bytes=1, column=1e-3, bandwidth=1e18)
    engine = costs(products={"int4": (product,)})
    none = one(machine(engine, flash=flash(GB)), loads((0, 0)))
    size = unit_bytes(reads_of(0), "int4")
    slow = machine(engine, flash=flash(size / 0.01))
    assert one(slow, loads((0, 0), (WIDTH, 0))) - none == pytest.approx(
        LAYERS * (0.01 * WIDTH + BATCH * 1e-3)
    )


def test_the_cpus_part_of_reading() -> None:
    engine = costs(submit=1e-3, land=2e-3, ask=3e-3, take=4e-3, check=1e6)
    missed, runs = (8, 16), (4, 5)
    sizes = [unit_bytes(site(0), "int4") for site in (reads_of, hidden_of)]
    checked = sum(n * size for n, size in zip(missed, sizes, strict=True)) / 1e6
    found = one(machine(engine, flash=flash(1e18)), loads(misses=missed, runs=runs))
    assert found == pytest.approx(LAYERS * (3e-3 * sum(runs) + 7e-3 * sum(missed) + checked))


def test_few_large_reads_beat_many_small_ones_where_the_curve_says_so() -> None:
    rates = ((512, 1e6), (65536, 1e8))
    curve = [Point(read_bytes=size, depth=1, bandwidth=rate) for size, rate in rates]
    disk = Tier(capacity=GB, bandwidth=1e8, latency=0, curve=tuple(curve))
    apart = one(machine(costs(), flash=disk), loads(misses=(40, 60)))
    together = one(machine(costs(), flash=disk), loads(misses=(40, 60), runs=(4, 6)))
    assert together < apart / 2


def test_right_guesses_save_what_attention_takes() -> None:
    """The disk reads the next MLP's input while attention runs."""
    engine = costs(layer=0.2)
    size = unit_bytes(reads_of(0), "int4")
    where = machine(engine, flash=flash(size / 0.01))
    asked = loads(misses=(10, 0))
    without = one(where, asked)
    assert without == pytest.approx(LAYERS * (0.2 + 0.1))
    right, half = (
        one(where, asked, look_ahead=True, recall={"mlp.in": recall}) for recall in (1.0, 0.5)
    )
    assert right == pytest.approx(LAYERS * 0.2)
    assert half == pytest.approx(LAYERS * (0.2 + 0.05))


def test_guesses_cost_their_masks() -> None:
    engine = costs(selection=(1.0, 0.0), guess=(0.5, 0.0))
    asked = loads(misses=(10, 10))
    where = machine(engine, flash=flash(1e12))
    groups = {(load.site.layer, load.site.name): load.group() for load in asked}
    groups |= {(g.layer, g.name): g for g in pinned_groups(SHAPE, "int4", np.zeros(1))}
    ways = [Walk(where.flash, engine, SHAPE, "int4", groups, np.zeros(1)) for _ in range(2)]
    without, guessing = ways[0].token(None), ways[1].token({})
    assert guessing - without == pytest.approx(1.5 * MASKS, rel=1e-3)


def test_guesses_that_do_not_pay_are_not_made() -> None:
    asked = loads(misses=(10, 10))
    where = machine(costs(selection=(1.0, 0.0), guess=(0.5, 0.0)), flash=flash(1e12))
    assert one(where, asked, look_ahead=True) == one(where, asked)
    held = loads()
    assert one(where, held, look_ahead=True) == one(where, held)  # nothing to guess


def test_a_dense_model_reads_the_next_group_for_certain() -> None:
    """Then the disk never waits between the groups of a layer."""
    engine = costs(number=1e-4)
    asked = loads((64, 128), (64, 128), (1, 1), masked=False)
    where = machine(engine, flash=flash(1e6))
    ahead, without = (one(where, asked, look_ahead=on) for on in (True, False))
    missed = sum(float(load.missed_bytes[0]) for load in asked) / 1e6
    assert without == pytest.approx(missed + LAYERS * (WIDTH + NEURONS) * 1e-4)
    assert missed <= ahead < without


def test_weights_that_were_not_probed() -> None:
    with pytest.raises(InputError, match="no figures for int8"):
        one(machine(costs()), loads(weights="int8"))


counts = st.tuples(st.integers(0, 60), st.integers(0, 120))


@given(counts, counts, st.floats(1e5, 1e9), st.floats(0, 1), st.booleans())
def test_a_miss_is_never_faster_than_a_hit(
    hits: tuple[int, int], misses: tuple[int, int], speed: float, recall: float, overlap: bool
) -> None:
    """Of what a token wants; with and without the engine's costs, whatever the disk."""
    both = tuple(h + m for h, m in zip(hits, misses, strict=True))
    engine = costs(call=1e-5, selection=(0.0, 1e-8), submit=1e-6, land=1e-7, check=1e9, layer=1e-4)
    for where in (
        machine(engine, flash=flash(speed, 1e-5)),
        machine(flash=flash(speed, 1e-5), overlap=overlap),
    ):
        guesses = {"mlp.in": recall, "mlp.hidden": recall}
        some = one(where, loads(hits, misses), look_ahead=True, recall=guesses)
        all_ = one(where, loads(both), look_ahead=True, recall=guesses)
        assert some >= all_ * (1 - 1e-9)
