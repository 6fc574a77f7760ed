"""A model evaluated and simulated: its masks, caches and perplexities are those of evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

import dipnet
from dipnet.cache import CacheSlots
from dipnet.errors import InputError
from dipnet.eval.simulate import Refusal, Simulator
from dipnet.eval.sweep import Job, Setting
from dipnet.methods.base import Method
from dipnet.models.load import LoadedModel
from dipnet.models.recording import trace_sites
from dipnet.sim.device import load_device
from dipnet.sim.scenario import cache_slots
from dipnet.sim.shape import load_shape
from dipnet.sim.sweep import Grid, Memory, Outcome

PHONE = load_device("phone")
TOKENS = torch.arange(100) * 37 % 8192
SETTING = Setting(window=50, stride=50)
SOME = Memory(0.82, relative=True)
"""About half of the tiny model's MLP has room there: its head and attention are most of it."""


def simulator(
    loaded: LoadedModel, *policies: str, memories: Sequence[Memory] = (SOME,)
) -> Simulator:
    grid = Grid([PHONE], memories, policies, "int4")
    return Simulator(loaded, TOKENS, SETTING, grid, ready=lambda method: method)


def job(method: Method) -> Job:
    return Job(method.name, None, method)


def rows(simulator: Simulator, *jobs: Job) -> list[Outcome]:
    """The rows of the jobs, without the dense model's."""
    found = [row for row in simulator.rows(jobs) if isinstance(row, Outcome)]
    return [row for row in found if row.asked.label != "dense"]


def perplexity(loaded: LoadedModel, method: Method, cache: CacheSlots | None = None) -> float:
    with dipnet.sparsify(loaded.model, method, cache=cache) as model:
        return dipnet.perplexity(model, TOKENS, window=50).perplexity


def test_plain_masks_are_evaluated_once(loaded: LoadedModel) -> None:
    started: list[str] = []
    watched = replace(
        simulator(loaded, "none", "lru", "belady"), started=lambda asked: started.append(asked.line)
    )
    found = rows(watched, job(dipnet.DIP(0.5)))
    assert started == ["dense", "dip"]
    assert watched.evaluations([job(dipnet.DIP(0.5))]) == 2
    assert [row.scenario.policy for row in found] == ["none", "lru", "belady"]
    assert {row.perplexity for row in found} == {perplexity(loaded, dipnet.DIP(0.5))}
    assert all(row.figures.tokens == 100 for row in found)
    assert found[0].figures.density == pytest.approx(0.5, abs=0.02)


def test_the_dense_model_comes_first(loaded: LoadedModel) -> None:
    first, *_ = simulator(loaded, "lru").rows([])
    assert isinstance(first, Outcome)
    assert first.asked.label == "dense"
    assert first.perplexity == dipnet.perplexity(loaded.model, TOKENS, window=50).perplexity
    assert first.figures.tokens == 100


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_masks_that_prefer_what_is_in_memory(loaded: LoadedModel, policy: str) -> None:
    """Evaluated with the slots of that memory, and replayed to evaluation's own hits."""
    method = dipnet.DIP(0.5, cache_aware=0.2)
    simulated = simulator(loaded, policy)
    (row,) = rows(simulated, job(method))
    sites = trace_sites(method.sites(dipnet.describe(loaded.model)))
    slots = cache_slots(simulated.grid.target(simulated.shape, sites), row.scenario)
    with dipnet.sparsify(loaded.model, method, cache=CacheSlots(slots, policy)) as model:
        measured = dipnet.perplexity(model, TOKENS, window=50).perplexity
        counts = dipnet.usage(model).cache()
    assert 0 < sum(slots.values()) < sum(site.units for site in sites)
    assert row.perplexity == measured
    assert row.asked.gamma == 0.2
    for name, found in row.figures.hit_rates.items():
        hits = sum(counts.hits[f"{layer}.{name}"] for layer in range(2))
        misses = sum(counts.misses[f"{layer}.{name}"] for layer in range(2))
        assert found == pytest.approx(hits / (hits + misses))


def test_every_memory_decides_its_own_masks(loaded: LoadedModel) -> None:
    whole = Memory(1.0, relative=True)
    simulated = simulator(loaded, "lru", memories=[SOME, whole])
    aware = job(dipnet.DIP(0.5, cache_aware=0.2))
    some, everything = rows(simulated, aware)
    assert simulated.evaluations([aware]) == 3
    assert everything.perplexity == perplexity(loaded, dipnet.DIP(0.5))  # nothing to prefer
    assert some.perplexity != everything.perplexity
    assert everything.figures.hit_rate == 1


def test_no_bound_for_masks_that_depend_on_the_cache(loaded: LoadedModel) -> None:
    simulated = simulator(loaded, "none", "lru", "belady")
    found = list(simulated.rows([job(dipnet.DIP(0.5, cache_aware=0.2))]))
    (refusal,) = [row for row in found if isinstance(row, Refusal)]
    assert "need lru or lfu" in refusal.reason
    assert [row.scenario.policy for row in found if isinstance(row, Outcome)] == ["lru", "lru"]


def test_gamma_one_is_plain(loaded: LoadedModel) -> None:
    simulated = simulator(loaded, "lfu")
    plain, one = job(dipnet.DIP(0.5)), job(dipnet.DIP(0.5, cache_aware=1.0))
    first, second = rows(simulated, plain, one)
    assert first.figures == second.figures


def test_methods_that_cannot_be_simulated_say_why(loaded: LoadedModel) -> None:
    jobs = [job(dipnet.Wanda(0.5)), Job("gate", 0.2, None, "gate reads more")]
    calibrated = dipnet.calibrate(loaded.model, dipnet.Wanda(0.5), TOKENS)
    simulated = replace(simulator(loaded, "lru"), ready=lambda _: calibrated)
    refusals = [row for row in simulated.rows(jobs) if isinstance(row, Refusal)]
    assert "the same for every token" in refusals[0].reason
    assert refusals[1].reason == "gate reads more"
    dipnet.perplexity(loaded.model, TOKENS, window=50)  # and the model is as it was


def test_a_shape_stretches_the_caches_too(loaded: LoadedModel) -> None:
    grid = Grid([PHONE], [Memory(0.6, relative=True)], ["lfu"], "int4", load_shape("phi-3-mini"))
    simulated = Simulator(loaded, TOKENS, SETTING, grid, ready=lambda method: method)
    plain, aware = rows(simulated, job(dipnet.DIP(0.5)), job(dipnet.DIP(0.5, cache_aware=0.2)))
    assert plain.figures.used > 1e9
    assert plain.perplexity == perplexity(loaded, dipnet.DIP(0.5))
    assert plain.figures.hit_rate is not None
    assert aware.figures.hit_rate is not None
    assert 0 < plain.figures.hit_rate < aware.figures.hit_rate < 1
    assert plain.figures.cached == aware.figures.cached


def test_too_little_memory_is_found_before_any_evaluation(loaded: LoadedModel) -> None:
    started: list[str] = []
    small = simulator(loaded, "lru", memories=[Memory(1000)])
    watched = replace(small, started=lambda asked: started.append(asked.line))
    with pytest.raises(InputError, match="is too little for"):
        list(watched.rows([]))
    assert started == []
