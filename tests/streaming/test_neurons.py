"""Records of whole neurons: the masked model, whatever the cache, the disk and the look-ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dipnet
from dipnet import _native
from dipnet.cache import CacheSlots
from dipnet.errors import InputError
from dipnet.methods.base import Method
from dipnet.models.families import Decoder
from dipnet.store.geometry import WEIGHTS, Weights
from dipnet.store.index import read_index
from dipnet.streaming import engine as engine_module
from dipnet.streaming.engine import Reader
from tests.families import every_family, random_tokens, tiny
from tests.streaming.conftest import Stores
from tests.streaming.decoding import TOKENS, attachment, decode, decode_alone, load
from tests.streaming.records import instruction_sets
from tests.streaming.unpacked import unpacked
from tests.streaming.whole_neurons import NAME, RANDOM, both, of_neurons, predicted, same


def near(found: Tensor, right: Tensor, weights: Weights) -> None:
    """As near as bf16 is in other orders of addition, or integer activations come."""
    if weights == "bf16":
        torch.testing.assert_close(found, right, rtol=1e-3, atol=2e-4)
    assert (found - right).norm() < 0.05 * right.norm()


@every_family
@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_dense_model(stores: Stores, family: str, weights: Weights) -> None:
    """Of the weights in the store, with anything in memory."""
    store = of_neurons(stores, family, weights)
    model = load(store, None, share=0.5)
    same(model, load(store))
    expected = both(unpacked(store, tiny(family)))
    for found, right in zip(both(model), expected, strict=True):
        near(found, right, weights)


@every_family
@pytest.mark.parametrize("look_ahead", [0, 1, 2])
def test_the_masked_model(stores: Stores, family: str, look_ahead: int) -> None:
    method = predicted(family, look_ahead, mlp_density=0.4, head_density=0.5)
    check_masked(of_neurons(stores, family, "bf16"), family, method, "bf16")


@every_family
@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_masked_integers(stores: Stores, family: str, weights: Weights) -> None:
    """With masks that no rounding changes."""
    method = dipnet.RandomMasks(mlp_density=0.4, head_density=0.5)
    check_masked(of_neurons(stores, family, weights), family, method, weights)


def check_masked(store: Path, family: str, method: Method, weights: Weights) -> None:
    """Neurons and heads are those that `sparsify` masks in a model of the store's weights."""
    model = load(store, method, share=0.5, policy="lfu")
    slots = {
        key: site.units if key[1] == "attn.head" else attachment(model).engine.slots[key]
        for key, site in attachment(model).usage.sites.items()
    }
    found, sites = decode(model), {f"{layer}.{NAME}" for layer in range(2)}
    with dipnet.sparsify(
        unpacked(store, tiny(family)), method, cache=CacheSlots(slots, "lfu")
    ) as sparse:
        near(found, decode(sparse), weights)
        assert dipnet.usage(model).density() == dipnet.usage(sparse).density()
        for name in ("hits", "misses"):
            counted, right = (getattr(dipnet.usage(m).cache(), name) for m in (model, sparse))
            assert counted == {key: right[key] for key in sites}
    same(load(store, method, share=0, look_ahead=False), load(store, method))


OPTIONS: list[dict[str, Any]] = [
    {"look_ahead": False, "share": 0.5},
    {"cache": 0},
    {"share": 0.1, "policy": "lru"},
    {"share": 0.6, "policy": "lfu", "reader": Reader(backend="pread", depth=2)},
    {"share": 0.5, "reader": Reader(frame_bytes=0)},
    {"memory": "64GiB"},
]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_change_no_bit(stores: Stores, weights: Weights, options: dict[str, Any]) -> None:
    store = of_neurons(stores, "llama-biases", weights)
    for method in (predicted("llama-biases"), None):
        same(load(store, method, **options), load(store, method))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_threads(stores: Stores, weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(engine_module, "default_threads", lambda n=threads: n)
        made.append(decode(load(of_neurons(stores, "llama", weights), RANDOM, share=0.5)))
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_instruction_sets(stores: Stores, weights: Weights) -> None:
    best, made = _native.instruction_set(), []
    for name in instruction_sets():
        _native.use_instruction_set(name)
        made.append(decode(load(of_neurons(stores, "llama", weights), RANDOM, share=0.5)))
    _native.use_instruction_set(best)
    assert all(torch.equal(each, made[0]) for each in made)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("method", [None, RANDOM], ids=["dense", "masks"])
def test_a_long_prompt_reads_a_record_once(
    stores: Stores, weights: Weights, method: Method | None
) -> None:
    tokens = random_tokens(3, 60, seed=5)
    store = of_neurons(stores, "llama", weights)
    made = []
    for share in (None, 0.0, 0.5):
        model = load(store, method, share=share)
        with torch.no_grad():
            made.append(model(tokens).logits)
        for layer in range(2):
            totals = attachment(model).engine.totals((layer, NAME))
            assert totals["read"] <= read_index(store).neurons.units
        alone = load(store, method, share=share)
        with torch.no_grad():
            near(alone(tokens[1:2]).logits, made[0][1:2], weights)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


@pytest.mark.parametrize("prefill", ["dense", "sparse", 3])
def test_prompts(stores: Stores, prefill: Any) -> None:
    store, method = of_neurons(stores, "qwen2", "bf16"), predicted("qwen2")
    model = load(store, method, share=0.3, prefill=prefill)
    same(model, load(store, method, prefill=prefill))
    with dipnet.sparsify(unpacked(store, tiny("qwen2")), method, prefill=prefill) as sparse:
        near(decode(model), decode(sparse), "bf16")


@pytest.mark.parametrize("look_ahead", [0, 1, 2])
def test_predicted_records_are_asked_for_early(stores: Stores, look_ahead: int) -> None:
    """All that a decoded token misses: it is the mask, no guess."""
    store, method = of_neurons(stores, "llama"), predicted("llama", look_ahead)
    early = load(store, method, share=0.3)
    late = load(store, method, share=0.3, look_ahead=False)
    for model in (early, late):
        decode_alone(model)
        dipnet.reset_stats(model)
        with torch.no_grad():
            for token in range(5):
                model(torch.tensor([[token + 5]]))
    ahead, after = (dipnet.stats(model).sites[NAME] for model in (early, late))
    assert (ahead.hits, ahead.misses) == (after.hits, after.misses)
    assert ahead.guessed == ahead.useful == after.read > 0
    assert 0 <= ahead.early <= ahead.useful
    assert (ahead.read, after.guessed, after.early) == (0, 0, 0)
    assert dipnet.stats(early).bytes_read == dipnet.stats(late).bytes_read


def test_records_that_are_there_in_time(stores: Stores) -> None:
    """What was read ahead has come when the block begins, if the disk is given the time."""
    from time import sleep

    store, method = of_neurons(stores, "llama"), predicted("llama", 1)
    model = load(store, method, share=0)
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(lambda *_: sleep(0.02))
    with torch.no_grad():
        model(torch.tensor([[5]]))
    found = dipnet.stats(model).sites[NAME]
    assert found.early == found.useful == found.misses > 0


def test_heads_alone_on_any_store(stores: Stores) -> None:
    method = predicted("llama", 1, head_density=0.5)
    for unit in ("column", "neuron"):
        store = stores("llama", "bf16", 1, unit)
        model = load(store, method, share=0.4)
        with dipnet.sparsify(unpacked(store, tiny("llama")), method) as sparse:
            near(decode(model), decode(sparse), "bf16")
            assert dipnet.usage(model).density() == dipnet.usage(sparse).density()
    oracle = dipnet.DejaVuOracle(head_density=0.5)
    decode(load(of_neurons(stores, "llama"), oracle, share=0.4))


REFUSED: list[tuple[Method, str]] = [
    (dipnet.DIP(0.5), "dip chooses columns of input channels.* pack the model with --unit column"),
    (dipnet.GLUPruning(0.8), "glu chooses columns"),
    (dipnet.GatePruning(0.5), "gate cannot run from a store"),
    (dipnet.UpPruning(0.5), "up cannot run from a store"),
    (dipnet.GLUOracle(0.5), "glu-oracle cannot run from a store"),
    (dipnet.DejaVuOracle(mlp_density=0.5), "dejavu-oracle cannot run from a store"),
    (dipnet.Wanda(0.5), "wanda"),
]


@pytest.mark.parametrize(("method", "message"), REFUSED, ids=[m.name for m, _ in REFUSED])
def test_methods_that_cannot_run(stores: Stores, method: Method, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load(of_neurons(stores, "llama"), method)
    assert "\n" not in str(caught.value)


def test_neurons_on_a_store_of_columns(stores: Stores) -> None:
    for method in (RANDOM, predicted("llama")):
        with pytest.raises(
            InputError, match=r"whole neurons, .* pack the model with --unit neuron"
        ):
            load(stores("llama", "int8"), method)


def test_a_checkpoint_is_packed_for_its_method(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIPNET_CACHE", str(tmp_path / "cache"))
    tiny("llama").float().save_pretrained(tmp_path / "model")
    made = [
        load(tmp_path / "model", method, weights="int8") for method in (RANDOM, dipnet.DIP(0.5))
    ]
    units = [attachment(model).engine.index.unit for model in made]
    assert units == ["neuron", "column"]
    assert torch.equal(decode(made[0]), decode(load(of_neurons(stores, "llama"), RANDOM)))


def test_generate(stores: Stores) -> None:
    """Hugging Face's own loop, greedy and with beams; a prompt is dense by default."""
    store, prompt = of_neurons(stores, "opt", "int4"), TOKENS[:1, :5]
    for options in ({"do_sample": False}, {"do_sample": True, "num_beams": 2}):
        made = []
        for share in (None, 0.5):
            model = load(store, predicted("opt"), share=share, prefill="dense")
            torch.manual_seed(1)
            made.append(model.generate(prompt, max_new_tokens=8, **options))
        assert torch.equal(*made)


def test_the_unpacked_model_is_the_stores(stores: Stores) -> None:
    """What the others compare with: every matrix is another than the checkpoint's, and near it."""
    right = Decoder(tiny("phi3"))
    found = Decoder(unpacked(of_neurons(stores, "phi3", "int8"), tiny("phi3")))
    for name in right.spec.matrices:
        a, b = (decoder.matrix(1, name).float() for decoder in (right, found))
        assert 0 < (a - b).abs().max() < 0.01 * a.abs().max()
