"""The bundled models' compact checkpoint: int8 weights with one float32 scale for each row.

Every two-dimensional weight ``NAME`` is an int8 (rows, columns) tensor beside ``NAME.scale``, a
float32 (rows, 1) tensor; everything else is stored as it is. The safetensors metadata names the
format. It halves bf16 and is exact enough that held-out perplexity does not move (the models'
cards state both figures).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

FORMAT = "dipnet-int8-rows"
METADATA = {"format": FORMAT, "version": "1"}


def is_compact(path: Path) -> bool:
    """Whether a safetensors file is in the compact format."""
    with safe_open(path, framework="pt") as file:
        return (file.metadata() or {}).get("format") == FORMAT


def read_compact(path: Path) -> dict[str, Tensor]:
    """The float32 state dict of a compact checkpoint."""
    with safe_open(path, framework="pt") as file:
        return dequantize({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def dequantize(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float32 weights of the tensors of a compact checkpoint."""
    weights = {name: tensor.float() for name, tensor in stored.items()}
    scales = {name: weights.pop(name) for name in stored if name.endswith(".scale")}
    for name, scale in scales.items():
        weights[name.removesuffix(".scale")] *= scale
    return weights
