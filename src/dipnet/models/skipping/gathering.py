"""Gathering of the rows and columns that are kept, in plain torch.

Shapes are fixed on every device but the CPU, and nothing waits for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

AT_ONCE = ("cpu",)
"""Devices that compute at once: nothing waits when they are asked for a number."""
PIECE_BYTES = 1 << 20
"""Weights that a core copies and multiplies at a time: they should stay in its cache between."""


def kept_indices(mask: Tensor, most: int) -> Tensor:
    """(n,) bool -> the indices of what is kept; all n of them are in order.

    On a CPU as many as there are. Elsewhere ``most``, which must be no fewer, so that nothing waits
    for the device: first the kept ones, then others, which the masks drop later.
    """
    if mask.device.type in AT_ONCE:
        return mask.nonzero().squeeze(-1)
    if most >= len(mask):
        return torch.arange(len(mask), device=mask.device)
    return mask.byte().sort(descending=True, stable=True).indices[:most]


def gather_blocks(parameter: Tensor, index: Tensor, block: int) -> Tensor:
    """(n * block, ...) -> the blocks of ``block`` rows at ``index``: (kept * block, ...)."""
    if len(index) * block == len(parameter):  # all of them, in order
        return parameter
    return parameter.unflatten(0, (-1, block)).index_select(0, index).flatten(0, 1)


def rows_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, block: int
) -> Tensor:
    """(..., inputs) -> (..., kept * block): the blocks of rows at ``index`` times ``x``."""
    made = [
        functional.linear(x, gather_blocks(weight, piece, block))
        for piece in _pieces(index, weight, block)
    ]
    product = made[0] if len(made) == 1 else torch.cat(made, dim=-1)
    return product if bias is None else product + gather_blocks(bias, index, block)


def columns_product(x: Tensor, columns: Tensor, index: Tensor, block: int) -> Tensor:
    """(..., kept * block) -> (..., outputs): the blocks of (n * block, outputs) at ``index``."""
    if block == 1 and x.numel() == len(index) and x.device.type == "cpu":
        # one token: added up where the columns lie, without a copy of them; a bag for each thread
        size = max(1, -(-len(index) // torch.get_num_threads()))
        bags = torch.arange(0, len(index), size)
        summed = functional.embedding_bag(
            index, columns, bags, per_sample_weights=x.flatten(), mode="sum"
        )
        return summed.sum(dim=0).view(*x.shape[:-1], -1)
    pieces = _pieces(index, columns, block)
    parts = x.split([len(piece) * block for piece in pieces], dim=-1)
    made = [
        part @ gather_blocks(columns, piece, block)
        for part, piece in zip(parts, pieces, strict=True)
    ]
    return made[0] if len(made) == 1 else torch.stack(made).sum(dim=0)


def _pieces(index: Tensor, weight: Tensor, block: int) -> Sequence[Tensor]:
    """An index in pieces whose copies stay in a CPU's cache; whole where nothing is copied."""
    if weight.device.type != "cpu" or len(index) * block == len(weight):
        return (index,)
    size = PIECE_BYTES * torch.get_num_threads()
    return index.split(max(1, size // (block * weight[0].nbytes)))


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
        made = columns_product(x, self.module.weight.t(), index, block)
        return made if self.module.bias is None else made + self.module.bias

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
