"""What the kernels cannot serve: an error of one line, or one warning and the reference."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import dipnet
from dipnet import BackendError, InputError
from dipnet.kernels.gpu import choice
from dipnet.models import backends
from dipnet.models.decoding import decoding, loop, memory, token
from tests.models.decoding.test_decoding import DEVICE, float_model
from tests.models.skipping.decoding import decode, dejavu, own, tokens

NO_CAPABILITY = "needs compute capability 8.0 or higher; this GPU has 7.5"
DIP = dipnet.DIP(0.5)


@torch.no_grad()
def text(model: PreTrainedModel) -> Tensor:
    prompt = tokens(2, 5).to(DEVICE)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)


def refused(message: str, method: Any = DIP, model: PreTrainedModel | None = None) -> None:
    model = float_model("llama") if model is None else model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(BackendError, match=message) as error:
        dipnet.sparsify(model, method, backend="gpu")
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is too old for the kernels, as far as the choice of a backend can see."""
    monkeypatch.setattr(backends, "why_not_tensors", lambda *_: NO_CAPABILITY)


def test_a_capability_that_is_too_low(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "launch", SimpleNamespace(INTERPRETED=False))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    found = choice.why_not_device.__wrapped__(torch.device("cuda", 0))
    assert found == NO_CAPABILITY
    old_gpu(monkeypatch)
    refused(NO_CAPABILITY)


def test_auto_takes_the_reference_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    old_gpu(monkeypatch)
    monkeypatch.setattr(backends.decoding, "why_not", lambda *_: None)
    backends._warn.cache_clear()
    model = own("llama").float()  # on a CPU, but it says otherwise
    monkeypatch.setattr(type(model), "device", property(lambda _: torch.device("cuda")))
    with pytest.warns(UserWarning, match="applied by the reference: backend 'gpu' needs comp"):
        dipnet.sparsify(model, DIP)
    dipnet.restore(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dipnet.sparsify(model, DIP)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_dtypes_that_no_kernel_takes(dtype: torch.dtype) -> None:
    refused("takes float16, bfloat16 and float32, not torch.float", model=own("llama").to(dtype))


def test_more_units_than_a_selection_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MOST_UNITS", 40)
    refused("selects among 40 units, and mlp.hidden has 52")


def test_layers_of_another_kind() -> None:
    model = float_model("llama")
    mlp = model.get_decoder().layers[1].mlp
    mlp.up_proj.__class__ = type("Adapted", (torch.nn.Linear,), {})
    refused("reads plain linear layers, and 'mlp.up_proj' of layer 1 is none", model=model)


def test_heads_too_large_for_our_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's loop serves them, on the same kernels."""
    model = float_model("llama")
    with dipnet.sparsify(model, DIP, backend="gpu"):
        wanted = text(model)
        monkeypatch.setattr(token, "MOST_CHANNELS", 4)
        monkeypatch.setattr(loop, "decode", lambda *_: pytest.fail("our loop does not serve it"))
        assert torch.equal(text(model), wanted)


def broken_capture() -> RuntimeError:
    """What is raised where memory runs out while a graph is captured."""
    hidden = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    hidden.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    return hidden


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        BackendError("CUDA says CUDA_ERROR_OUT_OF_MEMORY: run on another GPU"),
        broken_capture(),
    ],
)
def test_no_memory_for_keys_and_values(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> Any:
        raise error

    model = float_model("llama")
    with dipnet.sparsify(model, DIP, backend="reference"):
        wanted = text(model)
    monkeypatch.setattr(decoding, "Replay", out_of_memory)
    message = r"keys and values of 2 x 11 tokens take .*, and .* is free on the GPU: generate less"
    with dipnet.sparsify(model, DIP, backend="gpu"):
        with pytest.raises(InputError, match=message) as caught:
            text(model)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(backends, "_best", lambda *_: "gpu")
    with dipnet.sparsify(model, DIP), pytest.warns(UserWarning, match="Face's loop decodes: keys"):
        assert torch.equal(text(model), wanted)


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(decoding, "Replay", broken)
    model = dipnet.sparsify(float_model("llama"), DIP, backend="gpu")
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        text(model)


def test_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory.free_text(torch.device("cpu")) == "too little"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 << 30, 8 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1 << 30)
    assert memory.free_bytes(torch.device("cuda", 0)) == 4 << 30


def test_many_kept_inputs_are_cut_to_what_a_product_takes() -> None:
    model, ids = float_model("opt"), tokens(1, 12).to(DEVICE)
    with dipnet.sparsify(model, dejavu("opt"), backend="reference"):
        wanted, logits = text(model), decode(model, ids)
    with dipnet.sparsify(model, dejavu("opt"), backend="gpu", kept_inputs=1000):
        assert torch.equal(text(model), wanted)
        torch.testing.assert_close(decode(model, ids), logits, rtol=1e-3, atol=1e-3)
