"""A token of each row through a whole decoder, on kernels and cuBLAS alone: what a CUDA graph
holds.

Hugging Face's modules hold the weights, and nothing else of theirs runs: between two products there
is one launch. Rounded where they round, so that a dense step gives their logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import StaticSlidingWindowLayer

from dipnet.kernels import steps
from dipnet.kernels.steps import MOST_CHANNELS, Heads, Norm, Rows
from dipnet.models.decoding.blocks import Block
from dipnet.models.decoding.counts import StepCounts
from dipnet.models.decoding.forecast import Forecast
from dipnet.models.decoding.sites import Kept, SiteStep
from dipnet.models.decoding.skipped import SkippedHeads
from dipnet.models.families import Decoder


@dataclass(frozen=True)
class Recipe:
    """What the families that can be decoded this way differ in, beside the table of families.

    ``first_norm`` is the normalisation before attention, ``last_norm`` that after all layers;
    ``centred`` says that they are layer norms, ``positions`` is the table of learned positions and
    ``offset`` the row of the first.
    """

    first_norm: str = "input_layernorm"
    last_norm: str = "norm"
    centred: bool = False
    positions: str | None = None
    offset: int = 0


_LLAMA = Recipe()
_OPT = Recipe(
    "self_attn_layer_norm", "final_layer_norm", centred=True, positions="embed_positions", offset=2
)
RECIPES: Mapping[str, Recipe] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3"), _LLAMA),
    "opt": _OPT,
}
ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Kinds of rotation that do not depend on a sequence's length."""


def why_not(decoder: Decoder, length: int) -> str | None:
    """Why a model cannot be decoded so with a cache of that length, as the end of a sentence."""
    config = decoder.model.config.get_text_config()
    if decoder.spec.family not in RECIPES:
        return f"has no decode loop for models of the family {decoder.spec.family}"
    inner: Any = decoder.model.get_decoder()
    rotary = getattr(inner, "rotary_emb", None)
    if rotary is not None and rotary.rope_type not in ROTATIONS:
        return f"has no decode loop for the rotation {rotary.rope_type!r}"
    if decoder.spec.head_size > MOST_CHANNELS:
        return f"has no decode loop for heads of more than {MOST_CHANNELS} channels"
    if getattr(inner, "project_in", None) is not None:
        return "has no decode loop for embeddings of another width than the model's"
    if not getattr(config, "do_layer_norm_before", True):
        return "has no decode loop for models that normalise after their blocks"
    for layer in StaticCache(config=config, max_cache_len=length).layers:
        if isinstance(layer, StaticSlidingWindowLayer) and layer.max_cache_len < length:
            return f"has no decode loop for a window of {layer.max_cache_len} tokens"
    return None


class TokenStep:
    """The step of a token of each of ``rows`` sequences: reads ``token`` (rows,) int64 and where
    they stand, and moves on.

    ``cache`` is their static cache; the step writes to it and does not count in it.
    ``ring`` is for how many tokens a layer remembers what a skipped head would have read.
    """

    def __init__(
        self,
        decoder: Decoder,
        blocks: list[Block],
        counts: StepCounts,
        cache: StaticCache,
        rows: int,
        ring: int,
    ) -> None:
        self.recipe = RECIPES[decoder.spec.family]
        self.inner: Any = decoder.model.get_decoder()
        self.head: Any = decoder.model.get_output_embeddings()
        self.counts = counts
        device = decoder.model.device
        self.token = torch.zeros(rows, dtype=torch.int64, device=device)
        self.rows = Rows(torch.zeros_like(self.token[:1]), torch.zeros_like(self.token))
        last = getattr(self.inner, self.recipe.last_norm)
        self.last_norm = None if last is None else _norm(last, self.recipe.centred)
        rotation = self._rotation(cache.layers[0].keys)
        self.ring = ring
        predicted = [step for block in blocks for step in (block.heads, block.mlp.neurons) if step]
        self.forecast = Forecast(predicted, rows, ring, device)
        self.layers = [
            LayerStep(self, decoder, number, block, cache, rotation)
            for number, block in enumerate(blocks)
        ]

    def prompt_ended(self, tokens: int, padding: Tensor | None) -> None:
        """The cache holds so many columns; the first (rows,) ``padding`` are no tokens."""
        self.rows.position.fill_(tokens)
        if padding is None:
            self.rows.padding.zero_()
        else:
            self.rows.padding.copy_(padding)
        for layer in self.layers:
            if layer.skipped is not None:
                layer.skipped.prompt_ended(tokens)

    def __call__(self) -> Tensor:
        """The (rows, vocabulary) logits after ``token``."""
        hidden, delta = self._embedded(), None
        place = self.rows.position % self.ring
        for layer in self.layers:
            hidden, delta = layer(hidden, delta, place)
        if self.last_norm is None:
            x = hidden if delta is None else hidden + delta
        else:
            _, x = steps.add_norm(hidden, delta, self.last_norm)
        logits: Tensor = self.head(x)
        self.rows.position.add_(1)
        self.counts.count_tokens(len(self.token))
        return logits

    def _embedded(self) -> Tensor:
        hidden: Tensor = self.inner.embed_tokens(self.token)
        if self.recipe.positions is None:
            return hidden
        table = getattr(self.inner, self.recipe.positions).weight
        turns = self.rows.position - self.rows.padding
        return hidden + table.index_select(0, turns + self.recipe.offset)

    def _rotation(self, keys: Tensor) -> tuple[Tensor, Tensor] | None:
        """The (length, rotated channels) cosines and sines of all positions, as the model's own."""
        rotary = getattr(self.inner, "rotary_emb", None)
        if rotary is None:
            return None
        positions = torch.arange(keys.shape[2], device=keys.device)[None]
        cosines, sines = rotary(keys, positions)
        return cosines[0].contiguous(), sines[0].contiguous()


class LayerStep:
    """One decoder layer of a step."""

    def __init__(
        self,
        step: TokenStep,
        decoder: Decoder,
        number: int,
        block: Block,
        cache: StaticCache,
        rotation: tuple[Tensor, Tensor] | None,
    ) -> None:
        self.number = number
        self.forecast = step.forecast
        self.block = block
        recipe = step.recipe
        names = recipe.first_norm, decoder.family.mlp_norm
        self.norms = [_norm(decoder.module(number, name), recipe.centred) for name in names]
        self.heads = _heads(decoder, number)
        self.keys, self.values = cache.layers[number].keys, cache.layers[number].values
        self.rotation = rotation
        self.rows = step.rows
        self.skipped = None
        if block.heads is not None and block.heads.way(len(step.token)) != "whole":
            kept = self.keys, self.values
            at = step.rows, step.ring
            self.skipped = SkippedHeads(block, self.heads, rotation, kept, *at)

    def __call__(
        self, hidden: Tensor, delta: Tensor | None, place: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(rows, width) residual stream and what is still to be added to it -> the same, later.

        ``place`` (1,) is the tokens' in the rings of skipped heads.
        """
        block, mlp = self.block, self.block.mlp
        ring = None if self.skipped is None else (self.skipped.inputs, place)
        hidden, x, kept = _normed(hidden, delta, self.norms[0], block.qkv.site, ring)
        self.forecast.see(2 * self.number, hidden, place)
        delta = self._attention(x, kept)
        hidden, x, kept = _normed(hidden, delta, self.norms[1], mlp.inputs.site)
        self.forecast.see(2 * self.number + 1, hidden, place)
        neurons = mlp.neurons if mlp.scored_on == "residual" else None
        chosen = None if neurons is None else self.forecast.take(neurons).kept
        return hidden, mlp(x, kept, chosen)

    def _attention(self, x: Tensor, kept: Kept | None) -> Tensor:
        block, heads = self.block, self.block.heads
        if self.skipped is not None and heads is not None:
            choice = self.forecast.take(heads)
            assert choice.used is not None, "heads are used, not only kept"
            return self.skipped(choice.used)
        qkv = block.qkv.product(x, kept)
        at = self.rotation, self.keys, self.values, self.rows, self.heads
        made = steps.attend(qkv, *at)
        if heads is None:
            return block.out(made)
        return block.out.product(made, self.forecast.take(heads).kept)


def _normed(
    hidden: Tensor,
    delta: Tensor | None,
    norm: Norm,
    site: SiteStep | None,
    ring: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Kept | None]:
    """`steps.add_norm`, and what the site that reads the result keeps of it."""
    if site is not None and ring is None:
        return site.normed(hidden, delta, norm)
    hidden, x = steps.add_norm(hidden, delta, norm, ring)
    return hidden, x, None if site is None else site.decide(x)


def _norm(module: Any, centred: bool) -> Norm:
    epsilon = module.eps if centred else module.variance_epsilon
    bias = getattr(module, "bias", None)
    return Norm(module.weight, bias, epsilon, centred)


def _heads(decoder: Decoder, layer: int) -> Heads:
    spec = decoder.spec
    attention: Any = decoder.module(layer, decoder.family.attention)
    norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return Heads(
        spec.heads,
        spec.matrices["k"][0] // spec.head_size,
        spec.head_size,
        attention.scaling,
        *(None if norm is None else _norm(norm, centred=False) for norm in norms),
    )
