"""A streamed model is recorded like any other: its trace has the masks of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import dipnet
from dipnet import DIP
from dipnet.errors import InputError
from dipnet.sim.trace import Trace, open_trace
from tests.families import shared
from tests.streaming.conftest import Stores
from tests.streaming.decoding import ATTENDED, TOKENS, attachment, decode, decode_alone, load

METHOD = DIP(input_density=0.5, hidden_density=0.25)
AWARE = DIP(input_density=0.5, hidden_density=0.25, cache_aware=0.3)


def recorded(model: PreTrainedModel, file: Path, decoding: Any = decode) -> Trace:
    with dipnet.record(model, file):
        decoding(model)
    return open_trace(file)


def masks(trace: Trace) -> list[Tensor]:
    return [torch.from_numpy(trace.masks(n, 0, trace.tokens)) for n in range(len(trace.sites))]


@pytest.mark.parametrize("share", [None, 0.4])
def test_the_masks_are_the_engines(
    stores: Stores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float | None
) -> None:
    model = load(stores("llama", "int8", 2), METHOD, share)
    engine, given = attachment(model).engine, {}
    begin = engine.begin

    def watched(key: Any, x: Tensor, wanted: Tensor) -> None:
        given.setdefault(key, []).append(wanted.clone())
        begin(key, x, wanted)

    monkeypatch.setattr(engine, "begin", watched)
    trace = recorded(model, tmp_path / "t")
    # A prompt of six tokens for each row, then one token of each row a call; no padding.
    real = torch.cat([ATTENDED[:, :6].flatten(), ATTENDED[:, 6:].T.flatten()]).bool()
    assert trace.tokens == int(real.sum()) == 15
    assert trace.starts.tolist() == [0, 6]
    assert [site.block for site in trace.sites] == [1, 2, 1, 2]
    assert trace.shape.other_weights == dipnet.describe(shared("llama")).other_weights
    for site, mask in zip(trace.sites, masks(trace), strict=True):
        assert torch.equal(mask, torch.cat(given[site.key])[real])
    assert trace.cache is None


def test_caches_and_guesses_change_no_mask(stores: Stores, tmp_path: Path) -> None:
    store = stores("llama", "int8")
    expected = masks(recorded(load(store, METHOD), tmp_path / "t", decode_alone))
    for options in ({"policy": "lru"}, {"look_ahead": False}):
        trace = recorded(load(store, METHOD, 0.3, **options), tmp_path / "u", decode_alone)
        assert all(map(torch.equal, masks(trace), expected))


def test_recall_is_that_of_the_guesses(stores: Stores, tmp_path: Path) -> None:
    model = load(stores("llama", "int8"), METHOD, 0.3)
    decode_alone(model)
    before = dipnet.stats(model)
    trace = recorded(model, tmp_path / "t", decode_alone)
    counted = dipnet.stats(model).since(before).sites
    guesses = {name: counted[name] for name in ("mlp.in", "mlp.hidden")}
    assert trace.recall == {
        name: pytest.approx(site.useful / site.guessed, abs=1e-6)
        for name, site in guesses.items()
        if site.guessed
    }
    assert trace.recall
    blind = load(stores("llama", "int8"), METHOD, 0.3, look_ahead=False)
    assert recorded(blind, tmp_path / "t", decode_alone).recall is None


def test_a_cache_aware_method_names_its_cache(stores: Stores, tmp_path: Path) -> None:
    model = load(stores("llama", "int8"), AWARE, 0.4, policy="lru")
    trace = recorded(model, tmp_path / "t")
    slots = attachment(model).engine.slots
    assert trace.cache is not None
    assert (trace.cache.policy, trace.cache.gamma) == ("lru", 0.3)
    assert trace.cache.slots == tuple(slots[site.key] for site in trace.sites)
    assert 0 < trace.cache.slots[0] < trace.sites[0].units
    with pytest.raises(InputError, match="they are not empty: sparsify or load the model anew"):
        recorded(model, tmp_path / "u")


def test_a_cache_that_holds_everything_decides_nothing(stores: Stores, tmp_path: Path) -> None:
    model = load(stores("llama", "int8"), AWARE)
    trace = recorded(model, tmp_path / "t")
    assert trace.cache is None
    plain = recorded(load(stores("llama", "int8"), METHOD), tmp_path / "u")
    assert all(map(torch.equal, masks(trace), masks(plain)))


def test_a_dense_prompt_leaves_the_caches_empty(stores: Stores, tmp_path: Path) -> None:
    """So a recording may begin after it, with a cache-aware method too."""
    model = load(stores("llama", "int8"), AWARE, 0.4, prefill="dense")
    with torch.no_grad():
        model(TOKENS[:1])
    assert recorded(model, tmp_path / "t", decode_alone).tokens == 3


def test_a_dense_streamed_model(stores: Stores, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dense decides no masks"):
        recorded(load(stores("llama", "int8")), tmp_path / "t")
