"""The kernels of this room as PyTorch operators `torch.ops.dipnet.*`.

A compiler sees one opaque call with known shapes: no graph break, nothing traced. Which backend
serves a call is decided inside, from what the tensors are.
"""

import torch
from torch import Tensor

from dipnet.kernels.gpu.choice import serving
from dipnet.kernels.gpu.weights import Weight


@torch.library.custom_op("dipnet::topk_indices", mutates_args=())
def topk_indices(
    scores: Tensor, k: int, magnitude: bool, factor: Tensor | None, backend: str
) -> Tensor:
    """See `dipnet.kernels.gpu.topk_indices`."""
    kernels = serving(backend, scores, factor, units=scores.shape[1])
    return kernels.topk_indices(scores, k, magnitude, factor)


@topk_indices.register_fake
def _(scores: Tensor, k: int, magnitude: bool, factor: Tensor | None, backend: str) -> Tensor:
    return scores.new_empty(len(scores), k, dtype=torch.int32)


@torch.library.custom_op("dipnet::topk_mask", mutates_args=())
def topk_mask(
    scores: Tensor, k: int, magnitude: bool, factor: Tensor | None, backend: str
) -> Tensor:
    """See `dipnet.kernels.gpu.topk_mask`."""
    kernels = serving(backend, scores, factor, units=scores.shape[1])
    return kernels.topk_mask(scores, k, magnitude, factor)


@topk_mask.register_fake
def _(scores: Tensor, k: int, magnitude: bool, factor: Tensor | None, backend: str) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.bool)


@torch.library.custom_op("dipnet::keep_topk", mutates_args=())
def keep_topk(x: Tensor, k: int, factor: Tensor | None, backend: str) -> Tensor:
    """See `dipnet.kernels.gpu.keep_topk`."""
    return serving(backend, x, factor, units=x.shape[1]).keep_topk(x, k, factor)


@keep_topk.register_fake
def _(x: Tensor, k: int, factor: Tensor | None, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("dipnet::threshold_indices", mutates_args=())
def threshold_indices(
    x: Tensor, threshold: Tensor, magnitude: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """See `dipnet.kernels.gpu.threshold_indices`."""
    kernels = serving(backend, x, threshold, units=x.shape[1])
    return kernels.threshold_indices(x, threshold, magnitude)


@threshold_indices.register_fake
def _(x: Tensor, threshold: Tensor, magnitude: bool, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int32), x.new_empty(len(x), dtype=torch.int32)


@torch.library.custom_op("dipnet::keep_above", mutates_args=())
def keep_above(x: Tensor, threshold: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """See `dipnet.kernels.gpu.keep_above`."""
    return serving(backend, x, threshold, units=x.shape[1]).keep_above(x, threshold)


@keep_above.register_fake
def _(x: Tensor, threshold: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(len(x), dtype=torch.int32)


@torch.library.custom_op("dipnet::union_indices", mutates_args=())
def union_indices(mask: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """See `dipnet.kernels.gpu.union_indices`."""
    return serving(backend, mask, units=mask.shape[1]).union_indices(mask)


@union_indices.register_fake
def _(mask: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return mask.new_empty(mask.shape[1], dtype=torch.int32), mask.new_empty(1, dtype=torch.int32)


@torch.library.custom_op("dipnet::columns_product", mutates_args=())
def columns_product(
    x: Tensor,
    index: Tensor,
    data: Tensor,
    scales: Tensor | None,
    kind: str,
    width: int,
    count: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    compact: bool,
    block: int,
    backend: str,
) -> Tensor:
    """See `dipnet.kernels.gpu.columns_product`."""
    weight = Weight(data, scales, kind, width)
    kernels = serving(backend, x, index, data, scales, count, bias, residual)
    return kernels.columns_product(x, index, weight, count, bias, residual, compact, block)


@columns_product.register_fake
def _(
    x: Tensor, index: Tensor, data: object, scales: object, kind: str, width: int, *_: object
) -> Tensor:
    return x.new_empty(len(x), width)


@torch.library.custom_op("dipnet::gated_columns", mutates_args=())
def gated_columns(
    x: Tensor,
    index: Tensor,
    data: list[Tensor],
    scales: list[Tensor],
    kind: str,
    width: int,
    activation: str,
    count: Tensor | None,
    backend: str,
) -> Tensor:
    """See `dipnet.kernels.gpu.gated_columns`; ``data`` and ``scales`` are gate's and up's."""
    gate, up = _pair(data, scales, kind, width)
    kernels = serving(backend, x, index, *data, *scales, count)
    return kernels.gated_columns(x, index, gate, up, activation, count)


@gated_columns.register_fake
def _(
    x: Tensor, index: Tensor, data: object, scales: object, kind: str, width: int, *_: object
) -> Tensor:
    return x.new_empty(len(x), width)


@torch.library.custom_op("dipnet::rows_product", mutates_args=())
def rows_product(
    x: Tensor,
    index: Tensor,
    data: Tensor,
    scales: Tensor | None,
    kind: str,
    width: int,
    count: Tensor | None,
    bias: Tensor | None,
    activation: str,
    factor: Tensor | None,
    block: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """See `dipnet.kernels.gpu.rows_product`."""
    weight = Weight(data, scales, kind, width)
    kernels = serving(backend, x, index, data, scales, count, bias, factor)
    given = (count, bias, activation, factor, block, dtype)
    return kernels.rows_product(x, index, weight, *given)


@rows_product.register_fake
def _(
    x: Tensor,
    index: Tensor,
    data: Tensor,
    scales: Tensor | None,
    kind: str,
    width: int,
    count: Tensor | None,
    bias: Tensor | None,
    activation: str,
    factor: Tensor | None,
    block: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return x.new_empty(len(x), index.shape[-1] * block, dtype=dtype)


@torch.library.custom_op("dipnet::gated_rows", mutates_args=())
def gated_rows(
    x: Tensor,
    index: Tensor,
    data: list[Tensor],
    scales: list[Tensor],
    kind: str,
    width: int,
    activation: str,
    count: Tensor | None,
    backend: str,
) -> Tensor:
    """See `dipnet.kernels.gpu.gated_rows`; ``data`` and ``scales`` are gate's and up's."""
    gate, up = _pair(data, scales, kind, width)
    kernels = serving(backend, x, index, *data, *scales, count)
    return kernels.gated_rows(x, index, gate, up, activation, count)


@gated_rows.register_fake
def _(x: Tensor, index: Tensor, *_: object) -> Tensor:
    return x.new_empty(len(x), index.shape[-1])


def _pair(data: list[Tensor], scales: list[Tensor], kind: str, width: int) -> tuple[Weight, Weight]:
    gate, up = data
    gate_scales, up_scales = scales or (None, None)
    return Weight(gate, gate_scales, kind, width), Weight(up, up_scales, kind, width)
