"""The kernels in plain torch: any device and dtype, the meaning that other backends must match.

Nothing here waits for the device, so a call can be captured in a CUDA graph.
"""

import torch
from torch import Tensor


def topk_mask(scores: Tensor, k: int) -> Tensor:
    """Mask of the k highest scores of each row: (..., n) floating -> (..., n) bool, 0 < k < n."""
    scores = scores.detach()
    kth = torch.topk(scores, k).values[..., -1:]
    # torch.topk ranks NaN highest, but comparisons with NaN are false: they are made up for here.
    nan, kth_nan = scores.isnan(), kth.isnan()
    above = (scores > kth) | (nan & ~kth_nan)
    ties = (scores == kth) | (nan & kth_nan)
    quota = k - above.sum(-1, keepdim=True)
    return above | (ties & (ties.cumsum(-1) <= quota))
