"""Tiny random checkpoints on disk, with the demo models' tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from dipnet.models.load import DEMO_FOLDER

CONTEXT = 64
_COMMON: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WORDS = "The ship lay at anchor, and nobody on the shore had seen her come in. "


def save_llama(folder: Path, **options: Any) -> Path:
    """A gated model of two layers; ``options`` go to ``save_pretrained``."""
    torch.manual_seed(0)
    config = LlamaConfig(intermediate_size=48, num_key_value_heads=1, **_COMMON)
    LlamaForCausalLM(config).save_pretrained(folder, **options)
    return _with_tokenizer(folder)


def save_opt(folder: Path) -> Path:
    """A ReLU model without a gate."""
    torch.manual_seed(0)
    config = OPTConfig(ffn_dim=48, word_embed_proj_dim=16, **_COMMON)
    OPTForCausalLM(config).save_pretrained(folder)
    return _with_tokenizer(folder)


def _with_tokenizer(folder: Path) -> Path:
    AutoTokenizer.from_pretrained(DEMO_FOLDER / "tokenizer").save_pretrained(folder)
    return folder
