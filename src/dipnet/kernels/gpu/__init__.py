"""Kernels for one token at a time on a GPU: selection of units, and products with what is kept.

Every function is a PyTorch operator (`torch.ops.dipnet`): a compiler breaks no graph at it, a CUDA
graph captures it, nothing waits for the device, and shapes are known beforehand. Sums are taken in
float32, in an order that only the shapes decide: the same call returns the same bits.

``index`` is int32, ascending: (batch, k) where each row of ``x`` keeps units of its own, or (k,)
for all rows together: then each weight is read once. ``count`` is how many of them are valid, on
the device: one number for each row of ``index``. ``backend`` is "auto", "gpu" or "reference": plain
torch, the meaning that the kernels match, and what "auto" takes where they cannot serve.

Every function raises InputError for a shape or a dtype that does not fit, and BackendError where
the backend asked for cannot serve. Knows tensors; knows no site, no method and no model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dipnet.errors import InputError
from dipnet.kernels.gpu import ops
from dipnet.kernels.gpu.reference import ACTIVATIONS
from dipnet.kernels.gpu.weights import FLOATS, Weight, shape_text

__all__ = [
    "ACTIVATIONS",
    "Weight",
    "check_scores",
    "check_threshold",
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

MOST_SHARING = 64
"""Rows of ``x`` that an index can serve together."""


def topk_indices(
    scores: Tensor,
    k: int,
    *,
    magnitude: bool = True,
    factor: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The k highest scores of each row: (batch, n) floating -> (batch, k) int32, ascending.

    The rule of `dipnet.kernels.topk_mask`: exactly k, ties to the lowest index, NaN first. With
    ``magnitude`` absolute values are compared. ``factor``, (n,) float32, multiplies them first, in
    float32.
    """
    check_scores(scores, k, factor)
    return ops.topk_indices(scores, k, magnitude, factor, backend)


def topk_mask(
    scores: Tensor,
    k: int,
    *,
    magnitude: bool = True,
    factor: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """What `topk_indices` selects, as (batch, n) bool."""
    check_scores(scores, k, factor)
    return ops.topk_mask(scores, k, magnitude, factor, backend)


def keep_topk(x: Tensor, k: int, *, factor: Tensor | None = None, backend: str = "auto") -> Tensor:
    """(batch, n) floating times the mask of its k highest magnitudes: the others are 0.

    ``factor`` is as for `topk_indices`. A dropped NaN or infinity becomes NaN, as by the mask.
    """
    check_scores(x, k, factor)
    return ops.keep_topk(x, k, factor, backend)


def threshold_indices(
    x: Tensor, threshold: Tensor, *, magnitude: bool = True, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Units above a threshold: (batch, n) floating -> (batch, n) int32 and (batch,) int32 counts.

    The first ``count`` of a row's indices are valid, ascending; the others are without meaning.
    ``threshold`` is (1,) float32. NaN exceeds nothing, as everywhere in torch.
    """
    check_scores(x, 0, None)
    check_threshold(threshold)
    return ops.threshold_indices(x, threshold, magnitude, backend)


def keep_above(x: Tensor, threshold: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """(batch, n) floating times the mask of magnitudes above a threshold, (batch,) int32 counts.

    ``threshold`` and NaN are as for `threshold_indices`, what is dropped as for `keep_topk`.
    """
    check_scores(x, 0, None)
    check_threshold(threshold)
    return ops.keep_above(x, threshold, backend)


def union_indices(mask: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Units that any row keeps: (batch, n) bool -> (n,) int32, of which (1,) int32 are valid.

    The units that no row keeps are behind them, so that anything can be gathered with the list.
    """
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise InputError(f"mask must be torch.bool of shape (batch, n), not {shape_text(mask)}")
    return ops.union_indices(mask, backend)


def columns_product(
    x: Tensor,
    index: Tensor,
    weight: Weight | Tensor,
    *,
    count: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    compact: bool = False,
    block: int = 1,
    backend: str = "auto",
) -> Tensor:
    """A linear layer of which kept input channels are read: (batch, channels) -> (batch, width).

    The units of ``weight`` are input channels: a linear layer's weight, transposed. ``x`` holds all
    channels, or (``compact``) those of ``index`` alone, (batch, k * block), in its order. ``index``
    counts blocks of ``block`` neighbouring units. ``bias`` (width,) and ``residual`` (batch, width)
    are added to the float32 sums.
    """
    weight = Weight.of(weight)
    channels = index.shape[-1] * block if compact else weight.units
    _check_product(x, channels, index, weight, count, block)
    _check_added("bias", bias, (weight.width,))
    _check_added("residual", residual, (len(x), weight.width))
    return ops.columns_product(x, index, *weight, count, bias, residual, compact, block, backend)


def gated_columns(
    x: Tensor,
    index: Tensor,
    gate: Weight | Tensor,
    up: Weight | Tensor,
    activation: str,
    *,
    count: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``activation(x gate) * (x up)`` of kept input channels: (batch, channels) -> (batch, width).

    The units of both matrices are input channels, as for `columns_product`.
    """
    gate, up = _pair(gate, up, activation)
    _check_product(x, gate.units, index, gate, count, 1)
    data, scales = [gate.data, up.data], _scales(gate, up)
    return ops.gated_columns(
        x, index, data, scales, gate.kind, gate.width, activation, count, backend
    )


def rows_product(
    x: Tensor,
    index: Tensor,
    weight: Weight | Tensor,
    *,
    count: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    factor: Tensor | None = None,
    block: int = 1,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    """Kept outputs of a linear layer: (batch, width) -> (batch, k * block), in the index's order.

    The units of ``weight`` are outputs: a linear layer's weight as it is. ``bias`` (units,) is
    added, ``activation`` applied, and ``factor`` (batch, units) multiplied, each at the kept units.
    ``index`` counts blocks of ``block`` neighbouring units. Zero beyond ``count``. With ``dtype``,
    which holds all numbers of ``x``'s, the same as of ``x.to(dtype)``.
    """
    weight = Weight.of(weight)
    _check_activation(activation)
    _check_product(x, weight.width, index, weight, count, block)
    _check_added("bias", bias, (weight.units,))
    _check_added("factor", factor, (len(x), weight.units))
    dtype = dtype or x.dtype
    if dtype not in (x.dtype, torch.float32):
        raise InputError(f"dtype must be {x.dtype}, that of x, or torch.float32, not {dtype}")
    given = (count, bias, activation, factor, block, dtype)
    return ops.rows_product(x, index, *weight, *given, backend)


def gated_rows(
    x: Tensor,
    index: Tensor,
    gate: Weight | Tensor,
    up: Weight | Tensor,
    activation: str,
    *,
    count: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``activation(gate_j x) * (up_j x)`` of the kept units j: (batch, width) -> (batch, k).

    The units of both matrices are outputs, as for `rows_product`. Zero beyond ``count``.
    """
    gate, up = _pair(gate, up, activation)
    _check_product(x, gate.width, index, gate, count, 1)
    data, scales = [gate.data, up.data], _scales(gate, up)
    return ops.gated_rows(x, index, data, scales, gate.kind, gate.width, activation, count, backend)


def _scales(*weights: Weight) -> list[Tensor]:
    return [weight.scales for weight in weights if weight.scales is not None]


def _pair(gate: Weight | Tensor, up: Weight | Tensor, activation: str) -> tuple[Weight, Weight]:
    gate, up = Weight.of(gate), Weight.of(up)
    _check_activation(activation)
    up.check()
    if (gate.kind, gate.width) != (up.kind, up.width) or (
        (gate.data.shape, gate.data.stride(), gate.data.dtype)
        != (up.data.shape, up.data.stride(), up.data.dtype)
    ):
        raise InputError(
            f"gate and up must be of one kind, shape and stride, not {shape_text(gate.data)} and "
            f"{shape_text(up.data)}"
        )
    return gate, up


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise InputError(f"no kernel has the activation {activation!r}; there are: {known}")


def check_scores(scores: Tensor, k: int, factor: Tensor | None) -> None:
    """InputError where `topk_indices` takes no such scores, number and factor."""
    if scores.dim() != 2 or not scores.is_floating_point():
        raise InputError(f"scores must be floating of shape (batch, n), not {shape_text(scores)}")
    n = scores.shape[1]
    if not 0 <= k <= n:
        raise InputError(f"k must be between 0 and n = {n}, not {k}")
    if factor is not None and (factor.shape != (n,) or factor.dtype != torch.float32):
        raise InputError(f"factor must be torch.float32 of shape ({n},), not {shape_text(factor)}")


def check_threshold(threshold: Tensor) -> None:
    """InputError where `threshold_indices` takes no such threshold."""
    if threshold.shape != (1,) or threshold.dtype != torch.float32:
        raise InputError(
            f"threshold must be torch.float32 of shape (1,), not {shape_text(threshold)}"
        )


def _check_product(
    x: Tensor, channels: int, index: Tensor, weight: Weight, count: Tensor | None, block: int
) -> None:
    weight.check()
    if x.dim() != 2 or x.shape[1] != channels or x.dtype not in FLOATS:
        raise InputError(f"x must be floating of shape (batch, {channels}), not {shape_text(x)}")
    own = index.dim() == 2 and len(index) == len(x)
    shared = index.dim() == 1 and len(x) <= MOST_SHARING
    if index.dtype != torch.int32 or not (own or shared):
        raise InputError(
            f"index must be torch.int32 of shape ({len(x)}, k), or (k,) for up to {MOST_SHARING} "
            f"rows of x, not {shape_text(index)} for {len(x)} rows"
        )
    lists = len(index) if own else 1
    if count is not None and (count.dtype != torch.int32 or count.shape != (lists,)):
        raise InputError(f"count must be torch.int32 of shape ({lists},), not {shape_text(count)}")
    if block < 1 or weight.units % block:
        raise InputError(f"blocks of {block} do not divide the {weight.units} units of the weight")


def _check_added(name: str, added: Tensor | None, shape: tuple[int, ...]) -> None:
    if added is not None and (added.shape != shape or not added.is_floating_point()):
        raise InputError(f"{name} must be floating of shape {shape}, not {shape_text(added)}")
