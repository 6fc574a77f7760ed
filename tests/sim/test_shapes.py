"""The shapes that come with dipnet are those of the published models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Phi3Config

from dipnet.errors import InputError
from dipnet.models.recording import model_shape
from dipnet.sim.shape import SHAPES, load_shape

# What the checkpoints' config.json say.
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "phi-3-mini": (Phi3Config, {"hidden_size": 3072, "intermediate_size": 8192, "heads": 32}),
    "phi-3-medium": (
        Phi3Config,
        {"hidden_size": 5120, "intermediate_size": 17920, "heads": 40, "kv": 10, "layers": 40},
    ),
    "llama-3-8b": (
        LlamaConfig,
        {"hidden_size": 4096, "intermediate_size": 14336, "heads": 32, "kv": 8, "vocab": 128256},
    ),
    "mistral-7b": (
        MistralConfig,
        {"hidden_size": 4096, "intermediate_size": 14336, "heads": 32, "kv": 8, "vocab": 32000},
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_is_its_models(name: str) -> None:
    made, given = CONFIGS[name]
    config = made(
        hidden_size=given["hidden_size"],
        intermediate_size=given["intermediate_size"],
        num_attention_heads=given["heads"],
        num_key_value_heads=given.get("kv", given["heads"]),
        num_hidden_layers=given.get("layers", 32),
        vocab_size=given.get("vocab", 32064),
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert load_shape(name) == model_shape(model, name)


def test_all_of_the_papers_shapes_are_there() -> None:
    assert set(SHAPES) == set(CONFIGS)


def test_an_unknown_shape() -> None:
    with pytest.raises(InputError, match="Did you mean 'phi-3-mini'") as caught:
        load_shape("phi-3-minni")
    assert "llama-3-8b" in str(caught.value)
