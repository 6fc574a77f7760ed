"""Products of kept input channels, each row of x with a list of its own: `_columns`.

A program owns some outputs and walks over the list; it reads that part of every kept unit, several
units with each thread at a time. Where there are too few outputs to keep the GPU busy, the list is
cut into parts, and the program that ends last adds the parts up, in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dipnet.kernels.gpu.common import (
    after_previous,
    launch_options,
    list_stride,
    units_ahead,
    valid_units,
)
from dipnet.kernels.gpu.sums import sums_of_parts, write_columns
from dipnet.kernels.gpu.tiles import TritonColumns


def columns(
    x: Tensor,
    index: Tensor,
    weights: tuple[Tensor, ...],
    width: int,
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
    x, out = x.contiguous(), x.new_empty(len(x), width)
    kept = index.shape[-1] * block
    tiles = triton.cdiv(width, tile.weights)
    partial, counter = sums_of_parts(out, tiles, tile.parts, len(weights))
    _columns[(tiles, len(x), tile.parts)](
        x,
        index,
        count,
        weights[0],
        weights[1] if len(weights) == 2 else None,
        bias,
        residual if residual is None else residual.contiguous(),
        out,
        partial,
        counter,
        kept,
        width,
        x.stride(0),
        list_stride(index),
        weights[0].stride(0),
        BLOCK=block,
        COMPACT=compact,
        SHARED=index.dim() == 1,
        ACTIVATION=activation,
        READS=tile.reads,
        GROUP=tile.group(weights[0].element_size()),
        WEIGHTS=tile.weights,
        PARTS=tile.parts,
        **launch_options(tile.warps, x.device),
    )
    return out


@triton.jit(do_not_specialize=["kept"])
def _columns(
    x,
    index,
    count,
    weight,
    up,
    bias,
    residual,
    out,
    partial,
    counter,
    kept,
    width,
    x_stride,
    index_stride,
    weight_stride,
    BLOCK: tl.constexpr,
    COMPACT: tl.constexpr,
    SHARED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    READS: tl.constexpr,
    GROUP: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row, part = tl.program_id(1), tl.program_id(2)
    outputs = tl.program_id(0) * WEIGHTS + tl.arange(0, WEIGHTS)
    inside = outputs < width
    after_previous(OVERLAP)
    x += row * x_stride
    index += row * index_stride
    end = valid_units(count, row, SHARED, kept, BLOCK)
    share = tl.cdiv(end, PARTS)
    end = tl.minimum((part + 1) * share, end)

    total = tl.zeros((GROUP, WEIGHTS), tl.float32)
    raised = tl.zeros((GROUP, WEIGHTS), tl.float32)
    units = units_ahead(index, part * share, end, BLOCK, READS, GROUP)
    for start in tl.range(part * share, end, READS * GROUP):
        values, reads, up_reads = (), (), ()
        for step in tl.static_range(READS):  # all of them on their way before one is needed
            places = start + step * GROUP + tl.arange(0, GROUP)
            valid = places < end
            at = units[step].to(tl.int64)[:, None] * weight_stride + outputs[None, :]
            mask = valid[:, None] & inside[None, :]
            reads += (tl.load(weight + at, mask=mask, other=0),)
            if up is not None:
                up_reads += (tl.load(up + at, mask=mask, other=0),)
            channels = places if COMPACT else units[step]
            values += (tl.load(x + channels, mask=valid, other=0),)
        units = units_ahead(index, start + READS * GROUP, end, BLOCK, READS, GROUP)
        for step in tl.static_range(READS):
            value = values[step].to(tl.float32)[:, None]
            total += value * reads[step].to(tl.float32)
            if up is not None:
                raised += value * up_reads[step].to(tl.float32)

    total, raised = tl.sum(total, 0), tl.sum(raised, 0)
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
