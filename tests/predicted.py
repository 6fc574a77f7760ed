"""Deja Vu's half of the test matrix: random predictors for any model, and references in loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dipnet.methods.predictors import Kind, PredictedModel, Predictor, Predictors
from dipnet.models.families import describe
from tests.families import shared
from tests.reference import PlainLayer, top

RANK = 5


@cache
def predictors(family: str, *options: Any, **named: Any) -> Predictors:
    """`random_predictors` of the family's shared model."""
    return random_predictors(shared(family), *options, **named)


def random_predictors(
    model: PreTrainedModel,
    look_ahead: int = 1,
    kinds: Sequence[Kind] = ("mlp", "head"),
    activation: Any = "none",
) -> Predictors:
    """Seeded predictors of a model, that know nothing."""
    made = torch.Generator().manual_seed(look_ahead + len(kinds))
    shape = PredictedModel.of(describe(model))

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=made)

    def predictor(kind: Kind) -> Predictor:
        units = shape.units(kind)
        return Predictor(
            random(RANK, shape.width), random(RANK), random(units, RANK), random(units)
        )

    layers = {kind: [predictor(kind) for _ in range(shape.layers)] for kind in kinds}
    return Predictors(shape, look_ahead, layers, activation, {"text": "none"})


# --- references ---


def predicted_mlp(layer: PlainLayer, method: Any, x: Tensor) -> Tensor:
    return neurons(layer, x, chosen(layer, method, "mlp", layer.weights["up"].shape[0]))


def predicted_heads(layer: PlainLayer, method: Any, x: Tensor) -> list[int]:
    return chosen(layer, method, "head", len(x) // layer.head_size)


def oracle_mlp(layer: PlainLayer, method: Any, x: Tensor) -> Tensor:
    return neurons(layer, x, top(layer.uncounted().hidden(x).abs(), method.mlp_density))


def oracle_heads(layer: PlainLayer, method: Any, x: Tensor) -> list[int]:
    norms = [math.sqrt(sum(v * v for v in head.tolist())) for head in x.split(layer.head_size)]
    return top(torch.tensor(norms, dtype=torch.float64), method.head_density)


def random_mlp(layer: PlainLayer, method: Any, x: Tensor) -> Tensor:
    return neurons(layer, x, drawn(layer, method, "mlp.neuron", len(layer.weights["up"])))


def random_heads(layer: PlainLayer, method: Any, x: Tensor) -> list[int]:
    return drawn(layer, method, "attn.head", len(x) // layer.head_size)


def neurons(layer: PlainLayer, x: Tensor, kept: list[int]) -> Tensor:
    """The MLP of the ``kept`` neurons, of which alone anything is read."""
    return layer.apply("down", layer.hidden(x, outputs=kept), inputs=kept)


def chosen(layer: PlainLayer, method: Any, kind: Kind, units: int) -> list[int]:
    """The units that a layer's predictor scores highest; all of a layer that stays dense."""
    density = method.mlp_density if kind == "mlp" else method.head_density
    if density is None or layer.number < method.dense_first:
        return list(range(units))
    site = "mlp.neuron" if kind == "mlp" else "attn.head"
    density = (method.layer_densities or {}).get((layer.number, site), density)
    place = max(0, 2 * layer.number + (kind == "mlp") - method.look_ahead)
    predictor = method.fitted.layers[kind][layer.number]
    x = layer.residual(place)
    inner = predictor.w1.double() @ x + predictor.b1.double()
    if method.fitted.activation == "relu":
        inner = torch.where(inner < 0, 0.0, inner)
    return top(predictor.w2.double() @ inner + predictor.b2.double(), density)


def drawn(layer: PlainLayer, method: Any, site: str, units: int) -> list[int]:
    """The units that the documented hash puts first."""
    density = method.mlp_density if site == "mlp.neuron" else method.head_density
    stream = crc32(f"{method.seed} {layer.number} {site}".encode()) << 31
    scores = [mix(mix(layer.position + stream) + unit) >> 40 for unit in range(units)]
    return top(torch.tensor(scores), density)


def mix(state: int) -> int:
    """splitmix64's output function, in numbers without end."""
    word = (1 << 64) - 1
    state = state * 0x9E3779B97F4A7C15 & word
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & word
    state = (state ^ state >> 27) * 0x94D049BB133111EB & word
    return state ^ state >> 31


def crc32(data: bytes) -> int:
    """The checksum of gzip and PNG, bit by bit."""
    remainder = 0xFFFFFFFF
    for byte in data:
        remainder ^= byte
        for _ in range(8):
            remainder = remainder >> 1 ^ (0xEDB88320 if remainder & 1 else 0)
    return remainder ^ 0xFFFFFFFF
