"""Random masks: what a density costs when nothing is known, the lower bound of every predictor."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from dipnet.errors import InputError
from dipnet.methods.heads import NeuronsAndHeads
from dipnet.units import ScoredOn, Site

# splitmix64 (Steele, Lea and Flood, 2014); its constants as signed 64-bit numbers.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))
_MANTISSA = 24


@dataclass(frozen=True)
class RandomMasks(NeuronsAndHeads):
    """Keeps units at random: each token its own at each site.

    A score is a hash of the seed, the site, the unit and the token's position in its sequence, so
    that decoding draws what evaluation drew, in any batch and on any device.
    """

    name: ClassVar[str] = "random"
    neurons_scored_on: ClassVar[ScoredOn] = "position"
    heads_scored_on: ClassVar[ScoredOn] = "position"
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.seed) is not int or not 0 <= self.seed < 1 << 32:
            raise InputError(f"seed is a whole number from 0 to 2^32 - 1, not {self.seed!r}")

    def score(self, site: Site, x: Tensor) -> Tensor:
        """(..., 1) positions -> (..., units) float32 in [0, 1)."""
        stream = zlib.crc32(f"{self.seed} {site.layer} {site.name}".encode())
        units = torch.arange(site.units, device=x.device)
        mixed = _mix(_mix(x + (stream << 31)) + units)
        return (mixed >> 64 - _MANTISSA & (1 << _MANTISSA) - 1).float() / (1 << _MANTISSA)


def _mix(state: Tensor) -> Tensor:
    """A hash of int64 numbers; they wrap, and shifts fill up with zeros."""
    state = state * _STEP
    for shift, factor in _MIX:
        state = (state ^ (state >> shift & (1 << 64 - shift) - 1)) * factor
    return state ^ (state >> 31 & (1 << 33) - 1)
