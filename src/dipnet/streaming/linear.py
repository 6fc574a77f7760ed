"""The modules that take the place of a model's linear layers, and the products behind them.

Matrices that share an input share records.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from dipnet.methods.base import Method
from dipnet.models.caching import SiteCache
from dipnet.models.masks import SiteMasks
from dipnet.models.residual import Residual
from dipnet.models.shared_product import SharedLinear, SharedProduct
from dipnet.models.tokens import TokenState
from dipnet.models.usage import Usage
from dipnet.store.index import Group
from dipnet.streaming.engine import Engine, Key
from dipnet.streaming.look_ahead import LookAhead
from dipnet.units import Site

TOKENS = 64
"""Tokens of a prompt that are multiplied together: each record is read once for all of them."""


@dataclass
class Seconds:
    """Time spent outside the native core, on masks and on guesses of them."""

    selection: float = 0.0
    guessing: float = 0.0


class EngineCache:
    """The engine's cache of one group, as `dipnet.cache` describes a cache."""

    def __init__(self, engine: Engine, key: Key) -> None:
        self._engine = engine
        self._key = key

    @property
    def resident(self) -> np.ndarray:
        """(units,) what is in memory."""
        return self._engine.resident(self._key)

    def access(self, wanted: np.ndarray) -> tuple[int, int, int]:
        """Use the (units,) wanted units."""
        return self._engine.access(self._key, wanted)


class Masks(SiteMasks):
    """Decides the masks of one site with the engine's cache, and takes the time."""

    def __init__(
        self,
        site: Site,
        method: Method,
        usage: Usage,
        cache: SiteCache | None,
        seconds: Seconds,
        residual: Residual,
    ) -> None:
        super().__init__(site, method, usage, cache)
        self.seconds = seconds
        self.residual = residual

    def scored(self, x: Tensor) -> Tensor:
        """What the score reads where ``x`` (tokens, channels) is the site's input: (tokens, n)."""
        found = self.residual.known(self.site)
        return x if found is None else found.reshape(-1, found.shape[-1])

    def __call__(self, scored: Tensor, flags: Flags) -> Tensor:
        """(tokens, n) scored activations -> (tokens, units) bool."""
        begun = time.perf_counter()
        mask = self.decide(scored, dense=flags.dense, counted=flags.counted)
        self.seconds.selection += time.perf_counter() - begun
        return mask

    def guess(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(1, channels) -> the (units,) mask and scores that ``x`` would give; nothing is kept."""
        assert self.cache is not None, "what is guessed is read"
        scores = self.method.score(self.site, x)[0]
        resident = torch.from_numpy(self.cache.cache.resident.copy())
        return self.method.select(self.site, scores, resident), scores


class HeadMasks(Masks):
    """Decides which heads are kept: the input channels of the output projection that are theirs."""

    def __call__(self, scored: Tensor, flags: Flags) -> Tensor:
        """(tokens, n) scored activations -> (tokens, channels) bool."""
        return super().__call__(scored, flags).repeat_interleave(self.site.block, dim=-1)


@dataclass(frozen=True)
class Flags:
    """(tokens,) bools of a call, None for none or all: which are dense, which are counted."""

    dense: Tensor | None
    counted: Tensor | None

    def part(self, start: int, stop: int) -> Flags:
        """The flags of some of the tokens."""
        return Flags(*(None if f is None else f[start:stop] for f in (self.dense, self.counted)))


class GroupProduct(SharedProduct):
    """The matrices of one group: (..., channels) -> (..., rows), from records."""

    def __init__(self, group: Group, tokens: TokenState) -> None:
        super().__init__()
        self.group = group
        self.key: Key = group.key
        self.tokens = tokens


class RecordGroup(GroupProduct):
    """A group's product by the engine."""

    def __init__(
        self, engine: Engine, group: Group, tokens: TokenState, masks: Masks | None
    ) -> None:
        super().__init__(group, tokens)
        self.engine = engine
        self.masks = masks
        self.look_ahead: LookAhead | None = None

    @property
    def held(self) -> bool:
        """Whether all records are in memory, always."""
        return self.engine.slots[self.key] == self.group.units

    def product(self, x: Tensor) -> Tensor:
        """(..., channels) -> (..., rows), in pieces of `TOKENS` tokens."""
        flat = x.detach().reshape(-1, self.group.channels).float().contiguous()
        scored, flags = self._scored(flat), self._flags()
        if len(flat) <= TOKENS:
            made = self._piece(flat, scored, flags)
        else:  # filled piece by piece: a list of them and its concatenation would be twice that
            made = torch.empty(len(flat), self.group.rows)
            for i in range(0, len(flat), TOKENS):
                piece = slice(i, i + TOKENS)
                made[piece] = self._piece(flat[piece], scored[piece], flags.part(i, i + TOKENS))
        return made.view(*x.shape[:-1], self.group.rows).to(x.dtype)

    def _scored(self, x: Tensor) -> Tensor:
        """What the masks are decided on; of no meaning where none is decided."""
        return x if self.masks is None or self.tokens.all_dense else self.masks.scored(x)

    def _flags(self) -> Flags:
        """The flags of the call's tokens; the head may see only the last of them."""
        if self.masks is None:
            return Flags(None, None)
        dense, counted = self.tokens.dense, self.tokens.counted
        return Flags(*(None if f is None else f.reshape(-1) for f in (dense, counted)))

    def _piece(self, x: Tensor, scored: Tensor, flags: Flags) -> Tensor:
        masks = self._wanted(scored, flags)
        self.engine.begin(self.key, x, masks)
        if self.look_ahead is not None and len(x) == 1:
            self.look_ahead.during()
        return self.engine.finish(self.key, len(x))

    def _wanted(self, scored: Tensor, flags: Flags) -> Tensor:
        """(tokens, units) bool: the masks, or everything."""
        # Of a dense prompt nothing is decided or counted, as under `sparsify`.
        if self.masks is not None and not self.tokens.all_dense:
            return self.masks(scored, flags)
        everything = all_kept(len(scored), self.group.units)
        if self.masks is None:
            self.engine.access(self.key, everything[0].numpy())
        return everything


def all_kept(tokens: int, units: int) -> Tensor:
    """(tokens, units) bool, all kept; one for all groups of that size where it is small."""
    if tokens > TOKENS:
        return torch.ones(tokens, units, dtype=torch.bool)
    return _everything(units)[:tokens]


@cache
def _everything(units: int) -> Tensor:
    return torch.ones(TOKENS, units, dtype=torch.bool)


class RecordLinear(SharedLinear):
    """Stands for a linear layer that holds one or more matrices of a group."""

    def __init__(self, group: GroupProduct, rows: slice, takers: int, bias: Tensor | None) -> None:
        super().__init__(group, group.group.channels, rows, takers, bias)
        self.group = group

    def extra_repr(self) -> str:
        """What ``print(model)`` says of it."""
        return f"{self.in_features}, {self.out_features}, from records of {self.group.group.label}"
