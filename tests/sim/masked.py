"""A trace in memory: masks that a test wrote down, without a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dipnet.sim.trace import TraceCache, TraceSite

ROWS = 128
"""Weights that a unit of `site` brings along in each matrix."""
Make = Callable[[int, int], NDArray[np.bool_]]


def site(layer: int, name: str, units: int, density: float = 0.5, block: int = 1) -> TraceSite:
    """A site of square matrices: int8 records are 512 bytes for gate and up, and for one block."""
    matrices = {"mlp.in": ("gate", "up"), "mlp.hidden": ("down",), "attn.out": ("o",)}[name]
    return TraceSite(layer, name, units, block, density, dict.fromkeys(matrices, ROWS * block))


@dataclass(frozen=True)
class Masked:
    """The masks of each site are an array of (tokens, units) bool, or made when asked for."""

    sites: Sequence[TraceSite]
    made: Sequence[NDArray[np.bool_] | Make]
    tokens: int
    cache: TraceCache | None = None

    def masks(self, site: int, start: int, stop: int) -> NDArray[np.bool_]:
        made = self.made[site]
        return made(start, stop) if callable(made) else made[start:stop]


def masked(*wanted: Sequence[set[int]], units: int = 5) -> Masked:
    """A trace of one `mlp.in` a layer, from the units that its tokens want."""
    sites = [site(layer, "mlp.in", units) for layer in range(len(wanted))]
    made = [np.array([np.isin(np.arange(units), list(each)) for each in row]) for row in wanted]
    return Masked(sites, made, len(wanted[0]))
