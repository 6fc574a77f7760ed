"""What the kernels of this room compute, in plain torch: any device, any floating dtype.

Shapes and meaning are those of `dipnet.kernels.gpu`; sums are taken in float32. Nothing waits for
the device, so these can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dipnet.kernels import reference
from dipnet.kernels.gpu.weights import Weight

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


def topk_mask(scores: Tensor, k: int, magnitude: bool, factor: Tensor | None) -> Tensor:
    """(batch, n) floating -> (batch, n) bool, exactly k of each row."""
    if k in (0, scores.shape[1]):
        return torch.full_like(scores, k > 0, dtype=torch.bool)
    return reference.topk_mask(_ranked(scores, magnitude, factor), k)


def topk_indices(scores: Tensor, k: int, magnitude: bool, factor: Tensor | None) -> Tensor:
    """(batch, n) floating -> (batch, k) int32, ascending."""
    index, _ = _compacted(topk_mask(scores, k, magnitude, factor))
    return index[:, :k].contiguous()


def keep_topk(x: Tensor, k: int, factor: Tensor | None) -> Tensor:
    """(batch, n) floating -> the same times the mask of its k highest magnitudes."""
    return x * topk_mask(x, k, True, factor)


def threshold_indices(x: Tensor, threshold: Tensor, magnitude: bool) -> tuple[Tensor, Tensor]:
    """(batch, n) and (1,) -> (batch, n) int32, ascending, and the (batch,) int32 valid ones."""
    return _compacted(_ranked(x, magnitude, None) > threshold)


def keep_above(x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, n) and (1,) -> the same times the mask of what is above, (batch,) int32 counts."""
    mask = x.abs().float() > threshold
    return x * mask, mask.sum(dim=1, dtype=torch.int32)


def union_indices(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, n) bool -> (n,) int32, ascending, and the (1,) int32 valid ones."""
    index, count = _compacted(mask.any(dim=0, keepdim=True))
    return index[0], count


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
    total = _columns(x, index, weight, count, compact, block)
    for added in (bias, residual):
        total = total if added is None else total + added.float()
    return total.to(x.dtype)


def gated_columns(
    x: Tensor, index: Tensor, gate: Weight, up: Weight, activation: str, count: Tensor | None
) -> Tensor:
    """``activation(x gate) * (x up)`` over the kept input channels: (batch, width)."""
    gated, raised = (_columns(x, index, weight, count, False, 1) for weight in (gate, up))
    return (ACTIVATIONS[activation](gated) * raised).to(x.dtype)


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
    units = _channels(index, block).expand(len(x), -1)
    total = _rows(x, units, weight)
    if bias is not None:
        total = total + bias.float()[units]
    total = ACTIVATIONS[activation](total)
    if factor is not None:
        total = total * factor.float().gather(1, units)
    return torch.where(_valid(units, count, block), total, 0).to(dtype)


def gated_rows(
    x: Tensor, index: Tensor, gate: Weight, up: Weight, activation: str, count: Tensor | None
) -> Tensor:
    """``activation(gate_j x) * (up_j x)`` for the kept units j: (batch, k)."""
    units = _channels(index, 1).expand(len(x), -1)
    total = ACTIVATIONS[activation](_rows(x, units, gate)) * _rows(x, units, up)
    return torch.where(_valid(units, count, 1), total, 0).to(x.dtype)


def _ranked(scores: Tensor, magnitude: bool, factor: Tensor | None) -> Tensor:
    scores = scores if factor is None else scores.float() * factor
    return scores.abs() if magnitude else scores


def _compacted(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, n) bool -> all indices, the kept ones first in order, and the (batch,) kept."""
    order = mask.byte().sort(dim=1, descending=True, stable=True).indices
    return order.int(), mask.sum(1, dtype=torch.int32)


def _channels(index: Tensor, block: int) -> Tensor:
    """(rows or none, k) blocks -> (rows, k * block) units."""
    index = index.long() if index.dim() == 2 else index.long()[None]
    inside = torch.arange(block, device=index.device)
    return (index.unsqueeze(-1) * block + inside).flatten(1)


def _valid(units: Tensor, count: Tensor | None, block: int) -> Tensor:
    places = torch.arange(units.shape[1], device=units.device)
    if count is None:
        return torch.ones_like(units, dtype=torch.bool)
    return (places < count.view(-1, 1) * block).expand(len(units), -1)


def _columns(
    x: Tensor, index: Tensor, weight: Weight, count: Tensor | None, compact: bool, block: int
) -> Tensor:
    units = _channels(index, block).expand(len(x), -1)
    valid = _valid(units, count, block)
    units = torch.where(valid, units, 0)
    values = torch.where(valid, x if compact else x.gather(1, units), 0).float()
    if index.dim() == 1:
        return values @ weight.rows(units[0]).float()
    products = [row @ weight.rows(own).float() for row, own in zip(values, units, strict=True)]
    return torch.stack(products)


def _rows(x: Tensor, units: Tensor, weight: Weight) -> Tensor:
    in_range = units.clamp(0, weight.units - 1)
    products = [
        weight.rows(own).float() @ row.float() for row, own in zip(x, in_range, strict=True)
    ]
    return torch.stack(products)
