"""Gradients flow through a sparsified model: where the masks let the activations pass."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import dipnet
from tests.families import random_tokens, tiny
from tests.matrix import CLOSE, METHODS, calibrated, linear_inputs

TOKENS = random_tokens(2, 6)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3"])
@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_gets_one(family: str, method: str) -> None:
    model = dipnet.sparsify(tiny(family), calibrated(family, method))
    model(TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_a_column_that_no_token_reads_gets_none() -> None:
    model = dipnet.sparsify(tiny("llama"), dipnet.GLUOracle(0.05))
    with linear_inputs(model) as inputs:
        model(TOKENS, labels=TOKENS).loss.backward()
    last = model.get_decoder().layers[-1].mlp
    read = inputs[-1][0][:, :-1].flatten(0, 1).any(dim=0)  # the last token predicts nothing
    assert read.any()
    assert not read.all()
    assert torch.equal(last.down_proj.weight.grad.any(dim=0), read)
    assert torch.equal(last.gate_proj.weight.grad.any(dim=1), read)
    assert torch.equal(last.up_proj.weight.grad.any(dim=1), read)


def backward(model: PreTrainedModel, **arguments: Any) -> dict[str, Tensor]:
    model(TOKENS, labels=TOKENS, **arguments).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("prefill", ["sparse", "dense", 3])
def test_activation_checkpointing_gives_the_same(prefill: Any) -> None:
    """What is computed again in the backward pass is masked as before, and not counted again."""
    method = dipnet.DIP(0.5, attention_density=0.5)
    plain = dipnet.sparsify(tiny("llama").train(), method, prefill=prefill)
    expected = backward(plain)
    model = tiny("llama").train()
    model.gradient_checkpointing_enable()
    dipnet.sparsify(model, method, prefill=prefill)
    for name, gradient in backward(model, use_cache=False).items():
        torch.testing.assert_close(gradient, expected[name], **CLOSE)
    assert dipnet.usage(model).density() == dipnet.usage(plain).density()


def test_training_takes_the_masks_as_given() -> None:
    """The gradient is that of the loss with the masks held fixed, by finite differences."""
    model = dipnet.sparsify(tiny("llama"), dipnet.DIP(0.5))
    weight = model.get_decoder().layers[0].mlp.down_proj.weight
    model(TOKENS, labels=TOKENS).loss.backward()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).to(weight)
    step = 1e-4  # the loss is computed in float32: a smaller step would measure its rounding
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            weight += sign * step * direction
            losses.append(model(TOKENS, labels=TOKENS).loss.item())
            weight -= sign * step * direction
    slope = (losses[0] - losses[1]) / (2 * step)
    assert (weight.grad * direction).sum().item() == pytest.approx(slope, rel=0.05)
