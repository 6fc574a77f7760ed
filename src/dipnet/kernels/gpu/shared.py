"""Products with one list for several rows of x: a weight is read once, tensor cores multiply it.

`_shared_columns` gathers input channels, `_shared_rows` output rows. For floating weights.

Float32 times bfloat16 is three products of bfloat16: each part of x has eight of its 24 binary
digits, and the parts are rows that a tensor core would leave empty. Other float32 is multiplied in
parts of both, at several times the cost, and loses two digits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dipnet.kernels.gpu.common import (
    INTERPRETED,
    activated,
    after_previous,
    launch_options,
    units_at,
    valid_units,
)

_WIDEN = tl.constexpr(INTERPRETED)  # the interpreter would multiply the bits of bfloat16
FEWEST_TERMS = tl.constexpr(16)
"""Of a sum that a tensor core makes in one step."""
FEWEST = 16
"""Rows of x that a tensor core multiplies at least; missing ones are zero."""

OWN, WARPS = 32, 4
"""Outputs and warps of a program."""
PARTS, MOST_IN_PARTS = 3, 16
"""Of float32 in bfloat16, and the most rows that are cut into them."""
SPLIT_AT_A_TIME = 1024
STEP_BYTES = 8192
"""Of x for one step of a sum: so many steps of x and of the weights fit in shared memory."""


class _Multiplied(NamedTuple):
    """What is multiplied: ``x``, ``parts`` of it one below the other; a tile's ``rows`` of a part,
    and ``batch`` rows in all; the terms of a sum that are multiplied at a time, and the steps that
    are on their way.
    """

    x: Tensor
    parts: int
    rows: int
    batch: int
    terms: int
    stages: int


def _multiplied(x: Tensor, weight: Tensor) -> _Multiplied:
    x, rows = x.contiguous(), triton.next_power_of_2(len(x))
    kinds = x.dtype, weight.dtype
    if kinds == (torch.float32, torch.bfloat16) and len(x) <= MOST_IN_PARTS:
        rows = max(FEWEST // 4, rows)
        return _Multiplied(_in_parts(x), PARTS, rows, 4 * rows, STEP_BYTES // (8 * rows), 4)
    rows = max(FEWEST, rows)
    if kinds[0] != kinds[1] or torch.float32 in kinds:  # its parts take more registers
        return _Multiplied(x, 1, rows, rows, max(32, STEP_BYTES // (8 * rows)), 6)
    return _Multiplied(x, 1, rows, rows, STEP_BYTES // (2 * rows), 4)


def _in_parts(x: Tensor) -> Tensor:
    """(batch, n) float32 -> (PARTS * batch, n) bfloat16, which add up to it."""
    made = x.new_empty(PARTS * len(x), x.shape[1], dtype=torch.bfloat16)
    grid = (triton.cdiv(x.numel(), SPLIT_AT_A_TIME),)
    _split[grid](x, made, x.numel(), SIZE=SPLIT_AT_A_TIME, **launch_options(WARPS, x.device))
    return made


def shared_columns(
    x: Tensor,
    index: Tensor,
    weights: tuple[Tensor, ...],
    width: int,
    *,
    count: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    compact: bool = False,
    block: int = 1,
) -> Tensor:
    """One matrix, or gate and up: (batch, channels) -> (batch, width)."""
    out, given = x.new_empty(len(x), width), _multiplied(x, weights[0])
    _shared_columns[(triton.cdiv(width, OWN),)](
        given.x,
        index,
        count,
        weights[0],
        weights[1] if len(weights) == 2 else None,
        bias,
        residual if residual is None else residual.contiguous(),
        out,
        len(x),
        index.shape[0] * block,
        width,
        given.x.stride(0),
        weights[0].stride(0),
        BLOCK=block,
        COMPACT=compact,
        ACTIVATION=activation,
        PARTS=given.parts,
        ROWS=given.rows,
        BATCH=given.batch,
        UNITS=given.terms,
        WEIGHTS=OWN,
        num_stages=given.stages,
        **launch_options(WARPS, x.device),
    )
    return out


def shared_rows(
    x: Tensor,
    index: Tensor,
    weights: tuple[Tensor, ...],
    width: int,
    *,
    count: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    factor: Tensor | None = None,
    block: int = 1,
) -> Tensor:
    """One matrix, or gate and up: (batch, width) -> (batch, k * block)."""
    kept = index.shape[0] * block
    out, given = x.new_empty(len(x), kept), _multiplied(x, weights[0])
    _shared_rows[(triton.cdiv(kept, OWN),)](
        given.x,
        index,
        count,
        weights[0],
        weights[1] if len(weights) == 2 else None,
        bias,
        factor,
        out,
        len(x),
        kept,
        width,
        given.x.stride(0),
        weights[0].stride(0),
        0 if factor is None else factor.stride(0),
        BLOCK=block,
        ACTIVATION=activation,
        PARTS=given.parts,
        ROWS=given.rows,
        BATCH=given.batch,
        UNITS=OWN,
        WEIGHTS=given.terms,
        num_stages=given.stages,
        **launch_options(WARPS, x.device),
    )
    return out


@triton.jit
def _split(x, parts, n, SIZE: tl.constexpr, OVERLAP: tl.constexpr):
    places = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    inside = places < n
    after_previous(OVERLAP)
    left = tl.load(x + places, mask=inside, other=0)
    for part in tl.static_range(3):
        rounded = left.to(tl.bfloat16)
        tl.store(parts + part * n + places, rounded, mask=inside)
        wide = rounded.to(tl.float32)
        left = tl.where(tl.abs(wide) < float("inf"), left - wide, 0.0)


@triton.jit
def _parts_of(batch, PARTS: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr):
    """Which rows of x those of a tile are, and whether there are such."""
    rows = tl.arange(0, BATCH)
    part, row = rows // ROWS, rows % ROWS
    return part * batch + row, (row < batch) & (part < PARTS)


@triton.jit
def _product(left, right, total, PARTS: tl.constexpr):
    """``total + left @ right``; of different dtypes, in float32.

    One multiplication of float32 would do without tensor cores: many times the time. They cut off
    what they add to a long sum, so that sums of parts are added here. Triton would make one sum of
    both again, but not where imprecise sums are bounded: what else that means is for eight bits.
    """
    if left.dtype != right.dtype or _WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    if PARTS > 1:
        made = tl.dot(left, right, input_precision="tf32x3", max_num_imprecise_acc=FEWEST_TERMS)
        return total + made
    return tl.dot(left, right, total, input_precision="tf32x3")


@triton.jit
def _sum_of_parts(total, PARTS: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr):
    """(BATCH, OUTPUTS) -> (ROWS, OUTPUTS)."""
    if PARTS > 1:
        total = tl.sum(tl.reshape(total, (4, ROWS, OUTPUTS)), 0)
    return total


@triton.jit(do_not_specialize=["batch", "kept"])
def _shared_columns(
    x,
    index,
    count,
    weight,
    up,
    bias,
    residual,
    out,
    batch,
    kept,
    width,
    x_stride,
    weight_stride,
    BLOCK: tl.constexpr,
    COMPACT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    UNITS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    rows = tl.arange(0, ROWS)
    given, there = _parts_of(batch, PARTS, ROWS, BATCH)
    outputs = tl.program_id(0) * WEIGHTS + tl.arange(0, WEIGHTS)
    inside = outputs < width
    after_previous(OVERLAP)
    end = valid_units(count, 0, True, kept, BLOCK)

    total = tl.zeros((BATCH, WEIGHTS), tl.float32)
    raised = tl.zeros((BATCH, WEIGHTS), tl.float32)
    for start in tl.range(0, end, UNITS):
        places = start + tl.arange(0, UNITS)
        valid = places < end
        units = units_at(index, places, end, BLOCK)
        at = units.to(tl.int64)[:, None] * weight_stride + outputs[None, :]
        mask = valid[:, None] & inside[None, :]
        channels = places if COMPACT else units
        read_x = there[:, None] & valid[None, :]
        values = tl.load(x + given[:, None] * x_stride + channels[None, :], mask=read_x, other=0)
        total = _product(values, tl.load(weight + at, mask=mask, other=0), total, PARTS)
        if up is not None:
            raised = _product(values, tl.load(up + at, mask=mask, other=0), raised, PARTS)

    total = _sum_of_parts(total, PARTS, ROWS, WEIGHTS)
    if bias is not None:
        total += tl.load(bias + outputs, mask=inside, other=0).to(tl.float32)[None, :]
    total = activated(total, ACTIVATION)
    if up is not None:
        total *= _sum_of_parts(raised, PARTS, ROWS, WEIGHTS)
    at = rows[:, None] * width + outputs[None, :]
    mask = (rows < batch)[:, None] & inside[None, :]
    if residual is not None:
        total += tl.load(residual + at, mask=mask, other=0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["batch", "kept"])
def _shared_rows(
    x,
    index,
    count,
    weight,
    up,
    bias,
    factor,
    out,
    batch,
    kept,
    width,
    x_stride,
    weight_stride,
    factor_stride,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    UNITS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    rows = tl.arange(0, ROWS)
    given, there = _parts_of(batch, PARTS, ROWS, BATCH)
    places = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    after_previous(OVERLAP)
    end = valid_units(count, 0, True, kept, BLOCK)
    valid = places < end
    units = units_at(index, places, end, BLOCK)
    begin = units.to(tl.int64)[None, :] * weight_stride

    total = tl.zeros((BATCH, UNITS), tl.float32)
    raised = tl.zeros((BATCH, UNITS), tl.float32)
    for start in tl.range(0, width, WEIGHTS):
        inputs = start + tl.arange(0, WEIGHTS)
        inside = inputs < width
        mask = inside[:, None] & valid[None, :]
        read_x = there[:, None] & inside[None, :]
        values = tl.load(x + given[:, None] * x_stride + inputs[None, :], mask=read_x, other=0)
        at = begin + inputs[:, None]
        total = _product(values, tl.load(weight + at, mask=mask, other=0), total, PARTS)
        if up is not None:
            raised = _product(values, tl.load(up + at, mask=mask, other=0), raised, PARTS)

    total = _sum_of_parts(total, PARTS, ROWS, UNITS)
    if bias is not None:
        total += tl.load(bias + units, mask=valid, other=0).to(tl.float32)[None, :]
    total = activated(total, ACTIVATION)
    if up is not None:
        total *= _sum_of_parts(raised, PARTS, ROWS, UNITS)
    if factor is not None:
        at = rows[:, None] * factor_stride + units[None, :]
        mask = (rows < batch)[:, None] & valid[None, :]
        total *= tl.load(factor + at, mask=mask, other=0).to(tl.float32)
    total = tl.where(valid[None, :], total, 0.0).to(out.dtype.element_ty)
    mask = (rows < batch)[:, None] & (places < kept)[None, :]
    tl.store(out + rows[:, None] * kept + places[None, :], total, mask=mask)
