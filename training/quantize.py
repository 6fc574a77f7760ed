"""The compact format: 2-D weights as int8 with one scale a row, the rest as float32."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dipnet.models.compact import METADATA, is_compact, read_compact
from training.checkpoint import save_tensors
from training.text import TrainingError


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int8 values and one float32 scale a row; weight is about values times scale."""
    largest = weight.float().abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    values = torch.round(weight.float() / scale).clamp(-127, 127)
    return values.to(torch.int8), scale


def quantize_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Quantise every 2-D weight; NAME.scale holds its scales."""
    compact: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if tensor.ndim == 2:
            compact[name], compact[f"{name}.scale"] = quantize_rows(tensor)
        else:
            compact[name] = tensor.float().contiguous()
    return compact


def save_compact(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write model.safetensors in the compact format."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(quantize_state(state), folder / "model.safetensors", METADATA)


def load_state(folder: Path) -> dict[str, torch.Tensor]:
    """Read float32 weights from a checkpoint folder or a compact one."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise TrainingError(f"{path} is missing; train the model first with training.train")
    return read_compact(path) if is_compact(path) else load_file(path)


def load_about(folder: Path) -> dict[str, Any]:
    """Read training.json of a checkpoint folder."""
    path = folder / "training.json"
    if not path.is_file():
        raise TrainingError(f"{path} is missing; it is written by training.train")
    return dict(json.loads(path.read_text()))
