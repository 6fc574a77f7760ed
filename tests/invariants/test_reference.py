"""Every method × family computes what its reference in plain loops computes, and reads as much."""

from functools import cache

import pytest
import torch
from torch import Tensor

import dipnet
from tests.families import random_tokens
from tests.matrix import CLOSE, every_pair, logits, plain, sparse
from tests.reference import ATTENTION, MLP, PlainLayer

TOKENS = random_tokens(2, 6)


@cache
def looped(family: str, method: str) -> tuple[Tensor, list[PlainLayer]]:
    """The reference's logits, and its layers with what they have read."""
    model, layers = plain(family, method)
    return logits(model, TOKENS), layers


@every_pair
def test_logits(family: str, method: str) -> None:
    expected, _ = looped(family, method)
    with sparse(family, method) as model:
        torch.testing.assert_close(logits(model, TOKENS), expected, **CLOSE)


@every_pair
def test_density_counts_the_weights_that_the_loops_gather(family: str, method: str) -> None:
    _, layers = looped(family, method)
    with sparse(family, method) as model:
        logits(model, TOKENS)
        density = dipnet.usage(model).density()
    assert density.tokens == TOKENS.numel()
    assert density.mlp_by_layer == pytest.approx([share(layer, *MLP) for layer in layers])
    shares = [share(layer, *ATTENTION) for layer in layers]
    assert density.attention_by_layer == pytest.approx(shares)
    assert density.mlp == pytest.approx(mean([share(layer, *MLP) for layer in layers]))
    assert density.attention == pytest.approx(mean(shares))


def share(layer: PlainLayer, *matrices: str) -> float:
    """The share of a layer's weights that the loops have gathered for a token."""
    weights = sum(layer.weights[matrix].numel() for matrix in matrices if matrix in layer.weights)
    return sum(layer.read[matrix] for matrix in matrices) / weights / TOKENS.numel()


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
