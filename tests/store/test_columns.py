"""Columns decode to what was encoded, but for the rounding of their kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dipnet.errors import InputError
from dipnet.store import columns as module
from dipnet.store.columns import decode, encode
from dipnet.store.geometry import WEIGHTS, Weights, column_stride, padded_outputs

kinds = pytest.mark.parametrize("kind", WEIGHTS)
ERROR = {"int4": 0.09, "int8": 0.0075, "bf16": 0.002}
"""Root mean square error on normal weights, of their own."""


def round_trip(weights: torch.Tensor, kind: Weights) -> torch.Tensor:
    stored, scales = encode(weights, kind)
    assert stored.dtype == torch.uint8
    assert stored.shape == (
        weights.shape[1],
        column_stride(kind, padded_outputs(weights.shape[0])),
    )
    assert (scales is None) == (kind == "bf16")
    return decode(stored, scales, kind, weights.shape[0])


@kinds
@pytest.mark.parametrize("shape", [(1, 1), (31, 3), (128, 65), (129, 64), (300, 130), (5000, 3)])
def test_round_trip(kind: Weights, shape: tuple[int, int]) -> None:
    weights = 0.02 * torch.randn(shape)
    found = round_trip(weights, kind)
    assert found.shape == weights.shape
    worst = {"int4": 0.26, "int8": 0.0041, "bf16": 2.0**-8}[kind]
    assert (found - weights).abs().max() <= worst * weights.abs().max()
    if weights.numel() > 1000:
        assert (found - weights).square().mean().sqrt() <= ERROR[kind] * 0.02


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_dtype(kind: Weights, dtype: torch.dtype) -> None:
    weights = torch.randn(200, 5).to(dtype)
    stored, scales = encode(weights, kind)
    expected, other = encode(weights.float(), kind)
    assert torch.equal(stored, expected)
    assert (scales is None and other is None) or torch.equal(scales, other)


@kinds
def test_chunks_change_nothing(kind: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.randn(700, 150)
    whole = encode(weights, kind)
    monkeypatch.setattr(module, "CHUNK", 128 * 16)
    monkeypatch.setattr(module, "LEAST_WIDTH", 16)
    for one, other in zip(whole, encode(weights, kind), strict=True):
        assert one is other is None or torch.equal(one, other)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_zeros_and_tiny_weights(kind: Weights) -> None:
    weights = torch.zeros(256, 4)
    weights[:, 1] = 1e-44  # the scale itself is no longer a number
    weights[3, 2] = -1e-30
    weights[40, 3] = 3e38
    found = round_trip(weights, kind)
    assert torch.isfinite(found).all()
    assert not found[:, :2].any()
    assert torch.allclose(found[3, 2], weights[3, 2], rtol=0.15)
    assert torch.allclose(found[40, 3], weights[40, 3], rtol=0.15)


def test_the_largest_weight_of_int4_has_the_long_side() -> None:
    weights = torch.full((32, 2), 0.1)
    weights[5] = torch.tensor([0.8, -0.8])
    stored, scales = encode(weights, "int4")
    assert scales is not None
    assert torch.allclose(decode(stored, scales, "int4", 32)[5], weights[5], atol=0.12)
    multipliers = stored[:, 64:65].view(torch.int8).flatten()
    assert multipliers.tolist() == [-127, 127]


def test_places_in_a_tile() -> None:
    """The layout as the specification writes it, output by output."""
    outputs = np.arange(128)
    for kind, tile in (("int8", 64), ("int4", 128)):
        for output in outputs[:tile]:
            weights = torch.zeros(128, 1)
            weights[output] = -1.0
            bytes_ = encode(weights, kind)[0][0, : tile // (2 if kind == "int4" else 1)]
            zero = 0x88 if kind == "int4" else 128
            (changed,) = np.flatnonzero(bytes_.numpy() != zero)
            inside = output if kind == "int8" else 16 * (output // 32) + output % 16
            assert changed == 16 * (inside // 4 % 4) + 4 * (inside // 16) + inside % 4
            if kind == "int4":
                nibble = int(bytes_[changed]) >> (0 if output // 16 % 2 else 4) & 15
                assert nibble == 8, "the other nibble is untouched"


@kinds
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_a_number(kind: Weights, value: float) -> None:
    weights = torch.ones(200, 3)
    weights[150, 1] = value
    with pytest.raises(InputError, match="NaN or infinite"):
        encode(weights, kind)
