"""Products of kept output rows, each row of x with a list of its own: `_rows`.

A program owns some places of the list and reads these units from end to end.
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
    units_at,
    valid_units,
)
from dipnet.kernels.gpu.tiles import TritonRows


def rows(
    x: Tensor,
    index: Tensor,
    weights: tuple[Tensor, ...],
    width: int,
    tile: TritonRows,
    dtype: torch.dtype,
    *,
    count: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    factor: Tensor | None = None,
    block: int = 1,
) -> Tensor:
    """One matrix, or gate and up: (batch, width) -> (batch, k * block) of ``dtype``."""
    kept = index.shape[-1] * block
    x, out = x.contiguous(), x.new_empty(len(x), kept, dtype=dtype)
    _rows[(triton.cdiv(kept, tile.units), len(x))](
        x,
        index,
        count,
        weights[0],
        weights[1] if len(weights) == 2 else None,
        bias,
        factor,
        out,
        kept,
        width,
        x.stride(0),
        list_stride(index),
        weights[0].stride(0),
        0 if factor is None else factor.stride(0),
        BLOCK=block,
        SHARED=index.dim() == 1,
        ACTIVATION=activation,
        UNITS=tile.units,
        WEIGHTS=tile.weights,
        **launch_options(tile.warps, x.device),
    )
    return out


@triton.jit(do_not_specialize=["kept"])
def _rows(
    x,
    index,
    count,
    weight,
    up,
    bias,
    factor,
    out,
    kept,
    width,
    x_stride,
    index_stride,
    weight_stride,
    factor_stride,
    BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UNITS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(1)
    places = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    after_previous(OVERLAP)
    x += row * x_stride
    end = valid_units(count, row, SHARED, kept, BLOCK)
    valid = places < end
    units = units_at(index + row * index_stride, places, end, BLOCK)
    begin = units.to(tl.int64)[:, None] * weight_stride

    total = tl.zeros((UNITS, WEIGHTS), tl.float32)
    raised = tl.zeros((UNITS, WEIGHTS), tl.float32)
    for start in tl.range(0, width, WEIGHTS):
        inputs = start + tl.arange(0, WEIGHTS)
        inside = inputs < width
        mask = valid[:, None] & inside[None, :]
        read = tl.load(weight + begin + inputs[None, :], mask=mask, other=0)
        if up is not None:
            read_up = tl.load(up + begin + inputs[None, :], mask=mask, other=0)
        values = tl.load(x + inputs, mask=inside, other=0).to(tl.float32)[None, :]
        total += values * read.to(tl.float32)
        if up is not None:
            raised += values * read_up.to(tl.float32)

    total = tl.sum(total, 1)
    if bias is not None:
        total += tl.load(bias + units, mask=valid, other=0).to(tl.float32)
    total = activated(total, ACTIVATION)
    if up is not None:
        total *= tl.sum(raised, 1)
    if factor is not None:
        total *= tl.load(factor + row * factor_stride + units, mask=valid, other=0).to(tl.float32)
    total = tl.where(valid, total, 0.0).to(out.dtype.element_ty)
    tl.store(out + row * kept + places, total, mask=places < kept)
