"""Records of whole neurons that cannot be read, requests that are interrupted or out of order."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dipnet.store.geometry import WEIGHTS
from dipnet.store.index import REST_NAME, read_index
from dipnet.streaming.budget import cached_names
from dipnet.streaming.engine import Engine, Reader, StoreError
from dipnet.streaming.load import _skeleton
from dipnet.streaming.neurons import NeuronGroup
from tests.streaming.conftest import Stores
from tests.streaming.decoding import decode, decode_alone, load
from tests.streaming.test_faults import flip
from tests.streaming.whole_neurons import NAME, RANDOM, of_neurons, predicted, same


@pytest.fixture(params=WEIGHTS)
def store(request: pytest.FixtureRequest, stores: Stores, tmp_path: Path) -> Path:
    """A store to damage."""
    return Path(shutil.copytree(of_neurons(stores, "llama", request.param), tmp_path / "store"))


@pytest.mark.parametrize("share", [0, 0.5])
@pytest.mark.parametrize("look_ahead", [True, False])
def test_a_bit_that_flips_and_flips_back(store: Path, share: float, look_ahead: bool) -> None:
    method = predicted("llama")
    expected = decode(load(store, method))
    group = read_index(store).group(1, NAME)
    model = load(store, method, share=share, look_ahead=look_ahead)
    places = [group.offset_of(unit) + 3 for unit in range(group.units)]
    flip(store, places)
    for decoding in (decode, decode_alone):
        with pytest.raises(StoreError, match=r"record \d+ of mlp.neuron of layer 1 .* is damaged"):
            decoding(model)
    flip(store, places)
    assert torch.equal(decode(model), expected)


def test_a_disk_that_fails(store: Path) -> None:
    group = read_index(store).group(0, NAME)
    reader = Reader(faults=[(group.offset, group.end, errno.EIO)])
    model = load(store, predicted("llama"), share=0, reader=reader)
    for decoding in (decode, decode_alone):
        with pytest.raises(StoreError, match=r"mlp.neuron of layer 0 .*Input/output"):
            decoding(model)


@pytest.mark.parametrize("call", range(0, 16, 3))
@pytest.mark.parametrize("name", ["rows", "columns"])
def test_an_interrupt(
    stores: Stores, name: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C before the rows, and between them and the columns."""
    kind = WEIGHTS[call % 3]
    store, method = of_neurons(stores, "llama", kind), predicted("llama")
    expected = decode_alone(load(store, method))
    model, calls, right = load(store, method, share=0.3), 0, getattr(Engine, name)

    def interrupted(self: Engine, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call % 8 + 1:
            raise KeyboardInterrupt
        return right(self, *arguments)

    monkeypatch.setattr(Engine, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode_alone(model)
    assert torch.equal(decode_alone(model), expected)


def test_an_interrupt_while_records_are_asked_for(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, method = of_neurons(stores, "llama"), predicted("llama")
    model, right = load(store, method, share=0.3), NeuronGroup.decide_early

    def interrupted(self: NeuronGroup, *arguments: Any) -> None:
        right(self, *arguments)
        if self._decided is not None:
            raise KeyboardInterrupt

    monkeypatch.setattr(NeuronGroup, "decide_early", interrupted)
    fresh = load(store, method, share=0.3)
    monkeypatch.undo()
    with pytest.raises(KeyboardInterrupt):
        decode_alone(fresh)
    same(model, load(store, method))


def test_not_a_number(stores: Stores) -> None:
    for weights in WEIGHTS:
        store = of_neurons(stores, "llama", weights)
        expected = decode_alone(load(store, RANDOM))
        model = load(store, RANDOM, share=0.3)
        norm = model.model.layers[0].post_attention_layernorm.weight
        kept = norm.data.clone()
        norm.data[3] = torch.nan
        assert decode_alone(model).isnan().all()
        norm.data.copy_(kept)
        assert torch.equal(decode_alone(model), expected)


def test_scales_that_are_wrong(stores: Stores) -> None:
    store = of_neurons(stores, "llama", "int4")
    index = read_index(store)
    slots = {group.key: 0 for group in index.groups}
    right = {g.scale_name: torch.ones(g.units * g.columns) for g in index.groups}
    name = index.group(1, NAME).scale_name
    for bad in (torch.ones(52), -right[name], right[name] * torch.nan):
        with pytest.raises(StoreError, match=r"scales of mlp.neuron of layer 1 in .*" + REST_NAME):
            Engine(store, index, right | {name: bad}, slots, "lru")


def test_requests_out_of_order(stores: Stores) -> None:
    store = of_neurons(stores, "llama", "int4")
    index, (_, scales) = read_index(store), _skeleton(store)
    assert cached_names(index) == [NAME]
    engine = Engine(store, index, scales, {g.key: 3 for g in index.groups}, "lru")
    group = index.neurons
    x, h = torch.ones(2, group.rows), torch.ones(2, group.units)
    masks = torch.ones(2, group.units, dtype=torch.bool)
    with pytest.raises(RuntimeError):
        engine.columns(group.key, h)
    with pytest.raises(ValueError, match="begin is for columns"):
        engine.begin(group.key, h, masks)
    with pytest.raises(ValueError, match="rows is for neurons"):
        engine.rows((0, "attn.in"), x, masks)
    for wrong in ((x[:1], masks), (x[:, :5].contiguous(), masks), (x, masks[:, :5].contiguous())):
        with pytest.raises(ValueError, match="engine: "):
            engine.rows(group.key, *wrong)
    made = engine.rows(group.key, x, masks)
    assert made.shape == (2, 2 * group.units)
    with pytest.raises(ValueError, match="columns end a request"):
        engine.finish(group.key, 2)
    with pytest.raises(ValueError, match="engine: "):
        engine.partial(group.key)
    for wrong_h in (h[:1], h[:, :5].contiguous()):
        with pytest.raises(ValueError, match="engine: "):
            engine.columns(group.key, wrong_h)
    engine.columns(group.key, h)
    with pytest.raises(RuntimeError):
        engine.columns(group.key, h)
