"""A small model's shape and sites, and traces of random masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dipnet.sim.shape import ModelShape
from dipnet.sim.trace import TraceCache, TraceSite
from dipnet.sim.trace_writer import TraceWriter

SHAPE = ModelShape(
    name="small",
    family="llama",
    activation="silu",
    layers=2,
    matrices={
        "q": (8, 8),
        "k": (4, 8),
        "v": (4, 8),
        "o": (8, 8),
        "gate": (20, 8),
        "up": (20, 8),
        "down": (8, 20),
    },
    other_weights=300,
    vocabulary=32,
    kv_width=8,
)
SITES = tuple(
    site
    for layer in range(2)
    for site in (
        TraceSite(layer, "mlp.in", 8, 1, 0.6, {"gate": 20, "up": 20}),
        TraceSite(layer, "mlp.hidden", 10, 2, 0.3, {"down": 16}),
    )
)


def random_masks(tokens: int, seed: int = 0) -> list[NDArray[np.bool_]]:
    """(tokens, units) masks of each of the `SITES`."""
    rng = np.random.default_rng(seed)
    return [rng.random((tokens, site.units)) < site.density for site in SITES]


def write(
    file: Path,
    masks: Sequence[NDArray[np.bool_]],
    *,
    starts: Sequence[int] = (0,),
    cache: TraceCache | None = None,
    scores: bool = False,
    recall: Mapping[str, float] | None = None,
) -> Path:
    """A trace of the `SITES`' masks; the score of a wanted unit is its number, counted from 1."""
    with TraceWriter(file, SHAPE, "dip:density=0.5", SITES, cache, scores=scores) as writer:
        for site, mask in zip(SITES, masks, strict=True):
            ranks = mask * (np.arange(site.units) + 1)
            writer.add(site.key, mask, ranks.astype(np.float16) if scores else None)
        for start in starts:
            writer.start_sequence(start)
        writer.end_tokens(len(masks[0]))
        writer.recall = recall
    return file
