"""What a model takes of a GPU's memory beside its caches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dipnet
from dipnet.models.decoding.sharing import MOST_ROWS
from dipnet.store.index import read_index
from dipnet.streaming.gpu.budget import DeviceNeeds
from dipnet.streaming.load import _skeleton
from tests.streaming.conftest import Stores
from tests.streaming.gpu.placed import DEVICE, place, placed

METHOD = dipnet.DIP(0.5)
IDS = torch.tensor([[3, 9, 4]], device=DEVICE)


def test_room_for_the_layer_that_wants_most(stores: Stores) -> None:
    """Whichever layer that is: all of them use the same rows for what no cache keeps."""
    store = stores("llama", "int4")
    index, (model, _) = read_index(store), _skeleton(store)
    record = index.group(0, "mlp.hidden").record_bytes

    def past(*most: int) -> int:
        choices: Any = {(at, "mlp.hidden"): SimpleNamespace(most=k) for at, k in enumerate(most)}
        return DeviceNeeds.of(index, model, choices, 16, 2).past

    assert past(9, 2) == past(2, 9) == past(9, 9) == past(2, 2) + 7 * record


@pytest.mark.parametrize("context", [40, 64])
def test_a_batch_has_no_more_keys_than_one_sequence(stores: Stores, context: int) -> None:
    """Each row's cache ends where the budget does, not at the next multiple of what is usual."""
    store = stores("llama", "int4")
    index, (model, _) = read_index(store), _skeleton(store)
    needs = DeviceNeeds.of(index, model, {}, context, size=4)
    found = place(store, METHOD, memory=1 << 30, context=context)
    for rows in range(1, MOST_ROWS + 1):
        replay = placed(found).decoding.replay(1, rows)
        assert replay.length >= context // rows
        held = [layer.keys.nbytes + layer.values.nbytes for layer in replay.cache.layers]
        assert sum(held) <= needs.keys


@pytest.mark.parametrize("memory", [1 << 30, None])
def test_keys_are_there_once(stores: Stores, memory: int | None) -> None:
    """In limited memory our loop's cache goes before Hugging Face's comes."""
    model = place(stores("llama", "int4"), METHOD, memory=memory, context=32)
    text = model.generate(IDS, max_new_tokens=6, do_sample=False)
    assert placed(model).decoding._replay is not None
    beams = model.generate(IDS, max_new_tokens=6, num_beams=2)
    assert (placed(model).decoding._replay is None) == (memory is not None)
    assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), text)
    assert torch.equal(model.generate(IDS, max_new_tokens=6, num_beams=2), beams)
