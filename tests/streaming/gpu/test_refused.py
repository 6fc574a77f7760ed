"""Bad input ends in one line: budgets, methods, stores and devices that a GPU cannot serve."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dipnet
from dipnet.errors import DipnetError, InputError
from dipnet.methods.base import Method
from dipnet.store.index import RECORDS_NAME, read_index
from dipnet.streaming import load as streaming_load
from dipnet.streaming.engine import Reader, StoreError
from dipnet.streaming.gpu import records
from dipnet.streaming.plan import Plan
from tests.plans import content
from tests.streaming.conftest import Stores
from tests.streaming.gpu.placed import DEVICE, place, placed

METHOD = dipnet.DIP(0.5)
IDS = torch.tensor([[3, 9, 4]], device=DEVICE)


def one_line(error: pytest.ExceptionInfo[DipnetError]) -> str:
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
    return str(error.value)


def test_a_budget_that_is_too_small_says_which_works(stores: Stores) -> None:
    store = stores("llama", "int4")
    with pytest.raises(InputError, match="of the GPU's memory is too small") as caught:
        place(store, METHOD, memory=1 << 20)
    found = re.search(r"works is (\d+) MiB", one_line(caught))
    assert found
    smallest = int(found[1]) << 20
    with pytest.raises(InputError):
        place(store, METHOD, memory=smallest - (1 << 20))
    place(store, METHOD, memory=smallest).generate(IDS, max_new_tokens=3, do_sample=False)


def test_a_longer_context_needs_more(stores: Stores) -> None:
    needed = []
    for context in (16, 64):
        with pytest.raises(InputError) as caught:
            place(stores("llama", "int4"), METHOD, memory=1, context=context)
        needed.append(one_line(caught))
    assert needed[0] != needed[1]


def test_a_text_beyond_the_budgets_context(stores: Stores) -> None:
    model = place(stores("llama", "int4"), METHOD, memory=1 << 30, context=16)
    assert model.generate(IDS, max_new_tokens=13, do_sample=False).shape[1] == 16
    with pytest.raises(InputError, match=r"1 x 17 tokens need more memory .* 16 tokens") as caught:
        model.generate(IDS, max_new_tokens=14, do_sample=False)
    assert "larger context" in one_line(caught)
    with pytest.raises(InputError, match="1 x 17 tokens"):
        model(torch.ones(1, 17, dtype=torch.long, device=DEVICE))
    assert model.generate(IDS, max_new_tokens=13, do_sample=False).shape[1] == 16


def test_without_a_budget_a_text_may_grow(stores: Stores) -> None:
    model = place(stores("llama", "int4"), METHOD, 0.5, context=8)
    assert model.generate(IDS, max_new_tokens=20, do_sample=False).shape[1] == 23


@pytest.mark.parametrize("method", [dipnet.RandomMasks(head_density=0.5)])
def test_methods_that_cannot_run(stores: Stores, method: Method) -> None:
    with pytest.raises(InputError, match="take dense, dip, teal or glu") as caught:
        place(stores("llama", "int4"), method)
    one_line(caught)


def test_a_store_of_neurons(stores: Stores) -> None:
    with pytest.raises(InputError, match="this store holds whole neurons") as caught:
        place(stores("llama", "int4", 1, "neuron"))
    assert "--unit column" in one_line(caught)


@pytest.mark.parametrize("name", ["mlp.in", "attn.out"])
def test_a_damaged_record(stores: Stores, tmp_path: Path, name: str) -> None:
    store = Path(shutil.copytree(stores("llama", "int8"), tmp_path / "store"))
    group = read_index(store).group(1, name)
    content = bytearray((store / RECORDS_NAME).read_bytes())
    content[group.offset_of(2) + 5] ^= 1
    (store / RECORDS_NAME).write_bytes(content)
    with pytest.raises(StoreError, match=f"record 2 of {name} of layer 1 .* damaged") as caught:
        place(store, METHOD, 0.5)
    one_line(caught)


def test_a_token_that_is_none(stores: Stores) -> None:
    model = place(stores("llama", "int8"), METHOD, 0.5)
    for token in (61, -1):
        with pytest.raises(InputError, match=f"token {token} is not in the vocabulary of 61"):
            model(torch.tensor([[token]], device=DEVICE))


def test_nothing_to_restore(stores: Stores) -> None:
    model = place(stores("llama", "int8"), METHOD, 0.5)
    with pytest.raises(InputError, match="no dense weights to restore"):
        dipnet.restore(model)
    with pytest.raises(InputError, match="already"):
        dipnet.sparsify(model, METHOD)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"look_ahead": True, "cache": "9KB"}, "look_ahead is for device='cpu', which reads from"),
        ({"reader": Reader(), "cache": "9KB"}, "reader is for device='cpu', which reads from disk"),
        ({"policy": "lru"}, "policy is for caches, and without memory= or cache= everything is on"),
        (
            {"cache_split": "even"},
            "cache_split is for caches, .*: give one of them, or leave it out",
        ),
    ],
)
def test_options_that_a_gpu_has_no_use_for(
    stores: Stores, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming_load, "check_gpu", lambda _: DEVICE)
    with pytest.raises(InputError, match=message) as caught:
        dipnet.load(stores("llama", "int8"), METHOD, device="cuda", **options)
    one_line(caught)


def test_options_that_a_gpu_has_a_use_for(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """They change the caches; nothing is read ahead there, and that may be said."""
    monkeypatch.setattr(streaming_load, "check_gpu", lambda _: DEVICE)
    store, slots = stores("llama", "int8"), []
    for split in ("wanted", "even"):
        options: dict[str, Any] = {"cache": "9KB", "cache_split": split, "look_ahead": False}
        model = dipnet.load(store, METHOD, device="cuda", policy="lru", **options)
        state = placed(model).caching()
        assert state is not None
        assert state.policy == "lru"
        slots.append(state.slots)
    assert slots[0] != slots[1]


def test_a_plan_bounds_the_gpus_memory(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it counted was a process on a CPU; where that is too little here, it is said."""
    monkeypatch.setattr(streaming_load, "check_gpu", lambda _: DEVICE)
    store = stores("llama", "int8")
    plans = [
        Plan.model_validate(content(store, cache=None, memory=size)) for size in (1 << 20, 1 << 30)
    ]
    with pytest.raises(InputError, match="a plan's memory is a process's on a CPU, and the GPU's"):
        dipnet.load(store, plan=plans[0], device="cuda")
    model = dipnet.load(store, plan=plans[1], device="cuda")
    assert placed(model).decoding.limited
    unbounded = Plan.model_validate(content(store, cache=None))
    dipnet.load(store, plan=unbounded, device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "gpu", "meta"])
def test_devices_that_are_not_there(stores: Stores, device: str) -> None:
    with pytest.raises(DipnetError) as caught:
        dipnet.load(stores("llama", "int8"), METHOD, device=device, cache="10KB")
    one_line(caught)


def test_limits_of_the_host(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory there for the records: the way out is named."""

    def full(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    fake = SimpleNamespace(empty=full, uint8=torch.uint8, cuda=torch.cuda)
    monkeypatch.setattr(records, "torch", fake)
    with pytest.raises(InputError, match="device='cpu', which reads from disk") as caught:
        place(stores("llama", "int8"), METHOD, 0.5)
    one_line(caught)
