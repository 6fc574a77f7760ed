"""What a store holds beside its records, put into a model that was built without weights."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from dipnet.errors import InputError
from dipnet.store.index import REST_NAME


def empty_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The store's model without weights: its parameters have shapes and nothing else."""
    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def fill(model: nn.Module, name: str, value: Tensor) -> None:
    """Put a stored tensor in the place of an empty parameter."""
    module_name, _, parameter = name.rpartition(".")
    try:
        module = model.get_submodule(module_name)
        shape = getattr(module, parameter).shape
    except AttributeError:
        raise InputError(
            f"{REST_NAME} holds {name!r}, which the model of its config lacks"
        ) from None
    if shape != value.shape:
        raise InputError(
            f"{name!r} in {REST_NAME} has the shape {tuple(value.shape)}, the config "
            f"says {tuple(shape)}: pack the model again"
        )
    setattr(module, parameter, nn.Parameter(value, requires_grad=False))


def filled_model(
    folder: Path, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The store's model on a device, all but its linear layers, and the records' scales."""
    model = empty_model(folder, dtype)
    with safe_open(folder / REST_NAME, framework="pt") as rest:
        names = set(rest.keys())
        scales = {name: rest.get_tensor(name) for name in names if name.startswith("scale.")}
        for name in sorted(names - scales.keys()):
            fill(model, name, rest.get_tensor(name).to(device, dtype))
    for module in model.modules():  # tables of rotations
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model, scales
