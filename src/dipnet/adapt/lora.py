"""LoRA on the MLP's matrices, by PEFT: put on a model, merged into a copy of it, taken off.

LoRA (https://arxiv.org/abs/2106.09685) adds to a matrix the product of two narrow ones. Under a
mask it reads what the matrix itself reads, so it can be merged afterwards: no byte more for a
token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from dipnet.errors import InputError
from dipnet.files import make_folder, write_file
from dipnet.models.families import Decoder

ADAPTER = "default"
"""PEFT's name of the one adapter."""
ALPHA_OVER_RANK = 2.0
"""How much the product counts: the learning rate is chosen to go with it."""
BASE = ".base_layer"
"""What PEFT puts between a layer's name and its own weights."""


def check_peft() -> None:
    """Raise InputError when PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise InputError("adapters need the peft library: pip install 'dipnet[adapt]'") from None


class Lora:
    """A model with LoRA on its MLP matrices; the model itself is changed until ``remove``.

    ``decoder`` finds the matrices; its own shapes stay those of the model without adapters.
    """

    def __init__(self, decoder: Decoder, rank: int, seed: int) -> None:
        from peft import LoraConfig, get_peft_model

        self.decoder = decoder
        self.model = decoder.model
        self._trained = {name: each.requires_grad for name, each in self._named()}
        paths = {decoder.family.path(matrix) for matrix in decoder.spec.mlp_matrices}
        config = LoraConfig(
            r=rank,
            lora_alpha=ALPHA_OVER_RANK * rank,
            target_modules=sorted(paths),
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(self._gpus()):
            torch.manual_seed(seed)
            self.wrapped = get_peft_model(self.model, config)
        self.parameters = {
            name: each for name, each in self.model.named_parameters() if each.requires_grad
        }
        self.layers = {
            name: module for name, module in self.model.named_modules() if hasattr(module, "lora_A")
        }
        self.active = True
        for layer in self.layers.values():
            layer.forward = partial(self.product, layer)

    def _gpus(self) -> list[torch.device]:
        return [self.model.device] if self.model.device.type == "cuda" else []

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.model.named_parameters())

    @contextmanager
    def off(self) -> Iterator[None]:
        """Calls inside compute what the model did before."""
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def product(self, layer: Any, x: Tensor) -> Tensor:
        """What PEFT's layer computes of (..., inputs), as one product with the summed weights.

        For a training step's many tokens that is less work than two more products for each: the
        narrow matrices are multiplied once, and nothing is added to an activation.
        """
        base = layer.get_base_layer()
        if not self.active:
            return cast(Tensor, base(x))
        weight = base.weight + layer.get_delta_weight(ADAPTER)
        return functional.linear(x, weight.to(base.weight.dtype), base.bias)

    def state(self) -> dict[str, Tensor]:
        """Copies of the adapters' weights, by name."""
        return {name: each.detach().clone() for name, each in self.parameters.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put back what ``state`` gave."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(state[name])

    def merged_weight(self, layer: Any) -> Tensor:
        """(outputs, inputs) a layer's weights with its adapter in them: summed, then rounded."""
        weight: Tensor = layer.get_base_layer().weight.detach()
        delta = layer.get_delta_weight(ADAPTER).detach()
        return (weight.to(delta.dtype) + delta).to(weight.dtype)

    def save_adapter(self, folder: Path) -> None:
        """Write PEFT's own two files: its weights, as safetensors, and its config."""
        from peft import get_peft_model_state_dict

        tensors = get_peft_model_state_dict(self.wrapped, save_embedding_layers=False)
        held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        config = self.wrapped.peft_config[ADAPTER].to_dict() | {"inference_mode": True}
        plain = {name: _plain(value) for name, value in sorted(config.items())}
        make_folder(folder)
        write_file(folder / "adapter_model.safetensors", save(held, metadata={"format": "pt"}))
        write_file(folder / "adapter_config.json", json.dumps(plain, indent=2) + "\n")

    def save_merged(self, folder: Path) -> None:
        """Write the checkpoint with the adapters in its weights, under its usual names."""
        merged = {
            f"{name}.weight": self.merged_weight(each).cpu() for name, each in self.layers.items()
        }
        state = {
            name.replace(BASE, ""): tensor
            for name, tensor in self.model.state_dict().items()
            if ".lora_" not in name
        }
        self.remove()
        self.model.save_pretrained(folder, state_dict=state | merged)

    def remove(self) -> None:
        """Take the adapters off: the model is what it was."""
        if self.layers:
            self.wrapped.unload()
            self.layers = {}
            for name, parameter in self._named():
                parameter.requires_grad_(self._trained[name])


class AdaptedDecoder(Decoder):
    """A decoder whose matrices are read with the adapters in them, as they will be merged.

    What a method derives from the weights is then what it derives from the merged checkpoint.
    """

    lora: Lora | None = None

    def matrix(self, layer: int, name: str) -> Tensor:
        """The (outputs, inputs) weights of one matrix, adapters merged: a copy where it has one."""
        holder = self.holder(layer, name)
        if self.lora is None or not hasattr(holder, "lora_A"):
            return super().matrix(layer, name)
        return self.lora.merged_weight(holder)[self.rows(name)]


def _plain(value: Any) -> Any:
    """A config's value as JSON has it."""
    if isinstance(value, set):
        return sorted(value)
    return value.value if hasattr(value, "value") else value
