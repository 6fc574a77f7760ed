"""Attention of kept heads, and the keys and values that skipped ones leave out.

A layer remembers what attention read for the last tokens, in a ring. When a head is used, its keys
and values of the tokens since its group was last used come from there, by the product that this
token's need anyway. Each group is used once in so many tokens, in turn, wanted or not, so that the
ring never loses what is still missing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dipnet.kernels import gpu, steps
from dipnet.kernels.steps import Heads
from dipnet.models.decoding.blocks import Block
from dipnet.models.decoding.sites import Kept
from dipnet.units import Site, kept_units


class UsedHeads:
    """Which heads of the three projections a token needs of one layer.

    They are counted one after the other: query heads, groups' keys, groups' values. Needed are the
    kept query heads, and the keys and values of their groups and of those whose turn it is.
    """

    def __init__(self, site: Site, ring: int, device: torch.device) -> None:
        groups = site.units // site.group
        self.group = site.group
        turns = torch.arange(groups, device=device) % ring
        self.turns = torch.cat([turns.new_full((site.units,), -1), turns, turns])
        self.offsets = torch.tensor([site.units, site.units + groups], device=device)[:, None]
        used = min(groups, kept_units(site.density, site.units) + -(-groups // ring))
        self.most = kept_units(site.density, site.units) + 2 * used

    def __call__(self, heads: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """(1, k) kept heads, and (1,) whose turn it is -> (most,) int32; of them (1,) are valid."""
        kept = heads[0].long()
        needed = torch.cat([kept, (kept // self.group + self.offsets).flatten()])
        mask = (self.turns == place).index_fill_(0, needed, True)
        index, count = gpu.union_indices(mask[None])
        return index[: self.most], count


class SkippedHeads:
    """The attention of one layer, of which every token skips some heads."""

    def __init__(
        self,
        block: Block,
        heads: Heads,
        rotation: tuple[Tensor, Tensor] | None,
        kept: tuple[Tensor, Tensor],
        ring: int,
    ) -> None:
        self.block = block
        self.heads = heads
        self.at = rotation, *kept
        device, projections = kept[0].device, block.qkv.stacked
        self.inputs = kept[0].new_zeros(ring, projections.weight.shape[1])
        self.until = torch.zeros(heads.groups, dtype=torch.int64, device=device)

    def prompt_ended(self, tokens: int) -> None:
        """The cache holds all keys and values of so many tokens."""
        self.until.fill_(tokens - 1)

    def __call__(self, kept: Tensor, index: Tensor, count: Tensor, position: Tensor) -> Tensor:
        """What attention puts out, (1, width); what it reads is in ``inputs`` already.

        ``kept`` (1, k) are the heads, ``count`` of ``index`` what `UsedHeads` says of them.
        """
        projections, size = self.block.qkv.stacked, self.heads.size
        made = gpu.rows_product(
            self.inputs,
            index,
            projections.weight,
            count=count,
            bias=projections.bias,
            block=size,
        )
        at = *self.at, position, self.heads
        steps.complete(made, index, count, kept.shape[1], self.until, *at)
        attended = steps.attend(made, *at, kept)
        return self.block.out.product(attended, Kept(kept), compact=True)
