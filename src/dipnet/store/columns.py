"""Columns: what one input channel brings into a group, quantised and as bytes.

``encode`` makes columns from weights, ``decode`` is the reference of what they mean. The layout is
described in docs/store-format.md. Everything is computed in the checkpoint's own orientation,
(outputs, channels), where the 32 outputs that share a multiplier are reduced over whole rows; only
the finished bytes are transposed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from dipnet.errors import InputError
from dipnet.store.geometry import (
    SCALED_TOGETHER,
    TILE,
    Weights,
    column_stride,
    multiplier_bytes,
    padded_outputs,
    weight_bytes,
)

CLIPS = (1.0, 0.93, 0.86)
"""Steps that are tried for a group of int4, as multiples of the one that clips nothing."""
MAX_MULTIPLIER = 127
CHUNK = 1 << 19
"""Weights that are quantised at a time: 2 MB, so that the dozens of passes stay in the caches."""
NIBBLES = 16
"""Outputs whose levels are the low nibbles of as many bytes; the next ones are the high nibbles."""
LEAST_WIDTH = 64
"""Channels of a chunk at least: the innermost loops run along them."""


def encode(weights: Tensor, kind: Weights) -> tuple[Tensor, Tensor | None]:
    """(outputs, channels) weights -> (channels, stride) uint8 columns, (channels,) float32 scales.

    ``weights`` may have any floating dtype; outputs are padded with zero rows. There are no scales
    for bf16. Raises InputError when a weight is NaN or infinite.
    """
    outputs, channels = weights.shape
    padded = padded_outputs(outputs)
    columns = torch.zeros(channels, column_stride(kind, padded), dtype=torch.uint8)
    scales = torch.zeros(channels)
    width = max(LEAST_WIDTH, CHUNK // padded)
    for start in range(0, channels, width):
        part = slice(start, start + width)
        chunks = _Chunks(weights[:, part], padded)
        if kind == "bf16":
            _encode_bf16(chunks, columns[part])
        else:
            scales[part] = _encode_scaled(chunks, kind, columns[part])
    return columns, None if kind == "bf16" else scales


def decode(columns: Tensor, scales: Tensor | None, kind: Weights, outputs: int) -> Tensor:
    """(channels, stride) uint8 columns and their scales -> (outputs, channels) float32 weights."""
    padded = padded_outputs(outputs)
    stored = columns[:, : weight_bytes(kind, padded)].contiguous()
    if kind == "bf16":
        return stored.view(torch.bfloat16).float().T[:outputs].contiguous()
    assert scales is not None, "only bf16 has no scales"
    end = weight_bytes(kind, padded) + multiplier_bytes(kind, padded)
    multipliers = columns[:, weight_bytes(kind, padded) : end].contiguous().view(torch.int8)
    levels = _unpack4(stored) - 8 if kind == "int4" else _unswizzle(stored).int() - 128
    steps = (scales.unsqueeze(1) * multipliers).repeat_interleave(SCALED_TOGETHER, dim=1)
    return (steps * levels).T[:outputs].contiguous()


class _Chunks:
    """Some channels of a matrix, as float32 chunks of so many padded rows that caches hold them."""

    def __init__(self, weights: Tensor, padded: int) -> None:
        self.weights = weights
        self.padded = padded

    @property
    def channels(self) -> int:
        return self.weights.shape[1]

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """The first row of every chunk, and the chunk: (rows, channels), a multiple of a tile."""
        size = max(TILE, CHUNK // self.channels // TILE * TILE)
        for start in range(0, self.padded, size):
            rows = min(size, self.padded - start)
            found = self.weights[start : start + rows].float()
            yield start, functional.pad(found, (0, 0, 0, rows - len(found)))


def _encode_bf16(chunks: _Chunks, columns: Tensor) -> None:
    """Fill (channels, stride) ``columns``."""
    for start, values in chunks:
        _check_finite(values)
        stored = values.T.contiguous().bfloat16().view(torch.uint8)
        columns[:, 2 * start : 2 * start + stored.shape[1]] = stored


def _encode_scaled(chunks: _Chunks, kind: Weights, columns: Tensor) -> Tensor:
    """Fill (channels, stride) ``columns``; returns the (channels,) scales."""
    found = []
    for _, values in chunks:
        _check_finite(values)
        groups = values.view(-1, SCALED_TOGETHER, chunks.channels)
        found.append(_steps4(groups) if kind == "int4" else groups.abs().amax(1) / 127)
    steps = torch.cat(found)
    scales = steps.abs().amax(0) / MAX_MULTIPLIER
    ratio = torch.where(scales > 0, steps / scales, 0)
    # The largest weight of 8 bits must not be clipped: its step is rounded up, never down.
    multipliers = (ratio.round() if kind == "int4" else (ratio - 1e-4).ceil()).clamp_(-127, 127)
    inverse = (scales * multipliers).reciprocal_().nan_to_num_(posinf=0.0, neginf=0.0)
    for start, values in chunks:
        first = start // SCALED_TOGETHER
        groups = values.view(-1, SCALED_TOGETHER, chunks.channels)
        groups.mul_(inverse[first : first + len(groups)].unsqueeze(1))
        stored = _stored(values, kind)
        begin = weight_bytes(kind, start)
        columns[:, begin : begin + len(stored)] = stored.T
    begin = weight_bytes(kind, chunks.padded)
    columns[:, begin : begin + len(steps)] = multipliers.to(torch.int8).view(torch.uint8).T
    return scales


def _check_finite(values: Tensor) -> None:
    # The sum is the cheap question; it may overflow where no weight is infinite.
    if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
        raise InputError("a weight is NaN or infinite: the checkpoint is damaged, get it again")


def _stored(levels: Tensor, kind: Weights) -> Tensor:
    """(rows, channels) levels around 0 -> the bytes of their columns: (bytes, channels)."""
    if kind == "int4":
        return _pack4(_as_bytes(levels, 8, 0, 15))
    return _swizzle(_as_bytes(levels, 128, 1, 255))


def _as_bytes(levels: Tensor, zero: int, low: int, high: int) -> Tensor:
    """Levels rounded to integers around ``zero`` and clipped; overwrites ``levels``."""
    return levels.round_().add_(zero).clamp_(low, high).to(torch.uint8)


def _steps4(groups: Tensor) -> Tensor:
    """(groups, 32, channels) weights -> (groups, channels): the steps of least squared error.

    A step is signed: its sign gives the 16 levels -8..7 their long side where the largest weight
    is.
    """
    high, low = groups.amax(1), groups.amin(1)
    widest = torch.where(high > -low, high, low) / -8
    best = widest
    least = torch.full_like(widest, torch.inf)
    for clip in CLIPS:
        steps = widest * clip
        inverse = steps.reciprocal().nan_to_num_(posinf=0.0, neginf=0.0).unsqueeze(1)
        levels = (groups * inverse).round_().clamp_(-8, 7)
        error = levels.mul_(steps.unsqueeze(1)).sub_(groups).square_().sum(1)
        best = torch.where(error < least, steps, best)
        least = torch.minimum(least, error)
    return best


def _swizzle(rows: Tensor) -> Tensor:
    """(outputs, channels) in natural order -> in the order of the bytes, tile by tile of 64.

    Byte 16*L + 4*v + j of a tile is its output 16*v + 4*L + j.
    """
    tiles = rows.view(-1, 4, 4, 4, rows.shape[-1])  # tile, v, L, j
    return tiles.transpose(1, 2).reshape(rows.shape)


def _pack4(levels: Tensor) -> Tensor:
    """(outputs, channels) levels of 0..15 -> (outputs / 2, channels) bytes of two levels each."""
    halves = levels.view(-1, 2, NIBBLES, levels.shape[-1])
    pairs = halves[:, 0] | (halves[:, 1] << 4)
    return _swizzle(pairs.reshape(-1, levels.shape[-1]))


def _unswizzle(columns: Tensor) -> Tensor:
    """(channels, n) bytes -> (channels, n) in natural order; the swizzle is its own inverse."""
    return _swizzle(columns.T.contiguous()).T


def _unpack4(columns: Tensor) -> Tensor:
    """(channels, outputs / 2) bytes -> (channels, outputs) int32 levels of 0..15."""
    pairs = _unswizzle(columns).int().reshape(len(columns), -1, 1, NIBBLES)
    return torch.cat([pairs & 15, pairs >> 4], dim=2).reshape(len(columns), -1)
