"""The families' half of the test matrix: a tiny random model for each. One line adds one.

Sizes are odd on purpose: no two dimensions of a model agree unless its architecture says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

VOCABULARY = 61
CONTEXT = 64

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GATED = {**_COMMON, "intermediate_size": 52, "num_attention_heads": 3, "num_key_value_heads": 1}
_WIDE_HEADS = {**_GATED, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10}
_GEMMA = {
    "query_pre_attn_scalar": 10,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}
_OPT = {**_COMMON, "ffn_dim": 60, "num_attention_heads": 3}
_SMALL_EMBEDDING = {"word_embed_proj_dim": 16, "do_layer_norm_before": False, "enable_bias": False}


def _config(name: str, shape: dict[str, Any], **changes: Any) -> Callable[[], PretrainedConfig]:
    return lambda: getattr(transformers, f"{name}Config")(**shape, **changes)


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": _config("Llama", _GATED),
    "llama-biases": _config("Llama", _GATED, mlp_bias=True, attention_bias=True),
    "llama-tied": _config("Llama", _WIDE_HEADS, tie_word_embeddings=True),
    "mistral": _config("Mistral", _GATED, sliding_window=4),
    "qwen2": _config("Qwen2", _GATED),
    "qwen3": _config("Qwen3", _WIDE_HEADS),
    "phi3": _config("Phi3", _GATED),
    "gemma2": _config("Gemma2", _WIDE_HEADS, **_GEMMA),
    "gemma3": _config("Gemma3Text", _WIDE_HEADS, **_GEMMA),
    "opt": _config("OPT", _OPT),
    "opt-350m": _config("OPT", _OPT, **_SMALL_EMBEDDING),
}
"""``family`` or ``family-variation``. OPT 350M is the odd one of its kind."""

every_family = pytest.mark.parametrize("family", FAMILIES)
gated_family = pytest.mark.parametrize(
    "family", [name for name in FAMILIES if not name.startswith("opt")]
)


def shared(family: str, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """The family's model: always the same object, so leave it as it was."""
    return _built(family, dtype)


def tiny(family: str) -> PreTrainedModel:
    """A copy of the family's model, to change at will."""
    return copy.deepcopy(shared(family))


@cache
def _built(family: str, dtype: torch.dtype) -> PreTrainedModel:
    """Two layers of seeded weights, such that activations are of ordinary magnitude."""
    torch.manual_seed(sum(family.encode()))
    config = FAMILIES[family]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # A matrix keeps the size of what it multiplies; norms and biases vary a little.
            spread = 1.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
            offset = parameter if parameter.dim() == 1 else 0
            parameter.copy_(offset + spread * torch.randn_like(parameter))
    return model.to(dtype)


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    """Seeded token ids, none of them a special token."""
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))
