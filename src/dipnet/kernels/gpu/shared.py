"""Products with one list for several rows of x: a weight is read once, tensor cores multiply it.

`_shared_columns` gathers input channels, `_shared_rows` output rows. For floating weights.
"""

from __future__ import annotations

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
FEWEST = 16
"""Rows of x that a tensor core multiplies at least; missing ones are zero."""


OWN, WARPS, STAGES = 32, 4, 4
"""Outputs and warps of a program, and the steps of a sum whose numbers are on their way."""
STEP_BYTES = 8192
"""Of x for one step of a sum: so many steps of x and of the weights fit in shared memory."""


def _padded(batch: int) -> int:
    return max(FEWEST, triton.next_power_of_2(batch))


def _step(x: Tensor, weight: Tensor) -> int:
    """Terms of a sum that are multiplied at a time."""
    size = max(x.element_size(), weight.element_size())
    return STEP_BYTES // (_padded(len(x)) * size)


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
    x, out = x.contiguous(), x.new_empty(len(x), width)
    _shared_columns[(triton.cdiv(width, OWN),)](
        x,
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
        x.stride(0),
        weights[0].stride(0),
        BLOCK=block,
        COMPACT=compact,
        ACTIVATION=activation,
        BATCH=_padded(len(x)),
        UNITS=_step(x, weights[0]),
        WEIGHTS=OWN,
        num_stages=STAGES,
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
    x, out = x.contiguous(), x.new_empty(len(x), kept)
    _shared_rows[(triton.cdiv(kept, OWN),)](
        x,
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
        x.stride(0),
        weights[0].stride(0),
        0 if factor is None else factor.stride(0),
        BLOCK=block,
        ACTIVATION=activation,
        BATCH=_padded(len(x)),
        UNITS=OWN,
        WEIGHTS=_step(x, weights[0]),
        num_stages=STAGES,
        **launch_options(WARPS, x.device),
    )
    return out


@triton.jit
def _product(left, right, total):
    """``total + left @ right``; of different dtypes, in float32."""
    if left.dtype != right.dtype or _WIDEN:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="ieee")


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
    BATCH: tl.constexpr,
    UNITS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    rows = tl.arange(0, BATCH)
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
        read_x = (rows < batch)[:, None] & valid[None, :]
        values = tl.load(x + rows[:, None] * x_stride + channels[None, :], mask=read_x, other=0)
        total = _product(values, tl.load(weight + at, mask=mask, other=0), total)
        if up is not None:
            raised = _product(values, tl.load(up + at, mask=mask, other=0), raised)

    if bias is not None:
        total += tl.load(bias + outputs, mask=inside, other=0).to(tl.float32)[None, :]
    total = activated(total, ACTIVATION)
    if up is not None:
        total *= raised
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
    BATCH: tl.constexpr,
    UNITS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    rows = tl.arange(0, BATCH)
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
        read_x = (rows < batch)[:, None] & inside[None, :]
        values = tl.load(x + rows[:, None] * x_stride + inputs[None, :], mask=read_x, other=0)
        at = begin + inputs[:, None]
        total = _product(values, tl.load(weight + at, mask=mask, other=0), total)
        if up is not None:
            raised = _product(values, tl.load(up + at, mask=mask, other=0), raised)

    if bias is not None:
        total += tl.load(bias + units, mask=valid, other=0).to(tl.float32)[None, :]
    total = activated(total, ACTIVATION)
    if up is not None:
        total *= raised
    if factor is not None:
        at = rows[:, None] * factor_stride + units[None, :]
        mask = (rows < batch)[:, None] & valid[None, :]
        total *= tl.load(factor + at, mask=mask, other=0).to(tl.float32)
    total = tl.where(valid[None, :], total, 0.0).to(out.dtype.element_ty)
    mask = (rows < batch)[:, None] & (places < kept)[None, :]
    tl.store(out + rows[:, None] * kept + places[None, :], total, mask=mask)
