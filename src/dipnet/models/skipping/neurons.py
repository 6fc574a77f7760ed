"""The MLP of one layer, of kept neurons only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dipnet.models.skipping.base import Skip
from dipnet.models.skipping.gathering import kept_indices


@dataclass(frozen=True)
class _Step:
    """The (kept,) gathered neurons, and (batch, kept) which sequence keeps which."""

    index: Tensor
    wanted: Tensor


class NeuronSkip(Skip):
    """Between its linear layers the MLP is as narrow as what was gathered."""

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.step = None
        if self.skipping.stepping():
            x = args[0] if args else kwargs["hidden_states"]
            mask = self.mask.decide(x).reshape(-1, self.site.units)
            index = kept_indices(mask.any(dim=0), len(mask) * self.most)
            self.step = _Step(index, mask.index_select(1, index))

    def _made(self, held: tuple[str, ...], module: nn.Linear, x: Tensor) -> Tensor:
        made = [self._rows(matrix, x, self.step.index) for matrix in held]
        return made[0] if len(made) == 1 else torch.cat(made, dim=-1)

    def _end(self, step: _Step, x: Tensor) -> Tensor:
        return self._columns("down", x * step.wanted.view(x.shape), step.index)
