"""The kernels in plain torch: any device and dtype, the meaning that other backends must match.

Nothing here waits for the device, so a call can be captured in a CUDA graph.
"""

import torch
from torch import Tensor

_INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32}


def topk_mask(scores: Tensor, k: int) -> Tensor:
    """Mask of the k highest scores of each row: (..., n) floating -> (..., n) bool, 0 < k < n."""
    keys = _order_keys(scores.detach())
    kth = torch.topk(keys, k, sorted=False).values.amin(-1, keepdim=True)
    above, ties = keys > kth, keys == kth
    quota = k - above.sum(-1, keepdim=True, dtype=torch.int32)
    return above | (ties & (ties.cumsum(-1, dtype=torch.int32) <= quota))


def cache_aware_topk(scores: Tensor, k: int, resident: Tensor, gamma: float) -> Tensor:
    """`topk_mask` with scores times ``gamma`` where (n,) ``resident`` is False."""
    scores = scores if scores.dtype in _INTEGERS else scores.float()
    return topk_mask(torch.where(resident, scores, scores * gamma), k)


def _order_keys(scores: Tensor) -> Tensor:
    """Integers in the scores' order, NaN highest and both zeros equal: (..., n) -> (..., n)."""
    scores = scores if scores.dtype in _INTEGERS else scores.float()
    integer = _INTEGERS[scores.dtype]
    largest = torch.iinfo(integer).max
    bits = (scores + 0.0).contiguous().view(integer)  # -0.0 + 0.0 is 0.0
    keys = bits ^ ((bits >> (torch.iinfo(integer).bits - 1)) & largest)
    return keys.masked_fill(scores.isnan(), largest)
