"""The replay of a trace finds what the engine found: hits, misses, records, reads and bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

import dipnet
from dipnet.cache import POLICIES
from dipnet.methods.base import Method
from dipnet.models.load import load_model
from dipnet.pack.packing import pack
from dipnet.sim.replay import Replay, replay
from dipnet.sim.sizes import divide_slots, unit_bytes
from dipnet.sim.trace import Trace, open_trace
from dipnet.store.index import read_index
from dipnet.streaming.attach import streamed
from dipnet.streaming.budget import CACHED
from tests.predicted import random_predictors

TOKENS = 16
MODEL = "demo-swiglu"
each_policy = pytest.mark.parametrize("policy", POLICIES)


@pytest.fixture(scope="module", params=[("int4", 1), ("int8", 2)], ids=["int4", "int8-blocks"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "store"
    pack(MODEL, folder, *request.param)
    return folder


def mlp_bytes(store: Path) -> int:
    return sum(group.bytes for group in read_index(store).groups if group.name in CACHED)


@torch.no_grad()
def decode(model: PreTrainedModel, prompt: int = 1) -> None:
    """A prompt of so many tokens, then token after token."""
    ids = torch.randint(2, 8000, (1, TOKENS + prompt), generator=torch.Generator().manual_seed(1))
    cache = None
    for step in ids.split([prompt, *[1] * TOKENS], dim=1):
        cache = model(step, past_key_values=cache, use_cache=True).past_key_values


def recorded(model: PreTrainedModel, file: Path, prompt: int = 1) -> Trace:
    with dipnet.record(model, file):
        decode(model, prompt)
    return open_trace(file)


def same(found: Replay, model: PreTrainedModel) -> None:
    """Site by site, and in all."""
    engine, stats = streamed(model).engine, dipnet.stats(model)
    assert any(counts.misses.any() for counts in found.counts) == (stats.bytes_read > 0)
    for site, slots, counts in zip(found.sites, found.slots, found.counts, strict=True):
        totals = engine.totals(site.key)
        assert engine.slots[site.key] == slots
        assert (counts.hits.sum(), counts.misses.sum()) == (totals["hits"], totals["misses"])
        assert counts.misses.sum() == totals["read"]
    assert found.bytes == stats.bytes_read
    assert sum(int(counts.reads.sum()) for counts in found.counts) == stats.reads


def replayed(trace: Trace, slots: Sequence[int], policy: str, weights: str) -> Replay:
    return replay(trace, slots, policy, [unit_bytes(site, weights) for site in trace.sites])


@each_policy
@pytest.mark.parametrize("share", [0, 0.4, 0.94, 1])
def test_the_engines_counts(store: Path, tmp_path: Path, policy: str, share: float) -> None:
    """From a cache of nothing to one of everything; at 0.94 some sites are held whole."""
    cache = int(share * mlp_bytes(store))
    method = dipnet.DIP(0.5)
    options = {"cache": cache, "policy": policy, "prefill": "sparse", "look_ahead": False}
    model = dipnet.load(store, method, **options)
    trace = recorded(model, tmp_path / "trace")
    assert trace.tokens == TOKENS + 1
    weights = read_index(store).weights
    found = replayed(trace, divide_slots(trace.sites, weights, cache), policy, weights)
    same(found, model)
    whole = [slots == site.units for slots, site in zip(found.slots, found.sites, strict=True)]
    assert (all(whole), any(whole)) == (share == 1, share >= 0.94)


@each_policy
def test_a_cache_aware_method(store: Path, tmp_path: Path, policy: str) -> None:
    """Its trace names the engine's slots and policy, which are the only ones that fit."""
    cache = mlp_bytes(store) // 2
    options = {"cache": cache, "policy": policy, "prefill": "sparse", "look_ahead": False}
    model = dipnet.load(store, dipnet.DIP(0.5, cache_aware=0.3), **options)
    trace = recorded(model, tmp_path / "trace")
    assert trace.cache is not None
    weights = read_index(store).weights
    assert list(trace.cache.slots) == divide_slots(trace.sites, weights, cache)
    same(replayed(trace, trace.cache.slots, trace.cache.policy, weights), model)


@each_policy
def test_a_dense_prompt_leaves_the_caches_cold(store: Path, tmp_path: Path, policy: str) -> None:
    """It is not in the trace; what it read is not in the counts either."""
    cache = mlp_bytes(store) // 3
    model = dipnet.load(store, dipnet.DIP(0.4), cache=cache, policy=policy, look_ahead=False)
    trace = recorded(model, tmp_path / "trace", prompt=9)
    assert trace.tokens == TOKENS
    weights = read_index(store).weights
    found = replayed(trace, divide_slots(trace.sites, weights, cache), policy, weights)
    for site, counts in zip(found.sites, found.counts, strict=True):
        totals = streamed(model).engine.totals(site.key)
        assert (counts.hits.sum(), counts.misses.sum()) == (totals["hits"], totals["misses"])


@each_policy
def test_evaluation_and_the_engine_count_alike(tmp_path: Path, policy: str) -> None:
    """A window at once under `sparsify`, with the slots that an engine would have."""
    method: Method = dipnet.DIP(0.5, cache_aware=0.3)
    model = load_model(MODEL, device="cpu").model
    with dipnet.sparsify(model, method, cache=dipnet.CacheSettings(0.4, policy)):
        ids = torch.randint(2, 8000, (2, TOKENS), generator=torch.Generator().manual_seed(1))
        with dipnet.record(model, tmp_path / "trace"), torch.no_grad():
            model(ids, use_cache=False)
        counted = dipnet.usage(model).cache()
    trace = open_trace(tmp_path / "trace")
    assert trace.cache is not None
    found = replayed(trace, trace.cache.slots, policy, "int4")
    keys = [f"{site.layer}.{site.name}" for site in found.sites]
    by_site = dict(zip(keys, found.counts, strict=True))
    assert {name: counts.hits.sum() for name, counts in by_site.items()} == counted.hits
    assert {name: counts.misses.sum() for name, counts in by_site.items()} == counted.misses
    assert found.hit_rate() == pytest.approx(counted.hit_rate)


@each_policy
@pytest.mark.parametrize("share", [0, 0.4, 1])
def test_whole_neurons(tmp_path: Path, policy: str, share: float) -> None:
    """Chosen a block ahead, with and without asking for their records there."""
    store, method = tmp_path / "store", dipnet.RandomMasks(mlp_density=0.2, head_density=0.5)
    pack("demo-relu", store, "int8", unit="neuron")
    predicted = dipnet.DejaVu(
        mlp_density=0.2,
        predictors=random_predictors(load_model("demo-relu", device="cpu").model, 1, ["mlp"]),
    )
    cache = int(share * mlp_bytes(store))
    for chosen, look_ahead in ((method, False), (predicted, False), (predicted, True)):
        options = {"cache": cache, "policy": policy, "prefill": "sparse", "look_ahead": look_ahead}
        model = dipnet.load(store, chosen, **options)
        trace = recorded(model, tmp_path / "trace")
        slots = divide_slots(trace.sites, "int8", cache)
        found = replayed(trace, slots, policy, "int8")
        neurons = [at for at, site in enumerate(trace.sites) if site.name == "mlp.neuron"]
        assert len(neurons) == 8
        for at in neurons:
            totals = streamed(model).engine.totals(trace.sites[at].key)
            counts = found.counts[at]
            assert streamed(model).engine.slots[trace.sites[at].key] == slots[at]
            assert (counts.hits.sum(), counts.misses.sum()) == (totals["hits"], totals["misses"])
            assert counts.misses.sum() == totals["read"] + totals["guessed"]
            assert totals["guessed"] == totals["useful"]
        stats = dipnet.stats(model)
        missed = sum(int(found.counts[at].misses.sum()) for at in neurons)
        size = read_index(store).neurons.record_bytes
        assert missed * size <= stats.bytes_read
        assert (missed > 0) == (stats.bytes_read > 0) == (share < 1)
