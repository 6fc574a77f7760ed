"""A packed model in a GPU's memory is the model with the store's weights, run by the kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import dipnet
from dipnet import BackendError, InputError
from dipnet.kernels import steps
from dipnet.kernels.gpu import choice
from dipnet.models import backends
from dipnet.models.decoding import loop
from dipnet.models.decoding.packed import PackedLinear
from dipnet.store.index import read_index
from dipnet.streaming import load
from dipnet.streaming.gpu import resident as room
from dipnet.streaming.gpu.resident import resident
from tests.families import random_tokens, tiny
from tests.models.decoding.test_decoding import static
from tests.streaming.unpacked import unpacked
from tests.streaming.whole_neurons import predicted

Stores = Callable[..., Path]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CLOSE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(autouse=True)
def _served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the kernels' meaning in plain torch computes, as in tests/models/decoding."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(backends, "why_not_tensors", lambda *_: None)
        for module in (choice, steps):
            monkeypatch.setattr(module, "why_not", lambda *_: "is not asked for here")


def loaded(store: Path, method: Any, backend: str = "gpu") -> PreTrainedModel:
    index = read_index(store)
    options: dict[str, Any] = {"dtype": torch.float32, "backend": backend}
    return resident(store, index, method, "sparse", DEVICE, **options)


def of_store(store: Path, family: str) -> PreTrainedModel:
    """The model with the store's weights as numbers."""
    return unpacked(store, tiny(family)).to(DEVICE)


@torch.no_grad()
def generated(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    given = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(ids, attention_mask=mask, **given)


def prompts(rows: int) -> tuple[Tensor, Tensor]:
    ids = random_tokens(rows, 5, seed=rows).to(DEVICE)
    mask = (torch.arange(5) >= torch.arange(rows)[:, None] % 4).long().to(DEVICE)
    return ids, mask


def methods(model: PreTrainedModel) -> list[Any]:
    dense = dipnet.calibrate(model, dipnet.TEAL(0.6), random_tokens(2, 40, seed=1).to(DEVICE))
    return [dipnet.Dense(), dipnet.DIP(0.5, attention_density=0.5), dense]


@pytest.mark.parametrize(
    ("family", "weights"),
    [
        ("llama", "int4"),
        ("llama", "int8"),
        ("llama", "bf16"),
        ("phi3", "int4"),
        ("opt", "int8"),
        ("gemma2", "int4"),
    ],
)
def test_equals_the_unpacked_model(
    family: str, weights: str, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = stores(family, weights)
    dense = of_store(store, family)
    looped = []
    ours = loop.decode
    monkeypatch.setattr(loop, "decode", lambda *given: (looped.append(1), ours(*given))[1])
    for method in methods(dense):
        model = loaded(store, method)
        for rows in (1, 3):
            ids, mask = prompts(rows)
            with dipnet.sparsify(dense, method, backend="reference"):
                wanted, kept = generated(dense, ids, mask), dipnet.usage(dense).density()
            looped.clear()
            dipnet.usage(model).reset()
            assert torch.equal(generated(model, ids, mask), wanted)
            assert dipnet.usage(model).density() == kept
            assert bool(looped) == (family != "gemma2")


def test_logits_of_a_prompt_and_of_the_reference(stores: Stores) -> None:
    store, ids = stores("llama", "int4"), random_tokens(2, 20, seed=4).to(DEVICE)
    dense, method = of_store(store, "llama"), dipnet.DIP(0.5)
    with torch.no_grad():
        with dipnet.sparsify(dense, method, backend="reference"):
            wanted = dense(ids).logits
        for backend in ("reference", "gpu"):
            torch.testing.assert_close(loaded(store, method, backend)(ids).logits, wanted, **CLOSE)


def test_columns_are_stored_once(stores: Stores) -> None:
    model = loaded(stores("llama", "int4"), dipnet.DIP(0.5))
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    held = {layer.weight.data_ptr(): layer.weight.nbytes for layer in layers}
    index = read_index(stores("llama", "int4"))
    assert sum(held.values()) == sum(group.units * group.stride for group in index.groups)


def test_restored_it_is_dense(stores: Stores) -> None:
    store, (ids, mask) = stores("llama", "int8"), prompts(1)
    model = loaded(store, dipnet.DIP(0.5))
    dipnet.restore(model)
    assert torch.equal(generated(model, ids, mask), generated(of_store(store, "llama"), ids, mask))
    with dipnet.sparsify(model, dipnet.DIP(0.3), backend="gpu"):
        generated(model, ids, mask)
        assert dipnet.usage(model).density().mlp < 0.4


def test_no_graph_breaks(stores: Stores) -> None:
    """Hugging Face's own loop on a static cache, compiled: one graph for every token."""
    model, ids = loaded(stores("llama", "int4"), dipnet.DIP(0.5)), random_tokens(1, 9, seed=2)
    made = []
    with torch.no_grad():
        for compiled in (False, True):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            made.append(static(model, ids.to(DEVICE), compiled))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(made[1], made[0], **CLOSE)


@pytest.mark.parametrize(
    ("family", "weights"),
    [
        ("llama", "int4"),
        ("llama", "int8"),
        ("llama-biases", "int4"),
        ("phi3", "bf16"),
        ("opt", "int4"),
    ],
)
def test_whole_neurons(family: str, weights: str, stores: Stores) -> None:
    """Deja Vu's neurons: rows of gate and up, and columns of down, of one record."""
    store = stores(family, weights, unit="neuron")
    dense, method = of_store(store, family), predicted(family)
    model = loaded(store, method)
    for rows in (1, 3):
        ids, mask = prompts(rows)
        with dipnet.sparsify(dense, method, backend="reference"):
            wanted, kept = generated(dense, ids, mask), dipnet.usage(dense).density()
        dipnet.usage(model).reset()
        assert torch.equal(generated(model, ids, mask), wanted)
        assert dipnet.usage(model).density() == kept


def test_load_takes_everything_without_a_bound(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "check_gpu", lambda _: DEVICE)
    store, (ids, mask) = stores("llama", "int4"), prompts(2)
    model = dipnet.load(store, dipnet.DIP(0.5), device="cuda", prefill="sparse")
    assert model.dtype == torch.bfloat16
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 2 * 7 + 1
    assert generated(model, ids, mask).shape == (2, 13)
    assert dipnet.describe(model) == dipnet.describe(of_store(store, "llama"))
    assert dipnet.usage(model).density().mlp == pytest.approx(0.5, abs=0.05)


# --- bad input ---


def test_methods_that_need_other_records(stores: Stores) -> None:
    store = stores("llama", "int4")
    with pytest.raises(InputError, match="gate cannot run from a store"):
        loaded(store, dipnet.GatePruning(0.5))
    with pytest.raises(InputError, match="wina reads all weights to prepare itself"):
        loaded(store, dipnet.WINA(0.5))
    heads = predicted("llama", head_density=0.5)
    with pytest.raises(BackendError, match="needs rows of weights where residual decides attn"):
        loaded(store, heads)
    model = loaded(store, None)
    dipnet.restore(model)
    with pytest.raises(InputError, match="are quantised, and this method has to read them"):
        dipnet.sparsify(model, dipnet.WINA(0.5))
    with pytest.raises(BackendError, match="needs rows of weights where gate decides") as error:
        dipnet.sparsify(model, dipnet.GatePruning(0.5), backend="gpu")
    assert "\n" not in str(error.value)


def test_columns_of_whole_neurons(stores: Stores) -> None:
    """Masks over the MLP's input run by the reference; the kernels have no columns to skip."""
    store, ids = stores("llama", "int8", unit="neuron"), prompts(1)[0]
    model, dense, method = loaded(store, None), of_store(store, "llama"), dipnet.DIP(0.5)
    dipnet.restore(model)
    with pytest.raises(BackendError, match=r"columns of weights at mlp\.in, and .* neurons"):
        dipnet.sparsify(model, method, backend="gpu")
    with (
        torch.no_grad(),
        dipnet.sparsify(model, method, backend="reference"),
        dipnet.sparsify(dense, method, backend="reference"),
    ):
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, **CLOSE)


@pytest.mark.parametrize("context", [0, 65, "8"])
def test_a_context_that_is_none(
    stores: Stores, monkeypatch: pytest.MonkeyPatch, context: Any
) -> None:
    """It is not needed here, and an error as on a CPU."""
    monkeypatch.setattr(load, "check_gpu", lambda _: DEVICE)
    for bounds in ({}, {"cache": "10KB"}):
        with pytest.raises(InputError, match="context must be between 1 and the model's 64, got"):
            dipnet.load(stores("llama", "int4"), device="cuda", context=context, **bounds)


def test_no_memory(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(room, "read_records", out_of_memory)
    with pytest.raises(
        InputError, match=r"this model's weights take .*, and .* is free on the GPU: free"
    ):
        loaded(stores("llama", "int4"), None)
