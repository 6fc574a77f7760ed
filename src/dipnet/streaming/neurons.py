"""An MLP from records of whole neurons: rows of gate and up, then, when the model's own code has
activated what they made, columns of down, in one request of the engine.

Masks that a predictor decides are known before the block. In decoding they are decided where the
predictor reads, and the records that they want are asked for there: no guess, they are the mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dipnet.models.tokens import TokenState
from dipnet.store.index import Group
from dipnet.streaming.engine import Engine
from dipnet.streaming.linear import Masks, RecordGroup


class NeuronGroup(RecordGroup):
    """The neurons of one layer: (..., width) -> what gate and up make -> (..., width).

    A prompt goes whole, so that each record is read once for all of it.
    """

    def __init__(
        self, engine: Engine, group: Group, tokens: TokenState, masks: Masks | None
    ) -> None:
        super().__init__(engine, group, tokens, masks)
        self._decided: Tensor | None = None
        self._scores = torch.ones(group.units)

    def decide_early(self, _module: nn.Module, _args: Any) -> None:
        """Torch's forward pre-hook, where the predictor reads: decide, and ask for the records."""
        self._decided = None
        tokens = self.tokens
        if self.masks is None or tokens.all_dense or not (tokens.running and tokens.single):
            return
        masks = self.masks(self.masks.scored(self._scores), self._flags())
        self._decided = masks
        self.engine.prefetch(self.key, masks.any(dim=0), self._scores, certain=True)

    def product(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., matrices * neurons): what the rows of gate and up make."""
        flat = x.detach().reshape(-1, x.shape[-1]).float().contiguous()
        masks, self._decided = self._decided, None
        if masks is None:
            masks = self._wanted(self._scored(flat), self._flags())
        return self.engine.rows(self.key, flat, masks).view(*x.shape[:-1], -1).to(x.dtype)

    def columns(self, h: Tensor) -> Tensor:
        """(..., neurons) activations of the neurons of the last product -> (..., width)."""
        flat = h.detach().reshape(-1, h.shape[-1]).float().contiguous()
        if self.look_ahead is not None and len(flat) == 1:
            self.look_ahead.during()
        return self.engine.columns(self.key, flat).view(*h.shape[:-1], -1).to(h.dtype)


class NeuronColumns(nn.Module):
    """Stands for the linear layer that holds ``down``."""

    def __init__(self, group: NeuronGroup, bias: Tensor | None) -> None:
        super().__init__()
        self.group = group
        self.in_features, self.out_features = group.group.channels, group.group.rows
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, h: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        made = self.group.columns(h)
        return made if self.bias is None else made + self.bias

    def extra_repr(self) -> str:
        """What ``print(model)`` says of it."""
        return f"{self.in_features}, {self.out_features}, from records of {self.group.group.label}"
