"""Stores of whole neurons, methods that choose such, and what must be equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import dipnet
from dipnet.methods.base import Method
from dipnet.store.geometry import Weights
from tests.predicted import predictors
from tests.streaming.conftest import Stores
from tests.streaming.decoding import decode, decode_alone

NAME = "mlp.neuron"
RANDOM = dipnet.RandomMasks(mlp_density=0.4)


def of_neurons(stores: Stores, family: str, weights: Weights = "int8") -> Path:
    return stores(family, weights, 1, "neuron")


def predicted(family: str, look_ahead: int = 1, **densities: Any) -> Method:
    found = predictors(family, look_ahead)
    return dipnet.DejaVu(
        **(densities or {"mlp_density": 0.4}), look_ahead=look_ahead, predictors=found
    )


def both(model: PreTrainedModel) -> list[Tensor]:
    """Logits of a padded batch, and of one sequence alone."""
    return [decode(model), decode_alone(model)]


def same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    assert all(map(torch.equal, both(model), both(other)))
