"""Attention of kept heads, and the keys and values that skipped ones leave out.

A layer remembers what attention read for the last tokens, in a ring. When a head is used, its keys
and values of the tokens since its group was last used come from there, by the product that this
token's need anyway. Each group is used once in so many tokens, in turn, wanted or not, so that the
ring never loses what is still missing. In a batch a head is used when any sequence keeps it: its
weights are read once, and the others' keys and values are completed too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dipnet.kernels import gpu, steps
from dipnet.kernels.steps import Heads, Rows, UsedHeads
from dipnet.models.decoding.blocks import Block, columns
from dipnet.models.decoding.sites import Kept
from dipnet.models.decoding.stacked import Stacked


class SkippedHeads:
    """The attention of one layer, of which every token skips some heads."""

    def __init__(
        self,
        block: Block,
        heads: Heads,
        rotation: tuple[Tensor, Tensor] | None,
        kept: tuple[Tensor, Tensor],
        rows: Rows,
        ring: int,
    ) -> None:
        self.block = block
        self.heads = heads
        self.at = rotation, *kept, rows, heads
        device, batch = kept[0].device, len(rows.padding)
        self.inputs = kept[0].new_zeros(ring, batch, block.qkv.stacked.inputs)
        self.until = torch.zeros(batch, heads.groups, dtype=torch.int64, device=device)

    def prompt_ended(self, tokens: int) -> None:
        """The cache holds all keys and values of so many columns."""
        self.until.fill_(tokens - 1)

    def __call__(self, used: UsedHeads) -> Tensor:
        """What attention puts out, (rows, width); what it reads is in ``inputs`` already."""
        projections, size = self.block.qkv.stacked, self.heads.size
        assert isinstance(projections, Stacked), "columns hold no heads"
        made = gpu.rows_product(
            self.inputs.flatten(0, 1),
            used.index,
            projections.weight,
            count=used.count,
            bias=projections.bias,
            block=size,
        )
        steps.complete(made, used, self.until, *self.at)
        attended = steps.attend(made, *self.at, used)
        kept = Kept(used.index[: used.most], used.queries)
        return columns(self.block.out.stacked, attended, kept, size, compact=True)
