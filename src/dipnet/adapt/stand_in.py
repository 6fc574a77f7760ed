"""Cache-aware masks for training: what a site's cache would hold, for all tokens at once.

The true masks are a recursion, one token after another: a token's mask depends on what is resident,
and that on the masks before it. Here the recursion is turned into rounds. The first masks are those
of a model that is all in memory; each round puts the masks of the round before through the cache's
rule, for all tokens in parallel, and decides the masks anew with what was resident then. Token t
agrees with the recursion after at most t rounds. One round is enough for training: what is hit, and
what it costs, is then nearly as with the cache, if not always by the same units (docs/adapting.md).

What is resident follows from the masks in parallel, because both policies keep a top share:

- ``lru``: the units used last, of those used alike the higher ones: exactly what `dipnet.cache`
  keeps while a token wants no more units than there are slots.
- ``lfu``: the units used most often. The true cache differs where a unit that is wanted now holds
  its slot against one that was used more often before.

Tokens count as one sequence, the rows of a batch one after the other, and the cache begins empty:
as `models.caching` has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from dipnet.cache import CacheSettings
from dipnet.kernels import topk_mask
from dipnet.methods.base import Method
from dipnet.models.attach import Attachment
from dipnet.models.caching import SiteCache
from dipnet.models.families import Decoder
from dipnet.units import Site

ROUNDS = 1
"""How often masks are decided anew with what would be resident."""
SPAN = 256
"""Tokens of a scan: the spans go in parallel, then what each adds up to."""


class StandIn(SiteCache):
    """The cache of one site during training: no state, so a layer may be computed again."""

    sequential: ClassVar[bool] = False

    def __init__(self, site: Site, method: Method, cache: CacheSettings, rounds: int) -> None:
        self.site = site
        self.method = method
        self.slots = round(cache.share * site.units)
        self.policy = cache.policy
        self.rounds = rounds

    def select(self, scores: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        """(..., units) scores -> the mask, and how many of the wanted units were resident: ().

        All tokens use the cache: windows of a training text have no padding.
        """
        assert counted is None, "windows have no padding and no dense prompt"
        rows = scores.reshape(-1, self.site.units)
        mask = self.method.select(self.site, rows)
        resident = resident_before(mask, self.slots, self.policy)
        for left in reversed(range(self.rounds)):
            mask = self.method.select(self.site, rows, resident)
            if left:
                resident = resident_before(mask, self.slots, self.policy)
        return mask.view(scores.shape), (mask & resident).sum()


class StandInAttachment(Attachment):
    """A method on a model whose sites have stand-ins instead of caches."""

    def __init__(
        self, decoder: Decoder, method: Method, cache: CacheSettings, rounds: int = ROUNDS
    ) -> None:
        super().__init__(decoder, method)
        self.settings = cache
        self.rounds = rounds

    def _make_cache(self, site: Site) -> SiteCache:
        return StandIn(site, self.method, self.settings, self.rounds)


def resident_before(mask: Tensor, slots: int, policy: str) -> Tensor:
    """(tokens, units) bool of what each token wanted -> what was resident when it came.

    The units that a cache of so many slots holds before each token, empty before the first.
    """
    if slots == 0:
        return torch.zeros_like(mask)
    if policy == "lru":
        number = torch.arange(1, len(mask) + 1, device=mask.device, dtype=torch.float32)
        priority = _before(mask * number[:, None], _last)
        # Of units that were used last by the same token the higher ones stay: from behind.
        best = topk_mask(priority.flip(-1), slots).flip(-1)
    else:
        priority = _before(mask.float(), _sum)
        best = topk_mask(priority, slots)
    return best & (priority > 0)


def _sum(values: Tensor) -> Tensor:
    return values.cumsum(1)


def _last(values: Tensor) -> Tensor:
    return values.cummax(1).values


def _before(values: Tensor, scan: Callable[[Tensor], Tensor]) -> Tensor:
    """(tokens, units) -> the scan of all tokens before each; 0 before the first.

    Whole numbers in float32: exact up to 2**24 tokens.
    """
    tokens = len(values)
    shifted = functional.pad(values, (0, 0, 1, -(tokens + 1) % SPAN))
    inside = scan(shifted.view(-1, SPAN, values.shape[1]))
    until = functional.pad(inside[None, :, -1], (0, 0, 1, 0))[:, :-1]
    carried = scan(until).movedim(0, 1)
    joined = inside + carried if scan is _sum else torch.maximum(inside, carried)
    return joined.flatten(0, 1)[:tokens]
