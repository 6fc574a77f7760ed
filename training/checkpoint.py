"""Save checkpoints so that an interruption leaves the old file or the new one, never a part."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name, flush it to disk and rename it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_json(content: dict[str, Any], path: Path) -> None:
    """Write a JSON file under a temporary name and rename it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def untied_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the weights on the CPU, without the output head when it is tied to the embedding."""
    tied = bool(model.config.tie_word_embeddings)
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }


def save_config(config: PreTrainedConfig, folder: Path) -> None:
    """Write config.json (float32, no local settings) and generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = {
        "llama": ["LlamaForCausalLM"],
        "opt": ["OPTForCausalLM"],
    }[config.model_type]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    end = config.eos_token_id
    GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end).save_pretrained(folder)


def save_checkpoint(model: PreTrainedModel, folder: Path, about: dict[str, Any]) -> None:
    """Write the float32 weights, the configuration and training.json."""
    save_config(model.config, folder)
    save_tensors(untied_state(model), folder / "model.safetensors", {"format": "pt"})
    save_json(about, folder / "training.json")
