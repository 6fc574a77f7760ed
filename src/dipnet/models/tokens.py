"""Which tokens of the running forward call are pruned: those after the prompt, and no padding.

Knows positions and padding; knows no method.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from dipnet.errors import InputError

Prefill = Literal["dense", "sparse"] | int
"""How a prompt is processed: pruned like every token ("sparse"), dense ("dense": what the first
forward call of a sequence holds), or the first so many positions of every sequence dense."""


def check_prefill(prefill: Prefill) -> Prefill:
    """Return a valid ``prefill``; else raise InputError."""
    number = isinstance(prefill, int) and not isinstance(prefill, bool) and prefill >= 0
    if prefill in ("dense", "sparse") or number:
        return prefill
    raise InputError(f"prefill is 'dense', 'sparse' or a number of tokens, not {prefill!r}")


class TokenState:
    """The tokens of the forward call that is running; every site of the model reads it.

    ``dense`` is a (batch, tokens) bool of prompt tokens that stay dense, or None when there are
    none; ``counted`` the (batch, tokens) bool of tokens whose units are counted, or None for all.
    ``all_dense`` says that no token of the call is pruned, ``single`` that it brings one token for
    each sequence. ``running`` says that the call has not
    ended: what activation checkpointing computes again later is masked as in the call, and not
    counted. With ``positions``, ``position`` is (batch, tokens, 1) int64: each token's own place in
    its sequence, padding left out.
    """

    def __init__(self, prefill: Prefill, *, positions: bool = False) -> None:
        self.prefill = check_prefill(prefill)
        self.positions = positions
        self.clear()

    def clear(self) -> None:
        """Before the first call: every token is pruned, none is counted."""
        self.running = False
        self.dense: Tensor | None = None
        self.counted: Tensor | None = None
        self.position: Tensor | None = None
        self.all_dense = False
        self.single = False

    def begin(self, inputs: Tensor, padding: Any, cache: Any) -> None:
        """Start a forward call over ``inputs`` (batch, tokens, ...).

        ``padding`` is Hugging Face's attention mask; only its two-dimensional form says which
        tokens are padding. ``cache`` is the key/value cache or None.
        """
        self.clear()
        self.running = True
        batch, tokens = inputs.shape[:2]
        self.single = tokens == 1
        real = padding.bool() if isinstance(padding, Tensor) and padding.dim() == 2 else None
        self.counted = None if real is None else real[:, -tokens:]
        if self.prefill == "sparse" and not self.positions:
            return
        past = int(cache.get_seq_length()) if cache is not None else 0
        if self.positions:
            self.position = _positions(inputs, real, past)
        if self.prefill == "sparse":
            return
        whole = tokens if past == 0 else 0
        prompt = whole if self.prefill == "dense" else self.prefill - past
        self.all_dense = prompt >= tokens
        if real is not None and not self.all_dense and self.prefill != "dense":
            # Each sequence's own positions: padding in front of it is none of its prompt.
            self._keep_dense(real.cumsum(dim=1)[:, -tokens:] <= self.prefill)
        elif prompt > 0:
            self._keep_dense(torch.arange(tokens, device=inputs.device).expand(batch, -1) < prompt)

    def _keep_dense(self, dense: Tensor) -> None:
        self.dense = dense
        self.counted = ~dense if self.counted is None else self.counted & ~dense

    def sparse_tokens(self, inputs: Tensor) -> Tensor | int:
        """What to count as sparse tokens of this call: a bool mask, or their number."""
        if self.counted is None:
            return inputs.shape[0] * inputs.shape[1]
        return self.counted


def _positions(inputs: Tensor, real: Tensor | None, past: int) -> Tensor:
    """(batch, tokens, 1) the tokens' positions in their own sequences, after ``past`` others."""
    batch, tokens = inputs.shape[:2]
    if real is not None:
        return (real.cumsum(dim=1)[:, -tokens:] - 1).clamp(min=0).unsqueeze(-1)
    own = torch.arange(past, past + tokens, device=inputs.device)
    return own.expand(batch, -1).unsqueeze(-1)
