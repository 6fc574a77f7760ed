"""Products with int4 and int8 weights as docs/store-format.md lays them out.

A unit is read in words of four bytes: 4 weights of int8, 8 of int4, that share a multiplier. Sums
stay in the order of the bytes until they are written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dipnet.kernels.gpu.common import (
    activated,
    after_previous,
    launch_options,
    list_stride,
    units_ahead,
    units_at,
    valid_units,
)
from dipnet.kernels.gpu.sums import sums_of_parts, write_columns
from dipnet.kernels.gpu.tiles import TritonColumns, TritonRows
from dipnet.kernels.gpu.weights import Weight
from dipnet.kernels.reference import TILE

WORD_BYTES = 4


def integer_columns(
    x: Tensor,
    index: Tensor,
    weights: tuple[Weight, ...],
    tile: TritonColumns,
    *,
    count: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    compact: bool = False,
    block: int = 1,
) -> Tensor:
    """One matrix, or gate and up: (batch, channels) -> (batch, width)."""
    width = weights[0].width
    x, out = x.contiguous(), x.new_empty(len(x), width)
    words, first = _words(weights[0])
    tiles = triton.cdiv(words, tile.weights)
    partial, counter = sums_of_parts(out, tiles, tile.parts, len(weights))
    _integer_columns[(tiles, len(x), tile.parts)](
        x,
        index,
        count,
        *_parts(weights),
        bias,
        residual if residual is None else residual.contiguous(),
        out,
        partial,
        counter,
        index.shape[-1] * block,
        width,
        words,
        x.stride(0),
        list_stride(index),
        weights[0].data.stride(0),
        FIRST=first,
        BITS=_bits(weights[0]),
        BLOCK=block,
        COMPACT=compact,
        SHARED=index.dim() == 1,
        ACTIVATION=activation,
        READS=tile.reads,
        GROUP=tile.group(WORD_BYTES),
        WORDS=tile.weights,
        PARTS=tile.parts,
        **launch_options(tile.warps, x.device),
    )
    return out


def integer_rows(
    x: Tensor,
    index: Tensor,
    weights: tuple[Weight, ...],
    tile: TritonRows,
    *,
    count: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    factor: Tensor | None = None,
    block: int = 1,
) -> Tensor:
    """One matrix, or gate and up: (batch, width) -> (batch, k * block)."""
    kept = index.shape[-1] * block
    x, out = x.contiguous(), x.new_empty(len(x), kept)
    words, first = _words(weights[0])
    _integer_rows[(triton.cdiv(kept, tile.units), len(x))](
        x,
        index,
        count,
        *_parts(weights),
        bias,
        factor,
        out,
        kept,
        weights[0].width,
        words,
        x.stride(0),
        list_stride(index),
        weights[0].data.stride(0),
        0 if factor is None else factor.stride(0),
        FIRST=first,
        BITS=_bits(weights[0]),
        BLOCK=block,
        SHARED=index.dim() == 1,
        ACTIVATION=activation,
        UNITS=tile.units,
        WORDS=tile.weights,
        **launch_options(tile.warps, x.device),
    )
    return out


def _bits(weight: Weight) -> int:
    return 4 if weight.kind == "int4" else 8


def _words(weight: Weight) -> tuple[int, int]:
    """Words of weights in a unit, and the byte where its multipliers begin."""
    padded = -(-weight.width // TILE) * TILE
    size = padded * _bits(weight) // 8
    return size // 4, size


def _parts(weights: tuple[Weight, ...]) -> list[Tensor | None]:
    """The words, multipliers and scales of one matrix or two; None for what is not there."""
    parts: list[Tensor | None] = []
    for weight in weights:
        words = weight.data.view(torch.int32)
        parts += [words, weight.data.view(torch.int8), weight.scales]
    return parts + [None] * (6 - len(parts))


@triton.jit
def _numbers(words, piece, BITS: tl.constexpr):
    """One weight of each word, as a float32 integer around 0."""
    level = (words >> piece * BITS) & ((1 << BITS) - 1)
    biased = (level | 0x4B000000).to(tl.float32, bitcast=True)  # 2**23 + level: no conversion
    return biased - (8388608.0 + (1 << (BITS - 1)))


@triton.jit
def _place(words, piece, BITS: tl.constexpr):
    """Which weight of its unit a piece of a word is."""
    lane, quad = (words // 4) % 4, words % 4
    if BITS == 4:
        return words // 16 * 128 + quad * 32 + lane * 4 + piece // 2 + piece % 2 * 16
    else:
        return words // 16 * 64 + quad * 16 + lane * 4 + piece


@triton.jit
def _added(totals, scaled, words, BITS: tl.constexpr):
    """The sums of every piece, and these words' weights times what scales them."""
    added = ()
    for piece in tl.static_range(32 // BITS):
        added += (totals[piece] + scaled * _numbers(words, piece, BITS),)
    return added


@triton.jit
def _summed(totals):
    """(units, words) tensors -> (words,) tensors."""
    sums = ()
    for piece in tl.static_range(len(totals)):
        sums += (tl.sum(totals[piece], 0),)
    return sums


@triton.jit
def _stacked(sums, BITS: tl.constexpr):
    """One (words,) tensor for every piece -> (words, pieces)."""
    if BITS == 8:
        evens, odds = tl.join(sums[0], sums[2]), tl.join(sums[1], sums[3])
    else:
        evens = tl.join(tl.join(sums[0], sums[4]), tl.join(sums[2], sums[6]))
        odds = tl.join(tl.join(sums[1], sums[5]), tl.join(sums[3], sums[7]))
    return tl.join(evens, odds).reshape(sums[0].shape[0], 32 // BITS)


@triton.jit
def _groups(words, BITS: tl.constexpr):
    """(n,) places of words -> their multipliers' places."""
    return words // 16 * 4 + words % 4 if BITS == 4 else words // 16 * 2 + words % 4 // 2


@triton.jit(do_not_specialize=["kept"])
def _integer_columns(
    x,
    index,
    count,
    weight,
    multipliers,
    scales,
    up,
    up_multipliers,
    up_scales,
    bias,
    residual,
    out,
    partial,
    counter,
    kept,
    width,
    words,
    x_stride,
    index_stride,
    stride,
    FIRST: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPACT: tl.constexpr,
    SHARED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    READS: tl.constexpr,
    GROUP: tl.constexpr,
    WORDS: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(1)
    own = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    after_previous(OVERLAP)
    x += row * x_stride
    index += row * index_stride
    end = valid_units(count, row, SHARED, kept, BLOCK)
    groups = FIRST + _groups(own, BITS)

    share = tl.cdiv(end, PARTS)
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, end)
    pieces: tl.constexpr = 32 // BITS
    totals, ups = (), ()
    for _ in tl.static_range(pieces):
        totals += (tl.zeros((GROUP, WORDS), tl.float32),)
        ups += (tl.zeros((GROUP, WORDS), tl.float32),)
    units = units_ahead(index, begin, end, BLOCK, READS, GROUP)
    for start in tl.range(begin, end, READS * GROUP):
        values, reads, steps, up_reads, up_steps = (), (), (), (), ()
        for step in tl.static_range(READS):  # all of them on their way before one is needed
            places = start + step * GROUP + tl.arange(0, GROUP)
            valid = places < end
            unit = units[step]
            mask = valid[:, None] & (own < words)[None, :]
            at = unit.to(tl.int64)[:, None] * stride
            at_words, at_groups = at // 4 + own[None, :], at + groups[None, :]
            value = tl.load(x + (places if COMPACT else unit), mask=valid, other=0).to(tl.float32)
            reads += (tl.load(weight + at_words, mask=mask, other=0),)
            steps += (tl.load(multipliers + at_groups, mask=mask, other=0),)
            values += (value * tl.load(scales + unit, mask=valid, other=0),)
            if up is not None:
                up_reads += (tl.load(up + at_words, mask=mask, other=0),)
                scale = value * tl.load(up_scales + unit, mask=valid, other=0)
                step_up = tl.load(up_multipliers + at_groups, mask=mask, other=0)
                up_steps += (step_up.to(tl.float32) * scale[:, None],)
        units = units_ahead(index, start + READS * GROUP, end, BLOCK, READS, GROUP)
        for step in tl.static_range(READS):
            scaled = steps[step].to(tl.float32) * values[step][:, None]
            totals = _added(totals, scaled, reads[step], BITS)
            if up is not None:
                ups = _added(ups, up_steps[step], up_reads[step], BITS)

    total = _stacked(_summed(totals), BITS)
    raised = _stacked(_summed(ups), BITS)
    outputs = _place(own[:, None], tl.arange(0, pieces)[None, :], BITS)
    write_columns(
        total,
        raised,
        outputs,
        up,
        bias,
        residual,
        out,
        partial,
        counter,
        width,
        ACTIVATION,
        PARTS,
    )


@triton.jit(do_not_specialize=["kept"])
def _integer_rows(
    x,
    index,
    count,
    weight,
    multipliers,
    scales,
    up,
    up_multipliers,
    up_scales,
    bias,
    factor,
    out,
    kept,
    width,
    words,
    x_stride,
    index_stride,
    stride,
    factor_stride,
    FIRST: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UNITS: tl.constexpr,
    WORDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(1)
    places = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    after_previous(OVERLAP)
    x += row * x_stride
    end = valid_units(count, row, SHARED, kept, BLOCK)
    valid = places < end
    units = units_at(index + row * index_stride, places, end, BLOCK)

    total = tl.zeros((UNITS, WORDS), tl.float32)
    raised = tl.zeros((UNITS, WORDS), tl.float32)
    for start in tl.range(0, words, WORDS):
        own = start + tl.arange(0, WORDS)
        mask = valid[:, None] & (own < words)[None, :]
        at = units.to(tl.int64)[:, None] * (stride // 4) + own[None, :]
        by_group = units.to(tl.int64)[:, None] * stride + (FIRST + _groups(own, BITS))[None, :]
        read = tl.load(weight + at, mask=mask, other=0)
        step = tl.load(multipliers + by_group, mask=mask, other=0).to(tl.float32)
        if up is not None:
            read_up = tl.load(up + at, mask=mask, other=0)
            step_up = tl.load(up_multipliers + by_group, mask=mask, other=0).to(tl.float32)
        product = tl.zeros((UNITS, WORDS), tl.float32)
        product_up = tl.zeros((UNITS, WORDS), tl.float32)
        for piece in tl.static_range(32 // BITS):
            inputs = _place(own, piece, BITS)
            values = tl.load(x + inputs, mask=inputs < width, other=0).to(tl.float32)[None, :]
            product += values * _numbers(read, piece, BITS)
            if up is not None:
                product_up += values * _numbers(read_up, piece, BITS)
        total += step * product
        if up is not None:
            raised += step_up * product_up

    total = tl.sum(total, 1) * tl.load(scales + units, mask=valid, other=0)
    if bias is not None:
        total += tl.load(bias + units, mask=valid, other=0).to(tl.float32)
    total = activated(total, ACTIVATION)
    if up is not None:
        total *= tl.sum(raised, 1) * tl.load(up_scales + units, mask=valid, other=0)
    if factor is not None:
        total *= tl.load(factor + row * factor_stride + units, mask=valid, other=0).to(tl.float32)
    total = tl.where(valid, total, 0.0).to(out.dtype.element_ty)
    tl.store(out + row * kept + places, total, mask=places < kept)
