"""The kernels behind the functions of `reference`: which one serves a call, and its tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dipnet.kernels.gpu.columns import columns
from dipnet.kernels.gpu.common import INTERPRETED
from dipnet.kernels.gpu.cuda_columns import cuda_columns, cuda_columns_serve
from dipnet.kernels.gpu.cuda_rows import cuda_rows, cuda_rows_serve
from dipnet.kernels.gpu.integers import integer_columns, integer_rows
from dipnet.kernels.gpu.rows import rows
from dipnet.kernels.gpu.selection import (
    keep_above,
    keep_topk,
    threshold_indices,
    topk_indices,
    topk_mask,
    union_indices,
)
from dipnet.kernels.gpu.shared import shared_columns, shared_rows
from dipnet.kernels.gpu.tiles import (
    CUDA_COLUMNS,
    CUDA_ROWS,
    TRITON_COLUMNS,
    TRITON_ROWS,
    Product,
    nearest,
)
from dipnet.kernels.gpu.weights import Weight

__all__ = [
    "INTERPRETED",
    "columns_product",
    "gated_columns",
    "gated_rows",
    "keep_above",
    "keep_topk",
    "rows_product",
    "threshold_indices",
    "topk_indices",
    "topk_mask",
    "union_indices",
]


def columns_product(
    x: Tensor,
    index: Tensor,
    weight: Weight,
    count: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    compact: bool,
    block: int,
) -> Tensor:
    """Sum over the kept input channels of x_i times unit i: (batch, width)."""
    added = {"bias": bias, "residual": residual}
    return _columns(x, index, (weight,), count=count, compact=compact, block=block, **added)


def gated_columns(
    x: Tensor, index: Tensor, gate: Weight, up: Weight, activation: str, count: Tensor | None
) -> Tensor:
    """``activation(x gate) * (x up)`` over the kept input channels: (batch, width)."""
    return _columns(x, index, (gate, up), count=count, activation=activation)


def rows_product(
    x: Tensor,
    index: Tensor,
    weight: Weight,
    count: Tensor | None,
    bias: Tensor | None,
    activation: str,
    factor: Tensor | None,
    block: int,
    dtype: torch.dtype,
) -> Tensor:
    """Kept units times x: (batch, k * block)."""
    named = {"count": count, "bias": bias, "activation": activation, "factor": factor}
    return _rows(x, index, (weight,), dtype, block=block, **named)


def gated_rows(
    x: Tensor, index: Tensor, gate: Weight, up: Weight, activation: str, count: Tensor | None
) -> Tensor:
    """``activation(gate_j x) * (up_j x)`` for the kept units j: (batch, k)."""
    return _rows(x, index, (gate, up), x.dtype, count=count, activation=activation)


def _columns(x: Tensor, index: Tensor, weights: tuple[Weight, ...], **named: Any) -> Tensor:
    weight, kept = weights[0], index.shape[-1] * named.get("block", 1)
    if kept == 0:  # nothing is read, but something may be added
        index, named["count"] = _nothing(index)
    product = Product(len(weights), weight.bits, weight.width, kept)
    if index.dim() == 1 and len(x) > 1 and weight.scales is None:
        return shared_columns(x, index, _numbers(weights), weight.width, **named)
    if cuda_columns_serve(x, weights, named.get("bias"), named.get("residual")):
        return cuda_columns(x, index, weights, nearest(CUDA_COLUMNS, product), **named)
    tile = nearest(TRITON_COLUMNS, product)
    if weight.scales is not None:
        return integer_columns(x, index, weights, tile, **named)
    return columns(x, index, _numbers(weights), weight.width, tile, **named)


def _rows(
    x: Tensor, index: Tensor, weights: tuple[Weight, ...], dtype: torch.dtype, **named: Any
) -> Tensor:
    weight, kept = weights[0], index.shape[-1] * named.get("block", 1)
    if kept == 0:
        return x.new_empty(len(x), 0, dtype=dtype)
    product = Product(len(weights), weight.bits, weight.width, kept)
    if index.dim() == 1 and len(x) > 1 and weight.scales is None:
        return shared_rows(x.to(dtype), index, _numbers(weights), weight.width, **named)
    if cuda_rows_serve(x, weights, named.get("bias"), named.get("factor")):
        return cuda_rows(x, index, weights, nearest(CUDA_ROWS, product), dtype, **named)
    tile = nearest(TRITON_ROWS, product)
    if weight.scales is not None:
        return integer_rows(x.to(dtype), index, weights, tile, **named)
    return rows(x, index, _numbers(weights), weight.width, tile, dtype, **named)


def _numbers(weights: tuple[Weight, ...]) -> tuple[Tensor, ...]:
    return tuple(weight.numbers for weight in weights)


def _nothing(index: Tensor) -> tuple[Tensor, Tensor]:
    """A list of one place, and 0 valid ones."""
    zero = index.new_zeros(*index.shape[:-1], 1)
    return zero, zero.flatten()
