"""Streaming changes no bit: not the cache, the disk, the threads, nor what is read ahead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import dipnet
from dipnet import _native
from dipnet.cache import CacheSlots
from dipnet.cache.reference import Cache
from dipnet.errors import InputError
from dipnet.methods.base import Method
from dipnet.store.geometry import WEIGHTS, Weights
from dipnet.streaming import engine as engine_module
from dipnet.streaming.engine import Reader
from dipnet.streaming.linear import EngineCache
from tests.families import every_family, random_tokens, shared
from tests.matrix import METHODS, calibrated
from tests.streaming.conftest import Stores
from tests.streaming.decoding import TOKENS, attachment, decode, decode_alone, load
from tests.streaming.records import instruction_sets

STREAMED = [
    "dense",
    "dip",
    "dip-explicit",
    "dip-attention",
    "dip-allocation",
    "dip-scores",
    "glu",
    "teal",
    "teal-mlp",
]
AWARE = dipnet.DIP(0.5, cache_aware=0.2)
QUANTISED: list[Weights] = ["int4", "int8"]


def method_of(family: str, name: str) -> Method:
    return calibrated(family, name)


def same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    assert torch.equal(decode(model), decode(other))
    assert torch.equal(decode_alone(model), decode_alone(other))


@every_family
@pytest.mark.parametrize("weights", WEIGHTS)
def test_streamed_is_resident(stores: Stores, family: str, weights: Weights) -> None:
    """Prompts, batches, left padding, decoding; and something was really streamed."""
    store, method = stores(family, weights), dipnet.DIP(0.5)
    model = load(store, method, share=0.5)
    same(model, load(store, method))
    mlp = dipnet.stats(model).sites["mlp.in"]
    assert mlp.misses > 0
    assert mlp.read > 0


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("prefill", ["sparse", "dense", 3])
def test_every_method(stores: Stores, name: str, prefill: Any) -> None:
    store, method = stores("llama", "int4"), method_of("llama", name)
    options = {"prefill": prefill}
    same(load(store, method, share=0.5, **options), load(store, method, **options))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_blocks(stores: Stores, weights: Weights) -> None:
    store, method = stores("llama", weights, 4), dipnet.DIP(0.5)
    model = load(store, method, share=0.5)
    same(model, load(store, method))
    assert dipnet.usage(model).density().mlp == pytest.approx(0.5, abs=0.06)


OPTIONS: list[dict[str, Any]] = [
    {"look_ahead": False, "share": 0.5},
    {"cache": 0},
    {"share": 0.2, "policy": "lru"},
    {"share": 0.5, "policy": "lfu", "reader": Reader(backend="pread", depth=2)},
    {"share": 0.5, "reader": Reader(frame_bytes=0)},
    {"memory": "64GiB"},
]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(stores: Stores, weights: Weights, options: dict[str, Any]) -> None:
    store, method = stores("qwen2", weights), dipnet.DIP(0.4)
    same(load(store, method, **options), load(store, method))


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("method", [AWARE, dipnet.DIP(0.5)], ids=["aware", "plain"])
def test_threads(
    stores: Stores, weights: Weights, method: Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(engine_module, "default_threads", lambda n=threads: n)
        made.append(decode(load(stores("llama", weights), method, share=0.5)))
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_cache_aware_masks_know_no_look_ahead(stores: Stores, weights: Weights) -> None:
    """Nor the backend of the disk: the masks depend on the cache, and it on the masks."""
    store = stores("llama", weights)
    options: list[dict[str, Any]] = [
        {"look_ahead": True},
        {"look_ahead": False},
        {"reader": Reader(backend="pread", depth=1)},
    ]
    models = [load(store, AWARE, share=0.5, **each) for each in options]
    same(models[0], models[1])
    hits = [dipnet.usage(model).cache() for model in models[:2]]
    assert hits[0] == hits[1]
    assert torch.equal(decode(models[2]), decode(load(store, AWARE, share=0.5)))


@pytest.mark.parametrize("weights", QUANTISED)
def test_cache_aware_masks_know_no_instruction_set(stores: Stores, weights: Weights) -> None:
    best, made = _native.instruction_set(), []
    try:
        for name in instruction_sets():
            _native.use_instruction_set(name)
            made.append(decode(load(stores("llama", weights), AWARE, share=0.5)))
    finally:
        _native.use_instruction_set(best)
    assert all(torch.equal(made[0], other) for other in made)


def test_cache_aware_masks_keep_what_is_there(stores: Stores) -> None:
    rates = []
    for method in (AWARE, dipnet.DIP(0.5)):
        model = load(stores("llama", "int8"), method, share=0.5)
        decode(model)
        rates.append(dipnet.stats(model).sites["mlp.in"].hit_rate)
    assert rates[0] > rates[1]


@pytest.mark.parametrize("policy", ["lru", "lfu"])
@pytest.mark.parametrize("name", ["dip", "dip-attention", "teal", "dense"])
def test_the_cache_is_the_references(
    stores: Stores, policy: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hits, misses, admissions and residents, access by access."""
    seen: dict[Any, list[Any]] = {}
    access = EngineCache.access

    def recorded(self: EngineCache, wanted: Any) -> Any:
        found = access(self, wanted)
        seen.setdefault(self._key, []).append((wanted.copy(), found, self.resident.copy()))
        return found

    monkeypatch.setattr(EngineCache, "access", recorded)
    method = method_of("llama", name)
    model = load(stores("llama", "int8"), method, share=0.5, policy=policy)
    decode(model)
    engine = attachment(model).engine
    assert bool(seen) == (name != "dense")
    for key, accesses in seen.items():
        group = engine.index.group(*key)
        cache = Cache(group.units, engine.slots[key], policy)
        if engine.slots[key] == group.units:
            cache.access(accesses[0][0] | True)  # held from the start
        for wanted, found, resident in accesses:
            assert cache.access(wanted) == found
            assert (cache.resident == resident).all()
        totals = engine.totals(key)
        assert totals["hits"] == sum(found[0] for _, found, _ in accesses)
        assert totals["misses"] == sum(found[1] for _, found, _ in accesses)


@pytest.mark.parametrize("family", ["llama", "llama-biases", "phi3", "gemma3", "qwen3", "opt"])
@pytest.mark.parametrize("method", [AWARE, dipnet.DIP(0.6)], ids=["aware", "plain"])
def test_the_same_as_sparsify(stores: Stores, family: str, method: Method) -> None:
    """bf16 multiplies as torch does, so that masks, hits and densities are the same."""
    model = load(stores(family, "bf16"), method, share=0.5, policy="lfu")
    found = decode(model)
    slots = attachment(model).engine.slots
    dense = shared(family, torch.float32)
    rounded = type(dense)(dense.config).eval()
    rounded.load_state_dict(
        {n: v.bfloat16().float() if v.dim() > 1 else v for n, v in dense.state_dict().items()}
    )
    with dipnet.sparsify(rounded, method, cache=CacheSlots(slots, "lfu")) as sparse:
        expected = decode(sparse)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert dipnet.usage(model).cache() == dipnet.usage(sparse).cache()
        assert dipnet.usage(model).density() == dipnet.usage(sparse).density()


@pytest.mark.parametrize("family", ["llama", "opt", "gemma2"])
def test_density_one_is_dense(stores: Stores, family: str) -> None:
    for weights in WEIGHTS:
        store = stores(family, weights)
        dense = load(store, None)
        for method in (dipnet.DIP(1.0), dipnet.GLUPruning(1.0), dipnet.DIP(1.0, cache_aware=0.1)):
            same(load(store, method, share=0.5), dense)


@pytest.mark.parametrize("family", ["llama", "mistral", "opt", "gemma3"])
def test_decoding_is_one_sequence(stores: Stores, family: str) -> None:
    """With the key/value cache as without."""
    model = load(stores(family, "bf16"), dipnet.DIP(0.5), share=0.5)
    stepwise = decode_alone(model)
    with torch.no_grad():
        whole = model(TOKENS[:1], use_cache=False).logits
    torch.testing.assert_close(stepwise, whole, rtol=1e-3, atol=1e-4)


def test_a_long_prompt_goes_in_pieces(stores: Stores) -> None:
    tokens = random_tokens(3, 60, seed=5)  # 180 rows of 64
    store = stores("llama", "int4")
    made = []
    for share in (None, 0.5):
        with torch.no_grad():
            made.append(load(store, dipnet.DIP(0.5), share=share)(tokens).logits)
    assert torch.equal(*made)


def test_dense_streaming_keeps_what_it_has(stores: Stores) -> None:
    """The first records stay, whatever passes by: each token reads the others, and no more."""
    model = load(stores("llama", "int4"), None, share=0.5, look_ahead=False)
    engine = attachment(model).engine
    decode_alone(model)
    for _ in range(2):
        dipnet.reset_stats(model)
        with torch.no_grad():
            model(torch.tensor([[5]]))
        for key, held in engine.slots.items():
            group, totals = engine.index.group(*key), engine.totals(key)
            assert totals["read"] == totals["misses"] == group.units - held
            assert engine.resident(key)[:held].all()
            assert not engine.resident(key)[held:].any()


@pytest.mark.parametrize(
    "method",
    [
        dipnet.GatePruning(0.5),
        dipnet.UpPruning(0.6),
        dipnet.GLUOracle(0.4),
        dipnet.CATS(0.5),
        dipnet.WINA(0.5),
        dipnet.Wanda(0.5),
        dipnet.TEAL(0.5),
        dipnet.DIP(0.5, hidden_block=4),
        dipnet.DIP(0.5, hidden_block=5),
    ],
    ids=lambda method: method.name,
)
def test_methods_that_cannot_run(stores: Stores, method: Method) -> None:
    with pytest.raises(InputError) as caught:
        load(stores("llama", "int8"), method)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("name", ["cats", "wina", "wanda"])
def test_calibrated_methods_that_cannot_run(stores: Stores, name: str) -> None:
    with pytest.raises(InputError, match=METHODS[name].method.name) as caught:
        load(stores("llama", "int8"), calibrated("llama", name))
    assert "\n" not in str(caught.value)


def test_the_callers_torch_threads_stay(stores: Stores) -> None:
    model = load(stores("llama", "int8"))
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        decode(model)
        assert torch.get_num_threads() == threads
        with pytest.raises((InputError, IndexError, ValueError)):
            model(torch.tensor([[10**6]]))
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)


def test_generate(stores: Stores) -> None:
    """Hugging Face's own loop, greedy and sampled."""
    store, prompt = stores("llama", "int4"), torch.tensor([[3, 9, 4]])
    for options in ({"do_sample": False}, {"do_sample": True, "num_beams": 2}):
        made = []
        for share in (None, 0.5):
            model = load(store, dipnet.DIP(0.5), share=share)
            torch.manual_seed(1)
            made.append(model.generate(prompt, max_new_tokens=8, **options))
        assert torch.equal(*made)
