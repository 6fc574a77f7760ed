"""Models with enough heads and groups of them to skip, and decoding token by token."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import dipnet
from dipnet.methods.heads import NeuronsAndHeads
from dipnet.methods.predictors import Predictors
from dipnet.units import ScoredOn, Site
from tests.predicted import random_predictors

VOCABULARY = 61
LAYERS, HEADS, GROUPS, NEURONS, WIDTH = 3, 8, 4, 52, 32

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 320,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GATED = {**_COMMON, "intermediate_size": NEURONS, "num_key_value_heads": GROUPS, "head_dim": 6}
_PHI3 = {**_GATED, "head_dim": 8, "partial_rotary_factor": 0.5}
_SLIDING = {"sliding_window": 9}
_GEMMA = {**_GATED, **_SLIDING, "layer_types": ["sliding_attention", "full_attention"] * 2}
_GEMMA["layer_types"] = _GEMMA["layer_types"][:LAYERS]
_OPT = {**_COMMON, "ffn_dim": NEURONS}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_GATED, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {**_GATED, **_SLIDING}),
    "qwen2": ("Qwen2", {key: value for key, value in _GATED.items() if key != "head_dim"}),
    "qwen3": ("Qwen3", _GATED),
    "phi3": ("Phi3", _PHI3),
    "gemma2": ("Gemma2", _GEMMA),
    "gemma3": ("Gemma3Text", _GEMMA),
    "opt": ("OPT", _OPT),
    "opt-350m": ("OPT", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
}


@cache
def shared(family: str) -> PreTrainedModel:
    """The family's float64 model: always the same object, so leave it as it was."""
    name, options = CONFIGS[family]
    torch.manual_seed(sum(family.encode()))
    config = getattr(transformers, f"{name}Config")(**options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # as in tests/families.py
            spread = 1.5 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
            offset = parameter if parameter.dim() == 1 else 0
            parameter.copy_(offset + spread * torch.randn_like(parameter))
    return model


def own(family: str) -> PreTrainedModel:
    """A copy of the family's model, to change at will."""
    return copy.deepcopy(shared(family))


@cache
def predictors(family: str) -> Predictors:
    """Of the family's model."""
    return random_predictors(shared(family))


def dejavu(family: str, **options: Any) -> dipnet.DejaVu:
    """A third of the neurons and three of the eight heads."""
    densities = {"mlp_density": 0.33, "head_density": 0.375, **options}
    return dipnet.DejaVu(**densities, predictors=predictors(family))


@dataclass(frozen=True)
class Turns(NeuronsAndHeads):
    """One head for ``HOLD`` tokens, then the next: the others wait for HEADS - 1 times as many."""

    name: ClassVar[str] = "turns"
    neurons_scored_on: ClassVar[ScoredOn] = "position"
    heads_scored_on: ClassVar[ScoredOn] = "position"
    HOLD: ClassVar[int] = 3

    def score(self, site: Site, x: Tensor) -> Tensor:
        """(..., 1) positions -> (..., units): 0 for the unit whose turn it is, others below."""
        units = torch.arange(site.units, device=x.device)
        return -((units - x // self.HOLD - site.layer) % site.units).float()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Seeded token ids, none of them a special token."""
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def evaluate(model: PreTrainedModel, method: Any, ids: Tensor, **options: Any) -> Tensor:
    """Logits of whole sequences by the reference; the model is dense again afterwards."""
    with dipnet.sparsify(model, method, backend="reference", **options):
        return model(ids, use_cache=False).logits


@torch.no_grad()
def decode(model: PreTrainedModel, ids: Tensor, past: Any = None, prompt: int = 1) -> Tensor:
    """Logits of all tokens: those of the prompt in one call, the others one by one."""
    past = transformers.DynamicCache(config=model.config) if past is None else past
    made = []
    for part in ids.split([prompt] + [1] * (ids.shape[1] - prompt), dim=1):
        made.append(model(part, past_key_values=past, use_cache=True).logits)
    return torch.cat(made, dim=1)
