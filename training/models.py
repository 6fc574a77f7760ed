"""The two demo architectures, built from Hugging Face model classes."""

import json
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from training.text import TrainingError

VOCABULARY = 8192
CONTEXT = 512
CAUSAL_ATTENTION = "plain_causal"


def demo_config(name: str) -> PreTrainedConfig:
    """Return the configuration of the demo model ``swiglu`` or ``relu``."""
    tokens: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 448,
        "num_hidden_layers": 8,
        "num_attention_heads": 14,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
    }
    if name == "swiglu":
        return LlamaConfig(
            intermediate_size=1280, num_key_value_heads=7, head_dim=32, **common, **tokens
        )
    if name == "relu":
        return OPTConfig(
            ffn_dim=1792,
            word_embed_proj_dim=448,
            do_layer_norm_before=True,
            activation_function="relu",
            dropout=0.0,
            **common,
            **tokens,
        )
    raise TrainingError(f"no demo model is called {name!r}; choose swiglu or relu")


def read_config(path: Path) -> PreTrainedConfig:
    """Read a Hugging Face config.json in place of a demo configuration."""
    try:
        content = json.loads(path.read_text())
        return AutoConfig.for_model(content.pop("model_type"), **content)
    except (OSError, KeyError, ValueError) as error:
        raise TrainingError(f"{path} is no model configuration ({error})") from None


def _causal_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally with no padding mask, so that the fused kernel is always used."""
    del module, attention_mask
    grouped = query.shape[1] != key.shape[1]
    output = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped
    )
    return output.transpose(1, 2).contiguous(), None


def build_model(config: PreTrainedConfig, device: torch.device, seed: int) -> PreTrainedModel:
    """Return a freshly initialised float32 model with plain causal attention."""
    AttentionInterface.register(CAUSAL_ATTENTION, _causal_attention)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=CAUSAL_ATTENTION, dtype=torch.float32
    )
    return model.to(device)


def token_losses(
    model: PreTrainedModel, inputs: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Return the cross-entropy of every target token in nats, computed in float32."""
    logits = model(input_ids=inputs, use_cache=False).logits
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
    )
