"""The kernels in C++ for the CPU (`src/dipnet/csrc`). Knows no fallback: see `dipnet.kernels`."""

import torch
from torch import Tensor

try:
    from dipnet import _native
except ImportError:  # a source tree whose extension was never built
    _BUILT = False
else:
    _BUILT = True

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(scores: Tensor, resident: Tensor | None = None) -> str | None:
    """Why these tensors cannot be served, as the end of a sentence; None when they can."""
    if not _BUILT:
        return "is not built: run `pip install .`"
    device, dtype = scores.device.type, scores.dtype
    if device != "cpu" or dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16 on cpu, not {dtype} on {device}"
    if resident is not None and resident.device.type != "cpu":
        return f"takes a residency on cpu, not on {resident.device.type}"
    return None


def topk_mask(scores: Tensor, k: int) -> Tensor:
    """Mask of the k highest scores of each row: (..., n) floating -> (..., n) bool, 0 < k < n."""
    rows = scores.detach().float().contiguous()
    mask = torch.empty_like(rows, dtype=torch.bool)
    _native.topk_mask(rows.numpy(), mask.numpy(), k, torch.get_num_threads())
    return mask


def cache_aware_topk(scores: Tensor, k: int, resident: Tensor, gamma: float) -> Tensor:
    """`topk_mask` with scores times ``gamma`` where (n,) ``resident`` is False."""
    rows = scores.detach().float().contiguous()
    mask = torch.empty_like(rows, dtype=torch.bool)
    _native.cache_aware_topk(
        rows.numpy(),
        resident.contiguous().numpy(),
        gamma,
        mask.numpy(),
        k,
        torch.get_num_threads(),
    )
    return mask
