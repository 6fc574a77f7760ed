"""Which backend serves: what was asked for, or an error; "auto" skips where it can."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import dipnet
from dipnet import BackendError, InputError
from dipnet.models import families
from dipnet.units import Site
from tests.matrix import CLOSE
from tests.models.skipping.decoding import Turns, decode, dejavu, evaluate, own, shared, tokens


@dataclass(frozen=True)
class Loose(Turns):
    """A number of heads that nobody knows before."""

    def select(self, site: Site, scores: Tensor, resident: Tensor | None = None) -> Tensor:
        return scores > -2


class Other(DynamicLayer):
    """A cache layer that is not known."""


def refused(model: PreTrainedModel, method: Any, message: str) -> None:
    """Not by name, and "auto" takes the reference."""
    with pytest.raises(BackendError, match=message) as error:
        dipnet.sparsify(model, method, backend="skip")
    assert str(error.value).endswith("there are: auto, reference, skip, gpu")
    with dipnet.sparsify(model, method):
        decode(model, tokens(1, 4))
        assert not dipnet.usage(model).gathered


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (dipnet.Dense(), "dense decides no masks"),
        (dipnet.DIP(0.5), "dip decides mlp.in on input"),
        (dipnet.DejaVuOracle(0.5, 0.5), "dejavu-oracle decides attn.head on heads"),
        (dipnet.GLUOracle(0.5), "glu-oracle decides mlp.neuron on hidden"),
        (Loose(0.5, 0.5), "a fixed number of kept units, which turns does not have"),
    ],
)
def test_methods_that_cannot_skip(method: Any, message: str) -> None:
    refused(shared("llama"), method, message)


def test_layers_that_cannot_be_gathered_from() -> None:
    model = own("llama")
    mlp = model.get_decoder().layers[1].mlp
    mlp.up_proj.__class__ = type("Adapted", (nn.Linear,), {})
    refused(model, dejavu("llama"), "'mlp.up_proj' of layer 1 is none")


def test_families_whose_keys_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    row = dataclasses.replace(families.FAMILIES["llama"], rotary=None)
    monkeypatch.setitem(families.FAMILIES, "llama", row)
    refused(shared("llama"), dejavu("llama"), "does not know what models of the family llama do")
    with dipnet.sparsify(shared("llama"), dejavu("llama", head_density=None), backend="skip"):
        pass  # an MLP has no keys


def test_no_such_backend() -> None:
    with pytest.raises(
        BackendError, match="no backend 'fast'; there are: auto, reference, skip, gpu"
    ):
        dipnet.sparsify(shared("llama"), dipnet.DIP(0.5), backend="fast")


@pytest.mark.parametrize("kept_inputs", [0, -1, 2.0, True, "8"])
def test_no_number_of_inputs(kept_inputs: Any) -> None:
    with pytest.raises(InputError, match="kept_inputs is a number of tokens from 1 up"):
        dipnet.sparsify(shared("llama"), dipnet.DIP(0.5), kept_inputs=kept_inputs)


def test_auto_skips() -> None:
    with dipnet.sparsify(shared("llama"), dejavu("llama")) as model:
        decode(model, tokens(1, 4))
        assert dipnet.usage(model).gathered


def other_cache(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    for layer in cache.layers:
        layer.__class__ = Other
    return cache


def test_a_cache_whose_tokens_cannot_be_found() -> None:
    model, method, ids = shared("llama"), dejavu("llama"), tokens(1, 8)
    with dipnet.sparsify(model, method):  # the MLPs do skip
        decoded = decode(model, ids, other_cache(model))
        assert set(dipnet.usage(model).gathered) == {"gate", "up", "down"}
    torch.testing.assert_close(decoded, evaluate(model, method, ids), **CLOSE)
    with (
        dipnet.sparsify(model, method, backend="skip"),
        pytest.raises(BackendError, match="in a cache layer of type Other; there are"),
    ):
        decode(model, ids, other_cache(model))


def test_counts_are_reset_together() -> None:
    with dipnet.sparsify(shared("llama"), dejavu("llama")) as model:
        decode(model, tokens(1, 4))
        dipnet.usage(model).reset()
        assert not dipnet.usage(model).gathered
