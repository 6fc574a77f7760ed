"""Gathering of the rows and columns that are kept, in plain torch.

Shapes are fixed on every device but the CPU, and nothing waits for one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def kept_indices(mask: Tensor, most: int) -> Tensor:
    """(n,) bool -> the indices of what is kept; all n of them are in order.

    On a CPU as many as there are. Elsewhere ``most``, which must be no fewer, so that nothing waits
    for the device: first the kept ones, then others, which the masks still drop.
    """
    if mask.device.type == "cpu":
        return mask.nonzero().squeeze(-1)
    if most >= len(mask):
        return torch.arange(len(mask), device=mask.device)
    return mask.byte().sort(descending=True, stable=True).indices[:most]


def gather_blocks(parameter: Tensor, index: Tensor, block: int) -> Tensor:
    """(n * block, ...) -> the blocks of ``block`` rows at ``index``: (kept * block, ...)."""
    if len(index) * block == len(parameter):  # all of them, in order
        return parameter
    return parameter.unflatten(0, (-1, block)).index_select(0, index).flatten(0, 1)


class Columns:
    """A linear layer of which some columns are multiplied.

    A column should be a run of memory: before the first token the weights take the other order in
    memory, with values and shape as they were; `undo` gives them the order back.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self._turned = False

    def product(self, x: Tensor, index: Tensor, block: int) -> Tensor:
        """(..., kept * block) values of the kept columns -> (..., outputs)."""
        if not self._turned:
            self._turn()
        rows = gather_blocks(self.module.weight.t(), index, block)
        return functional.linear(x, rows.t(), self.module.bias)

    def undo(self) -> None:
        """The order in memory as it was."""
        if self._turned:
            self._turned = False
            self.module.weight.data = self.module.weight.data.contiguous()

    @torch.no_grad()
    def _turn(self) -> None:
        with torch.inference_mode(False):  # else they could never be trained again
            weight = self.module.weight
            weight.data = weight.data.t().contiguous().t()
        self._turned = True
