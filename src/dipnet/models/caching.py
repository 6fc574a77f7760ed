"""Masks that depend on what is in memory: one cache a site, one token after another.

What a packed model streamed from disk would find in its cache, without a packed model: the masks,
hits and misses are those of that run, the weights are all in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dipnet.errors import InputError
from dipnet.methods.base import Method, SiteKey
from dipnet.units import Site


class UnitCache(Protocol):
    """What masks need of a cache; `dipnet.cache` has it, and an engine's own."""

    @property
    def resident(self) -> NDArray[np.bool_]:
        """(units,) whether a unit is in memory."""

    def access(self, wanted: NDArray[np.bool_]) -> tuple[int, int, int]:
        """Use the (units,) wanted units: how many were hits, misses, and misses admitted."""


@dataclass(frozen=True)
class CacheState:
    """The caches of a model's sites: their slots by (layer, name), and whether any was used."""

    policy: str
    slots: Mapping[SiteKey, int]
    warm: bool


class SiteCache:
    """The cache of one site, warm from one call to the next, and the masks made with it.

    ``sequential``: what a token finds depends on the calls before, so none can be made again.
    """

    sequential: ClassVar[bool] = True

    def __init__(self, site: Site, method: Method, cache: UnitCache) -> None:
        self.site = site
        self.method = method
        self.cache = cache

    def select(self, scores: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor | int]:
        """(..., units) scores -> the mask, and how many of the wanted units were resident.

        Tokens go in order, the rows of a batch one after the other: each mask is decided with
        what the tokens before have left in the cache. ``counted`` is a (...) bool, None for all:
        other tokens (padding, a dense prompt) get a mask like any, but do not use the cache.
        """
        rows = scores.reshape(-1, self.site.units)
        uses = [True] * len(rows) if counted is None else counted.flatten().tolist()
        made, hits = [], 0
        for row, used in zip(rows, uses, strict=True):
            resident = torch.from_numpy(self.cache.resident.copy()).to(row.device)
            mask = self.method.select(self.site, row, resident)
            if used:
                hits += self.cache.access(mask.cpu().numpy())[0]
            made.append(mask)
        masks = made[0] if len(made) == 1 else torch.stack(made)
        return masks.view(scores.shape), hits


def check_not_recomputed(running: bool) -> None:
    """Raise InputError when a layer is computed outside a call: its masks would be others."""
    if not running:
        raise InputError(
            "with a cache, masks depend on the tokens before, so a layer cannot be computed again: "
            "turn gradient checkpointing off, or sparsify without a cache"
        )
