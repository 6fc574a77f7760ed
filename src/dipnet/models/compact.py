"""The bundled models' compact checkpoint: int8 weights with one float32 scale for each row.

Every two-dimensional weight ``NAME`` is an int8 (rows, columns) tensor beside ``NAME.scale``, a
float32 (rows, 1) tensor; everything else is stored as it is. The safetensors metadata names the
format. It halves bf16 and is exact enough that held-out perplexity does not move (the models'
cards state both figures).
"""

from __future__ import annotations

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
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    scales = {name: stored.pop(name) for name in list(stored) if name.endswith(".scale")}
    return {
        name: tensor.float() * scales[f"{name}.scale"]
        if f"{name}.scale" in scales
        else tensor.float()
        for name, tensor in stored.items()
    }
