"""Selection of units in Triton, one program a row: where thread blocks form no clusters."""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from dipnet.kernels.gpu.common import after_previous, launch_options

_ELEMENTS_A_WARP = 512


def select_topk(
    scores: Tensor,
    k: int,
    magnitude: bool,
    factor: Tensor | None,
    into: Literal["index", "mask", "kept"],
) -> Tensor:
    """(batch, n) -> (batch, k) int32 indices, the (batch, n) bool mask, or scores times that."""
    batch, n = scores.shape
    dtype = {"index": torch.int32, "mask": torch.bool, "kept": scores.dtype}[into]
    out = scores.new_empty((batch, k if into == "index" else n), dtype=dtype)
    wide = factor is not None or scores.dtype == torch.float32
    _select_topk[(batch,)](
        scores.contiguous(),
        factor,
        *(out if name == into else None for name in ("index", "mask", "kept")),
        n,
        k,
        MAGNITUDE=magnitude,
        BITS=32 if wide else 16,
        **_options(n, scores.device),
    )
    return out


def select_above(
    x: Tensor, threshold: Tensor, magnitude: bool, into: Literal["index", "kept"]
) -> tuple[Tensor, Tensor]:
    """(batch, n) -> (batch, n) int32 indices, or x times the mask, and (batch,) int32 counts."""
    n, count = x.shape[1], x.new_empty(len(x), dtype=torch.int32)
    out = x.new_empty(x.shape, dtype=torch.int32 if into == "index" else x.dtype)
    _select_above[(len(x),)](
        x.contiguous(),
        threshold,
        *(out if name == into else None for name in ("index", "kept")),
        count,
        n,
        MAGNITUDE=magnitude,
        **_options(n, x.device),
    )
    return out, count


def select_union(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, n) bool -> (n,) int32 indices, the others behind, and the (1,) int32 count."""
    batch, n = mask.shape
    index, count = (mask.new_empty(size, dtype=torch.int32) for size in (n, 1))
    bytes_ = mask.contiguous().view(torch.uint8)
    _select_union[(1,)](bytes_, index, count, batch, n, **_options(n, mask.device))
    return index, count


def _options(n: int, device: torch.device) -> dict[str, Any]:
    size = triton.next_power_of_2(n)
    warps = max(1, min(32, size // _ELEMENTS_A_WARP))
    return {"SIZE": size} | launch_options(warps, device)


@triton.jit
def _keys(scores, MAGNITUDE: tl.constexpr):
    """float32 scores -> int32 in their order, NaN highest and both zeros equal; none is negative
    where ``MAGNITUDE``.
    """
    scores = tl.abs(scores) if MAGNITUDE else scores + 0.0
    bits = scores.to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(scores != scores, 0x7FFFFFFF, keys)


@triton.jit
def write_kept(keep, places, index):
    """Write the places that are kept to ``index``, in order; returns how many there are."""
    kept = keep.to(tl.int32)
    at = tl.cumsum(kept, 0) - kept
    tl.store(index + at, places, mask=keep)
    return tl.sum(kept, 0)


@triton.jit
def _select_topk(
    scores,
    factor,
    index,
    mask,
    kept,
    n,
    k,
    MAGNITUDE: tl.constexpr,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, SIZE)
    inside = places < n
    after_previous(OVERLAP)
    given = tl.load(scores + row * n + places, mask=inside, other=0).to(tl.float32)
    if factor is not None:
        given *= tl.load(factor + places, mask=inside, other=0)
    keys = _keys(given, MAGNITUDE)
    # The k-th highest key, bit by bit: the largest that k keys reach. 16-bit floats leave the lower
    # 13 (float16) or 16 (bfloat16) bits of a float32 at 0, but for NaN, whose key is all ones.
    low: tl.constexpr = 0 if BITS == 32 else 13
    found = tl.full((), 0 if MAGNITUDE else -0x80000000, tl.int32)
    if not MAGNITUDE:
        found = tl.where(tl.sum((inside & (keys >= 0)).to(tl.int32), 0) >= k, 0, found)
    for step in tl.static_range(31 - low):
        trial = found + (1 << (30 - step))
        reached = tl.sum((inside & (keys >= trial)).to(tl.int32), 0)
        found = tl.where(reached >= k, trial, found)
    if low > 0:  # all that is left to find is NaN's ones, and those below a negative number
        trial = found + ((1 << low) - 1)
        reached = tl.sum((inside & (keys >= trial)).to(tl.int32), 0)
        found = tl.where(reached >= k, trial, found)
    above = inside & (keys > found)
    ties = (inside & (keys == found)).to(tl.int32)
    quota = k - tl.sum(above.to(tl.int32), 0)
    keep = above | ((ties > 0) & (tl.cumsum(ties, 0) <= quota))
    if index is not None:
        write_kept(keep, places, index + row * k)
    elif mask is not None:
        tl.store(mask + row * n + places, keep, mask=inside)
    else:
        x = tl.load(scores + row * n + places, mask=inside, other=0).to(tl.float32)
        x = tl.where(keep, x, x * 0.0).to(kept.dtype.element_ty)
        tl.store(kept + row * n + places, x, mask=inside)


@triton.jit
def _select_above(
    x,
    threshold,
    index,
    kept,
    count,
    n,
    MAGNITUDE: tl.constexpr,
    SIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, SIZE)
    inside = places < n
    after_previous(OVERLAP)
    scores = tl.load(x + row * n + places, mask=inside, other=0).to(tl.float32)
    compared = tl.abs(scores) if MAGNITUDE else scores
    keep = inside & (compared > tl.load(threshold))
    if index is not None:
        tl.store(count + row, write_kept(keep, places, index + row * n))
    else:
        tl.store(count + row, tl.sum(keep.to(tl.int32), 0))
        scores = tl.where(keep, scores, scores * 0.0).to(kept.dtype.element_ty)
        tl.store(kept + row * n + places, scores, mask=inside)


@triton.jit
def _select_union(mask, index, count, batch, n, SIZE: tl.constexpr, OVERLAP: tl.constexpr):
    places = tl.arange(0, SIZE)
    inside = places < n
    after_previous(OVERLAP)
    kept = tl.zeros((SIZE,), tl.uint8)
    for row in range(batch):
        kept |= tl.load(mask + row * n + places, mask=inside, other=0)
    number = write_kept(inside & (kept != 0), places, index)
    write_kept(inside & (kept == 0), places, index + number)
    tl.store(count, number)
