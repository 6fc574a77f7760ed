"""Gradients flow through a sparsified model: where the masks let the activations pass."""

import pytest
import torch

import dipnet
from tests.families import random_tokens, tiny
from tests.matrix import METHODS, calibrated, linear_inputs

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


def test_recomputed_activations_are_counted_once() -> None:
    model = tiny("llama").train()
    model.gradient_checkpointing_enable()
    dipnet.sparsify(model, dipnet.GLUOracle(0.25))
    model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    assert dipnet.usage(model).density().mlp == 0.25


def test_training_takes_the_masks_as_given() -> None:
    """The gradient is that of the loss with the masks held fixed, by finite differences."""
    model = dipnet.sparsify(tiny("llama"), dipnet.DIP(0.5))
    weight = model.get_decoder().layers[0].mlp.down_proj.weight
    model(TOKENS, labels=TOKENS).loss.backward()
    direction = torch.randn_like(weight)
    step = 1e-6
    losses = []
    with torch.no_grad():
        for sign in (1, -1):
            weight += sign * step * direction
            losses.append(model(TOKENS, labels=TOKENS).loss.item())
            weight -= sign * step * direction
    slope = (losses[0] - losses[1]) / (2 * step)
    # The loss and some norms are computed in float32.
    assert (weight.grad * direction).sum().item() == pytest.approx(slope, rel=0.05)
