"""What a model takes of a GPU's memory beside its caches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from dipnet.store.index import read_index
from dipnet.streaming.gpu.budget import DeviceNeeds
from dipnet.streaming.load import _skeleton
from tests.streaming.conftest import Stores


def test_room_for_the_layer_that_wants_most(stores: Stores) -> None:
    """Whichever layer that is: all of them use the same rows for what no cache keeps."""
    store = stores("llama", "int4")
    index, (model, _) = read_index(store), _skeleton(store)
    record = index.group(0, "mlp.hidden").record_bytes

    def past(*most: int) -> int:
        choices: Any = {(at, "mlp.hidden"): SimpleNamespace(most=k) for at, k in enumerate(most)}
        return DeviceNeeds.of(index, model, choices, 16, 2).past

    assert past(9, 2) == past(2, 9) == past(9, 9) == past(2, 2) + 7 * record
