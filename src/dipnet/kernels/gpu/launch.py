"""The kernels behind the functions of `reference`: which one serves a call, and its tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dipnet.kernels.gpu.clusters import cluster_columns, clusters_serve
from dipnet.kernels.gpu.columns import columns
from dipnet.kernels.gpu.common import INTERPRETED
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
from dipnet.kernels.gpu.tiles import CLUSTERS, COLUMNS, ROWS, Product, nearest
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
    shared = index.dim() == 1 and len(x) > 1 and weight.scales is None
    if not shared and clusters_serve(x, weights, named.get("bias"), named.get("residual")):
        return cluster_columns(x, index, weights, nearest(CLUSTERS, product), **named)
    tile = nearest(COLUMNS, product)
    if weight.kind in ("int4", "int8"):
        return integer_columns(x, index, weights, tile, **named)
    matrices = tuple(weight.numbers for weight in weights)
    if shared:
        return shared_columns(x, index, matrices, weight.width, **named)
    return columns(x, index, matrices, weight.width, tile, **named)


def _rows(
    x: Tensor, index: Tensor, weights: tuple[Weight, ...], dtype: torch.dtype, **named: Any
) -> Tensor:
    weight, kept = weights[0], index.shape[-1] * named.get("block", 1)
    if kept == 0:
        return x.new_empty(len(x), 0, dtype=dtype)
    tile = nearest(ROWS, Product(len(weights), weight.bits, weight.width, kept))
    if weight.kind in ("int4", "int8"):
        return integer_rows(x.to(dtype), index, weights, tile, **named)
    matrices = tuple(weight.numbers for weight in weights)
    if index.dim() == 1 and len(x) > 1:
        return shared_rows(x.to(dtype), index, matrices, weight.width, **named)
    return rows(x, index, matrices, weight.width, tile, dtype, **named)


def _nothing(index: Tensor) -> tuple[Tensor, Tensor]:
    """A list of one place, and 0 valid ones."""
    zero = index.new_zeros(*index.shape[:-1], 1)
    return zero, zero.flatten()
