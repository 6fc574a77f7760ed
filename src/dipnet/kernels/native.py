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
    if resident is not None and resident.dim() > 1:
        return "takes one residency for all rows"
    return None


def why_not_rows(rows: Tensor, *others: Tensor | None) -> str | None:
    """`why_not` for a product with ``rows`` and what belongs to them."""
    if not _BUILT:
        return "is not built: run `pip install .`"
    elsewhere = {t.device.type for t in (rows, *others) if t is not None} - {"cpu"}
    if elsewhere:
        return f"takes tensors on cpu, not on {', '.join(sorted(elsewhere))}"
    return None if rows.is_contiguous() else "takes rows that lie one after the other"


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


def gather_rows(rows: Tensor, scales: Tensor | None, x: Tensor, mask: Tensor, kind: str) -> Tensor:
    """Products of the kept of (n, stride) ``rows`` with (inputs,) ``x``: (n,) float32."""
    y = torch.empty(len(rows))
    _native.gather_rows(
        rows.numpy(),
        None if scales is None else scales.contiguous().numpy(),
        x.detach().float().contiguous().numpy(),
        mask.contiguous().numpy(),
        y.numpy(),
        kind,
        torch.get_num_threads(),
    )
    return y
