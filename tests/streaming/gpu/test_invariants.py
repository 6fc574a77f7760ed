"""HBM as the cache: logits, masks, hits and misses are the CPU engine's and those of `sparsify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import dipnet
from dipnet.cache import CacheSlots
from dipnet.methods.base import Method
from dipnet.sim.trace import open_trace
from dipnet.store.geometry import WEIGHTS, Weights
from dipnet.store.index import read_index
from dipnet.streaming.gpu.groups import CachedGroup
from tests.families import every_family, tiny
from tests.matrix import calibrated
from tests.streaming import decoding
from tests.streaming.conftest import Stores
from tests.streaming.decoding import ATTENDED, TOKENS, load
from tests.streaming.gpu.placed import DEVICE, place, placed
from tests.streaming.unpacked import unpacked

AWARE = dipnet.DIP(0.5, cache_aware=0.2)
CLOSE = {"rtol": 1e-3, "atol": 1e-4}
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
PROMPT = torch.tensor([[3, 9, 4]], device=DEVICE)


def method_of(family: str, name: str) -> Method:
    return calibrated(family, name)


def decode(model: PreTrainedModel) -> Tensor:
    return decoding.decode(model, TOKENS.to(DEVICE), ATTENDED.to(DEVICE)).cpu()


def decode_alone(model: PreTrainedModel) -> Tensor:
    return decoding.decode(model, TOKENS[:1].to(DEVICE), ATTENDED[:1].to(DEVICE)).cpu()


def generated(model: PreTrainedModel, **options: Any) -> list[int]:
    ids = model.generate(PROMPT.to(model.device), max_new_tokens=12, do_sample=False, **options)
    return ids[0].tolist()


def caches(model: PreTrainedModel) -> dict[Any, tuple[int, int, list[bool]]]:
    """Hits, misses and residents of every cache."""
    return {
        key: (*group.cache.counts.tolist()[:2], (group.cache.slot_of >= 0).tolist())
        for key, group in placed(model).groups.items()
        if isinstance(group, CachedGroup)
    }


def engine_caches(model: PreTrainedModel) -> dict[Any, tuple[int, int, list[bool]]]:
    engine = decoding.attachment(model).engine
    return {
        key: (
            engine.totals(key)["hits"],
            engine.totals(key)["misses"],
            engine.resident(key).tolist(),
        )
        for key, slots in engine.slots.items()
        if slots < engine.index.group(*key).units
    }


@every_family
@pytest.mark.parametrize("method", [AWARE, dipnet.DIP(0.6)], ids=["aware", "plain"])
def test_the_same_as_the_cpus_engine(stores: Stores, family: str, method: Method) -> None:
    """Prompts, batches, left padding, decoding; bf16 multiplies as torch does on both."""
    store = stores(family, "bf16")
    found, expected = place(store, method, 0.5), load(store, method, share=0.5)
    for run, wanted in ((decode, decoding.decode), (decode_alone, decoding.decode_alone)):
        torch.testing.assert_close(run(found), wanted(expected), **CLOSE)
    assert caches(found) == engine_caches(expected)
    assert any(misses for _, misses, _ in caches(found).values())
    assert dipnet.usage(found).cache() == dipnet.usage(expected).cache()
    assert dipnet.usage(found).density() == dipnet.usage(expected).density()


@pytest.mark.parametrize("prefill", ["sparse", "dense", 3])
@pytest.mark.parametrize(
    ("name", "policy"), [*((name, "lfu") for name in STREAMED), ("dip", "lru"), ("teal", "lru")]
)
def test_every_method(stores: Stores, name: str, prefill: Any, policy: str) -> None:
    store, method = stores("llama", "bf16"), method_of("llama", name)
    options: dict[str, Any] = {"share": 0.5, "prefill": prefill, "policy": policy}
    found, expected = place(store, method, **options), load(store, method, **options)
    torch.testing.assert_close(decode(found), decoding.decode(expected), **CLOSE)
    assert dipnet.usage(found).cache() == dipnet.usage(expected).cache()
    assert dipnet.usage(found).density() == dipnet.usage(expected).density()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("block", [1, 2, 4])
@pytest.mark.parametrize("method", [AWARE, dipnet.DIP(0.5)], ids=["aware", "plain"])
def test_weights_and_blocks(stores: Stores, weights: Weights, block: int, method: Any) -> None:
    """The store's own numbers: no activation is rounded, as on the CPU."""
    store = stores("llama", weights, block)
    model = place(store, method, 0.5, policy="lfu")
    found = decode(model)
    groups = placed(model).groups.items()
    slots = {key: g.cache.slots for key, g in groups if isinstance(g, CachedGroup)}
    dense = unpacked(store, tiny("llama")).eval()
    blocks = dipnet.DIP(0.5, cache_aware=method.cache_aware, hidden_block=block)
    with dipnet.sparsify(dense, blocks, cache=CacheSlots(slots, "lfu")) as sparse:
        torch.testing.assert_close(found, decoding.decode(sparse), **CLOSE)
        assert dipnet.usage(model).cache() == dipnet.usage(sparse).cache()


@pytest.mark.parametrize("share", [0, 0.02, 0.3, 1])
@pytest.mark.parametrize("weights", ["bf16", "int4"])
def test_with_plain_masks_the_cache_changes_nothing(
    stores: Stores, weights: Weights, share: float
) -> None:
    store = stores("qwen2", weights)
    whole, cached = (place(store, dipnet.DIP(0.4), each) for each in (None, share))
    torch.testing.assert_close(decode(cached), decode(whole), **CLOSE)
    assert generated(cached) == generated(whole)


OURS = [(family, "dip-attention") for family in ("llama-biases", "qwen3", "phi3", "opt")]


@pytest.mark.parametrize(
    ("family", "name"), [*OURS, *(("qwen2", name) for name in ("dense", "dip", "teal"))]
)
@pytest.mark.parametrize("prefill", ["dense", "sparse"])
def test_our_loop_is_hugging_faces(stores: Stores, family: str, name: str, prefill: Any) -> None:
    """The same text, and what it leaves in the caches; the CPU's engine writes it, too."""
    store, method = stores(family, "bf16"), method_of(family, name)
    ours, theirs = (place(store, method, 0.4, prefill=prefill) for _ in range(2))
    text = generated(ours)
    assert placed(ours).decoding._replay is not None
    assert generated(theirs, return_dict_in_generate=False, prefill_chunk_size=64) == text
    assert placed(theirs).decoding._replay is None
    assert caches(ours) == caches(theirs)
    assert dipnet.usage(ours).density() == dipnet.usage(theirs).density()
    engine = load(store, method, share=0.4, prefill=prefill)
    assert engine.generate(PROMPT.cpu(), max_new_tokens=12, do_sample=False)[0].tolist() == text
    if name != "dense":  # it wants everything, and is told of the prompt, too
        assert {key: caches(ours)[key] for key in placed(ours).usage.sites if "mlp" in key[1]} == {
            key: engine_caches(engine)[key] for key in placed(ours).usage.sites if "mlp" in key[1]
        }


def test_what_comes_after_the_end_uses_no_cache(stores: Stores) -> None:
    """The device computes a token beyond the end of a text: nothing of it stays."""
    store = stores("llama", "bf16")
    first = generated(place(store, AWARE, 0.4))
    end = first[8]
    ended, stopped = (place(store, AWARE, 0.4) for _ in range(2))
    assert generated(ended, eos_token_id=end) == first[: first.index(end, 3) + 1]
    new = first.index(end, 3) + 1 - PROMPT.shape[1]
    stopped.generate(PROMPT, max_new_tokens=new, do_sample=False)
    assert caches(ended) == caches(stopped)
    assert dipnet.usage(ended).density() == dipnet.usage(stopped).density()


def test_batches_in_our_loop(stores: Stores) -> None:
    """Row after row, as the caches of the CPU's engine are used."""
    store, prompts = stores("llama", "bf16"), TOKENS[:, :4]
    options = {"max_new_tokens": 6, "do_sample": False}
    found, expected = place(store, AWARE, 0.5), load(store, AWARE, share=0.5)
    made = found.generate(prompts.to(DEVICE), **options)
    assert torch.equal(made.cpu(), expected.generate(prompts, **options))
    assert caches(found) == engine_caches(expected)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_batches_through_either_loop(stores: Stores, weights: Weights) -> None:
    store, prompts = stores("llama", weights), TOKENS[:, :4].to(DEVICE)
    models = [place(store, AWARE, 0.5, prefill="dense") for _ in range(2)]
    made = [
        model.generate(prompts, max_new_tokens=6, do_sample=False, **options)
        for model, options in zip(models, ({}, {"prefill_chunk_size": 64}), strict=True)
    ]
    assert torch.equal(*made)
    assert caches(models[0]) == caches(models[1])


def test_beams_and_draws(stores: Stores) -> None:
    """Hugging Face's own loops, as on the CPU."""
    store = stores("llama", "bf16")
    for options in ({"num_beams": 2}, {"num_beams": 2, "do_sample": True}):
        made = []
        for model in (place(store, AWARE, 0.5), load(store, AWARE, share=0.5)):
            torch.manual_seed(1)
            ids = model.generate(PROMPT.to(model.device), max_new_tokens=6, **options)
            made.append(ids.tolist())
        assert made[0] == made[1] or DEVICE.type == "cuda"  # which draws by numbers of its own


def test_loaded_where_nothing_is_trained(stores: Stores) -> None:
    store = stores("llama", "bf16")
    with torch.inference_mode():
        model = place(store, AWARE, 0.5)
        inside = generated(model)
    assert generated(model) != []
    assert inside == generated(place(store, AWARE, 0.5))


def test_a_recorded_trace_replays(stores: Stores, tmp_path: Path) -> None:
    """The masks are in it, and a replay through caches of that size finds the same hits."""
    store = stores("llama", "bf16")
    found, expected = place(store, dipnet.DIP(0.5), 0.5), load(store, dipnet.DIP(0.5), share=0.5)
    traces = []
    for model, run in ((found, decode), (expected, decoding.decode)):
        file = tmp_path / str(len(traces))
        with dipnet.record(model, file, scores=True):
            run(model)
        traces.append(open_trace(file))
    assert len(traces[0].sites) == len(traces[1].sites) == 4
    for number, site in enumerate(traces[0].sites):
        mine, theirs = (trace.masks(number, 0, trace.tokens) for trace in traces)
        assert (mine == theirs).all()
        group = placed(found).groups[site.key]
        assert isinstance(group, CachedGroup)
        cache = dipnet.cache.make_cache(group.group.units, group.cache.slots, "lfu")
        counts = torch.tensor([cache.access(mask) for mask in mine]).sum(dim=0)
        assert group.cache.counts.tolist() == counts.tolist()


def test_statistics(stores: Stores) -> None:
    """Calls, records and bytes; counted anew on request, with the caches as they are."""
    store = stores("llama", "int4")
    model = place(store, AWARE, 0.5, prefill="dense")
    prompt_bytes = sum(
        group.records.columns.nbytes
        for group in placed(model).groups.values()
        if isinstance(group, CachedGroup)
    )
    generated(model)
    stats = dipnet.stats(model)
    assert stats.calls == 12  # the prompt, and a token that is not decoded: it is the last
    index = read_index(store)
    read = {name: index.group(0, name).stride for name in ("mlp.in", "mlp.hidden")}
    brought = sum(site.read * read[n] for n, site in stats.sites.items() if n in read)
    assert stats.bytes_read == prompt_bytes + brought
    assert 0 < stats.sites["mlp.in"].read == stats.sites["mlp.in"].misses
    assert stats.sites["attn.in"].misses == 0
    assert stats.total == stats.other > 0
    before = caches(model)
    dipnet.reset_stats(model)
    empty = dipnet.stats(model)
    assert (empty.calls, empty.bytes_read, empty.total) == (0, 0, 0.0)
    assert all(site.hits == site.misses == 0 for site in empty.sites.values())
    assert dipnet.usage(model).cache().hits == {}
    assert [each[2] for each in caches(model).values()] == [each[2] for each in before.values()]
