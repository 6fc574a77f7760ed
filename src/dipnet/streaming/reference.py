"""The products of a streamed model in plain numpy: what the native kernels compute.

int4 and int8 are exact integers until the last step, so the native results are these to the bit,
whatever the instruction set, the threads and the order in which records arrive. bf16 is summed in
float32 in batches of units in their order; its bits differ between instruction sets with and
without fused multiply-add, and `product` (in float64) is what they all approach: within
``(kept + 1) * 2**-24`` of the sum of the products' magnitudes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dipnet.store.geometry import (
    SCALED_TOGETHER,
    Weights,
    multiplier_bytes,
    padded_outputs,
    weight_bytes,
)

Floats = NDArray[np.float32]
CLASSES = 6
"""Classes of magnitude, each a quarter of the one before: see `factors`."""


def product(
    kind: Weights,
    columns: NDArray[np.uint8],
    scales: Floats | None,
    x: Floats,
    keep: NDArray[np.bool_],
    rows: int,
) -> Floats:
    """One token's (channels,) ``x`` times the kept of (channels, stride) ``columns``: (rows,).

    NaN all over, for int4 and int8, where a kept activation is NaN or infinite.
    """
    padded = padded_outputs(rows)
    if kind == "bf16":
        with np.errstate(all="ignore"):
            halves = np.ascontiguousarray(columns[keep, : 2 * padded]).view("<u2")
            weights = (halves.astype(np.uint32) << 16).view(np.float32)
            made = x[keep].astype(np.float64) @ weights.astype(np.float64)
            return made[:rows].astype(np.float32)
    assert scales is not None, "only bf16 has no scales"
    numbers, groups = stored(kind, columns, padded)
    factor, magnitude, bound = factors(x, scales, keep)
    total = np.zeros(padded)
    for c in range(CLASSES):
        chosen = keep & (magnitude == c)
        multipliers = multiply_rounded(factor[chosen, None], groups[chosen])
        wide = np.repeat(multipliers, SCALED_TOGETHER, axis=1)
        total += 0.25**c * (wide * numbers[chosen]).sum(axis=0)
    with np.errstate(all="ignore"):
        return (total * (np.float64(bound) / 127.0))[:rows].astype(np.float32)


def factors(
    x: Floats, scales: Floats, keep: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64], np.float32]:
    """Activations as integers: (channels,) factors, their (channels,) classes, and the bound.

    Class c holds the products ``x * scale`` of magnitude up to ``most / 4**c``, most being the
    largest kept one; a factor is in units of 2**-15 of that. The bound is 127 times most: what a
    factor of 1 and a multiplier of 127 stand for. NaN when a kept activation is not finite.
    """
    with np.errstate(all="ignore"):
        values = np.where(keep, x * scales, np.float32(0))
        sizes = np.abs(values)
        most = np.float32(np.fmax.reduce(sizes, initial=0))
        bound = most * np.float32(127) if np.isfinite(x[keep]).all() else np.float32(np.nan)
        if not most > 0 or not np.isfinite(bound):
            zeros = np.zeros(len(x), np.int64)
            return zeros, zeros, bound
        magnitude = np.zeros(len(x), np.int64)
        limit = np.full(len(x), most, np.float32)
        for c in range(1, CLASSES):
            smaller = sizes <= limit * np.float32(0.25)
            magnitude[smaller] = c
            limit = np.where(smaller, limit * np.float32(0.25), limit)
        factor = np.rint(np.nan_to_num(values / limit) * np.float32(32767)).astype(np.int64)
    return factor, magnitude, bound


def multiply_rounded(factor: NDArray[np.int64], group: NDArray[np.int64]) -> NDArray[np.int64]:
    """factor * group / 2**15, rounded, halves up: what a level is multiplied with."""
    return (((factor * group) >> 14) + 1) >> 1


def stored(
    kind: Weights, columns: NDArray[np.uint8], padded: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(channels, padded) levels around zero and (channels, padded / 32) multipliers of columns."""
    size = weight_bytes(kind, padded)
    groups = columns[:, size : size + multiplier_bytes(kind, padded)].view(np.int8)
    rows = columns[:, :size]
    if kind == "int8":
        return _natural(rows, 64).astype(np.int64) - 128, groups.astype(np.int64)
    pairs = _natural(rows, 64).reshape(len(rows), -1, SCALED_TOGETHER // 2)
    levels = np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(len(rows), -1)
    return levels.astype(np.int64) - 8, groups.astype(np.int64)


def _natural(rows: NDArray[np.uint8], tile: int) -> NDArray[np.uint8]:
    """Byte 16 L + 4 v + j of a tile to place 16 v + 4 L + j."""
    tiles = rows.reshape(len(rows), -1, 4, 4, tile // 16)  # L, v, j
    return tiles.transpose(0, 1, 3, 2, 4).reshape(rows.shape)
