"""Keys and values that a key/value cache still lacks, because their heads were skipped.

A layer of the cache remembers what attention read for the last tokens, and which groups of heads
have no keys and values of theirs. Everything is a tensor of a fixed shape on the model's device,
and nothing here asks the device for a number: a step can be captured in a CUDA graph.

It stands with the cache, not with the model: a new sequence has a cache of its own, two sequences
may take turns, and a copy of a cache lacks what the cache lacked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from dipnet.errors import InputError

KNOWN = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
"""The cache layers whose last tokens can be found."""

Rotation = tuple[Tensor, ...]
"""The cosines and sines of a token's position, (batch, r) each; or nothing."""


class Pending:
    """The last ``tokens`` single tokens of a batch in one layer: a ring of that many places.

    ``inputs`` (tokens, batch, width) are what the key and value projections read, ``rotation``
    (tokens, batch, r) what belongs to their positions, ``missing`` (tokens, groups) bools. ``at``
    (1,) int64 is the place that the next token takes: by then nothing of the token that was there
    is missing, since all groups are `due` in turn while the ring goes round once. ``open`` says
    that something may be missing; ``stepping`` that a token's keys and values, of some groups only,
    are about to be added to the cache.
    """

    def __init__(self, tokens: int, x: Tensor, rotation: Rotation, groups: int) -> None:
        with torch.inference_mode(False):  # else only inference mode could write to it
            self.inputs = x.new_zeros(tokens, *x.shape)
            self.rotation = [part.new_zeros(tokens, *part.shape) for part in rotation]
            self.missing = torch.zeros(tokens, groups, dtype=torch.bool, device=x.device)
            self.at = torch.zeros(1, dtype=torch.int64, device=x.device)
        self.open = False
        self.stepping = False

    @property
    def tokens(self) -> int:
        """How many tokens the ring holds."""
        return len(self.inputs)

    @property
    def most_due(self) -> int:
        """The most groups that are due at one step."""
        return -(-self.missing.shape[1] // self.tokens)

    def ages(self) -> Tensor:
        """(tokens,) int64: 1 for the place of the last token, 2 for that of the one before, ..."""
        places = torch.arange(self.tokens, device=self.at.device)
        return (self.at - 1 - places) % self.tokens + 1

    def due(self) -> Tensor:
        """(groups,) bool: those that have to be computed now, whether a head wants them or not.

        Each group is due once in ``tokens`` steps, so that no step has to do more than the others.
        """
        groups = torch.arange(self.missing.shape[1], device=self.at.device)
        return groups % self.tokens == self.at

    def add(self, x: Tensor, rotation: Rotation, groups: Tensor) -> None:
        """Take in a token: its (batch, width) input; only ``groups`` (indices) are in the cache."""
        self.inputs.index_copy_(0, self.at, x[None])
        for kept, part in zip(self.rotation, rotation, strict=True):
            kept.index_copy_(0, self.at, part[None])
        missing = torch.ones_like(self.missing[:1]).index_fill_(1, groups, False)
        self.missing.index_copy_(0, self.at, missing)
        self.at.add_(1).remainder_(self.tokens)
        self.open = self.stepping = True

    def clear(self) -> None:
        """Nothing is missing."""
        self.missing.zero_()
        self.open = False

    def forget(self, tokens: int) -> None:
        """The last tokens are no longer in the cache."""
        self.missing &= (self.ages() > tokens).unsqueeze(1)
        self.at.sub_(tokens).remainder_(self.tokens)

    def select(self, rows: Tensor) -> None:
        """The cache's batch is now these rows of what it was."""
        self.inputs = self.inputs.index_select(1, rows)
        self.rotation = [part.index_select(1, rows) for part in self.rotation]


class _LackingLayer(CacheLayerMixin):
    """What a cache layer does while it lacks keys and values; its own class comes after this."""

    pending: Pending

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens: by the steps that know what is missing, or when nothing is."""
        if self.pending.open and not self.pending.stepping:
            raise InputError(
                "this key/value cache lacks keys and values of heads that were skipped: go on with "
                "the sparsified model it was made with, or begin the sequence anew"
            )
        self.pending.stepping = False
        return super().update(*args, **kwargs)

    def reset(self) -> None:
        self.pending.clear()
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        self.pending.forget(abs(tokens_to_remove))
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.pending.select(beam_idx.to(self.pending.inputs.device))
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        inputs = self.pending.inputs
        rows = torch.arange(inputs.shape[1], device=inputs.device)
        self.pending.select(rows.repeat_interleave(repeats))
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        inputs = self.pending.inputs
        rows = torch.arange(inputs.shape[1], device=inputs.device)
        self.pending.select(rows[indices.to(inputs.device)])
        super().batch_select_indices(indices)


_LACKING = {kind: type(kind.__name__, (_LackingLayer, kind), {}) for kind in KNOWN}


def cache_layer(past: Any, layer: int) -> Any | None:
    """The layer of a Hugging Face cache that holds keys and values already; None without one."""
    layers = past.layers if isinstance(past, Cache) else []
    held = layers[layer] if layer < len(layers) else None
    return held if held is not None and held.is_initialized else None


def of_layer(held: Any) -> Pending | None:
    """What a cache layer may lack; None when none of its heads was ever skipped."""
    return getattr(held, "pending", None)


def why_not(held: Any, x: Tensor) -> str | None:
    """Why a cache layer cannot lack anything, as the end of a sentence; None when it can."""
    if not isinstance(held, _LackingLayer) and type(held) not in KNOWN:
        return f"cannot find the last tokens in a cache layer of type {type(held).__name__}"
    if held.keys.device != x.device:
        return f"needs keys and values on {x.device}, where attention is, not {held.keys.device}"
    return None


def start(held: Any, tokens: int, x: Tensor, rotation: Rotation, groups: int) -> Pending:
    """Begin to remember for a cache layer that lacks nothing yet: (batch, width) ``x`` as one."""
    made = held.pending = Pending(tokens, x, rotation, groups)
    if not isinstance(held, _LackingLayer):
        held.__class__ = _LACKING[type(held)]
    return made


def last_places(held: Any, ages: Tensor) -> Tensor:
    """(n,) int64: where in a layer's keys the tokens of these ages are; below 0, no more there."""
    if isinstance(held, StaticSlidingWindowLayer):  # its tensor stops counting when it is full
        return min(held.cumulative_length_int, held.max_cache_len) - ages
    if isinstance(held, StaticLayer):
        return held.cumulative_length - ages
    return held.keys.shape[-2] - ages
