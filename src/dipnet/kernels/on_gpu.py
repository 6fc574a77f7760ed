"""Masks on a GPU in one launch: the selection of `dipnet.kernels.gpu`, as this room calls it."""

import torch
from torch import Tensor

MOST_ROWS = 65535
"""Of a launch's grid."""


def why_not(scores: Tensor, resident: Tensor | None = None) -> str | None:
    """Why these tensors cannot be served, as the end of a sentence; None when they can."""
    if not scores.is_cuda:
        return f"needs scores on a CUDA GPU, not on {scores.device.type}"
    if resident is not None and resident.dim() > 1:
        return "takes one residency for all rows"
    from dipnet.kernels.gpu import choice  # they import triton, where there is one

    n = scores.shape[-1]
    reason = choice.why_not(scores, resident) or choice.why_not_units(n)
    if reason is None and scores.numel() > MOST_ROWS * n:
        return f"takes {MOST_ROWS} rows of scores at most"
    return reason


def topk_mask(scores: Tensor, k: int) -> Tensor:
    """Mask of the k highest scores of each row: (..., n) floating -> (..., n) bool, 0 < k < n."""
    return _selected(scores, k, None)


def cache_aware_topk(scores: Tensor, k: int, resident: Tensor, gamma: float) -> Tensor:
    """`topk_mask` with scores times ``gamma`` where (n,) ``resident`` is False."""
    factor = torch.full_like(resident, gamma, dtype=torch.float32)
    return _selected(scores, k, factor.masked_fill_(resident, 1.0))


def _selected(scores: Tensor, k: int, factor: Tensor | None) -> Tensor:
    from dipnet.kernels import gpu

    rows = scores.detach().reshape(-1, scores.shape[-1])
    return gpu.topk_mask(rows, k, magnitude=False, factor=factor, backend="gpu").view(scores.shape)
