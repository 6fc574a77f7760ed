"""Add to the residual stream and normalise, in one launch, with what is kept of the result where
thread blocks form clusters; and what is between gate and down.

A row is whole in one program's registers, so that its sums need no second launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dipnet.kernels import gpu
from dipnet.kernels.gpu import nvrtc
from dipnet.kernels.gpu.common import activated, after_previous
from dipnet.kernels.gpu.selection import AddNorm, select
from dipnet.kernels.gpu.tiles import MOST_UNITS, cut_of
from dipnet.kernels.steps.launch import overlapping
from dipnet.kernels.steps.shapes import Norm


@triton.jit
def _add_norm(
    hidden,
    delta,
    weight,
    bias,
    summed,
    normed,
    ring,
    place,
    epsilon,
    n,
    ADD: tl.constexpr,
    CENTRED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BIASED: tl.constexpr,
    RING: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    inside, at = i < n, row * n + i
    if WEIGHTED:
        scale = tl.load(weight + i, mask=inside, other=0.0)
    after_previous(OVERLAP)
    x = tl.load(hidden + at, mask=inside, other=0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(delta + at, mask=inside, other=0.0)).to(x.dtype)
        tl.store(summed + at, x, mask=inside)
    wide = x.to(tl.float32)
    if CENTRED:
        wide = tl.where(inside, wide - tl.sum(wide) / n, 0.0)
    made = wide * tl.rsqrt(tl.sum(wide * wide) / n + epsilon)
    if CENTRED:
        if WEIGHTED:
            made = made * scale
        if BIASED:
            made += tl.load(bias + i, mask=inside, other=0.0)
        made = made.to(x.dtype)
    else:  # rounded before the weights, as Hugging Face does
        made = (made.to(x.dtype).to(tl.float32) * scale).to(x.dtype)
    tl.store(normed + at, made, mask=inside)
    if RING:
        tl.store(ring + tl.load(place) * tl.num_programs(0) * n + at, made, mask=inside)


def add_norm(
    hidden: Tensor, delta: Tensor | None, norm: Norm, ring: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """See `dipnet.kernels.steps.add_norm`."""
    n = hidden.shape[-1]
    normed = torch.empty_like(hidden)
    summed = hidden if delta is None else torch.empty_like(hidden)
    block = triton.next_power_of_2(n)
    _add_norm[(len(hidden),)](
        hidden.contiguous(),
        delta if delta is None else delta.contiguous(),
        norm.weight,
        norm.bias,
        summed,
        normed,
        *(ring or (None, None)),
        norm.epsilon,
        n,
        ADD=delta is not None,
        CENTRED=norm.centred,
        WEIGHTED=norm.weight is not None,
        BIASED=norm.bias is not None,
        RING=ring is not None,
        BLOCK=block,
        num_warps=max(4, min(32, block // 256)),
        **overlapping(hidden.device),
    )
    return summed, normed


def add_norm_topk(
    hidden: Tensor, delta: Tensor | None, norm: Norm, k: int, factor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dipnet.kernels.steps.add_norm_topk`."""
    made = _with_selection(hidden, delta, norm)
    if made is None or k == 0:
        summed, normed = add_norm(hidden, delta, norm, None)
        return summed, normed, gpu.topk_indices(normed, k, factor=factor)
    index = hidden.new_empty(len(hidden), k, dtype=torch.int32)
    cut = cut_of(hidden.shape[1])
    select(cut, hidden, True, k=k, factor=factor, index=index, add_norm=made)
    return made.summed, made.normed, index


def add_norm_above(
    hidden: Tensor, delta: Tensor | None, norm: Norm, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `dipnet.kernels.steps.add_norm_above`."""
    made = _with_selection(hidden, delta, norm)
    if made is None:
        summed, normed = add_norm(hidden, delta, norm, None)
        return summed, normed, *gpu.threshold_indices(normed, threshold)
    index = torch.empty_like(hidden, dtype=torch.int32)
    count = hidden.new_empty(len(hidden), dtype=torch.int32)
    cut = cut_of(hidden.shape[1])
    select(cut, hidden, True, threshold=threshold, index=index, count=count, add_norm=made)
    return made.summed, made.normed, index, count


def _with_selection(hidden: Tensor, delta: Tensor | None, norm: Norm) -> AddNorm | None:
    """What `select` is given to add and normalise; None where it cannot."""
    if norm.weight is None or norm.centred or not nvrtc.serves(hidden.device):
        return None
    given = [part for part in (hidden, delta, norm.weight) if part is not None]
    alike = all(part.dtype == hidden.dtype and part.is_contiguous() for part in given)
    if not alike or hidden.numel() == 0 or hidden.shape[1] > MOST_UNITS:
        return None
    summed = hidden if delta is None else torch.empty_like(hidden)
    return AddNorm(delta, norm.weight, summed, torch.empty_like(hidden), float(norm.epsilon))


@triton.jit
def _gated(pre, out, n, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    row, i = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    after_previous(OVERLAP)
    pre += row * 2 * n
    gate = tl.load(pre + i, mask=i < n, other=0.0)
    up = tl.load(pre + n + i, mask=i < n, other=0.0)
    gate = activated(gate.to(tl.float32), ACTIVATION).to(gate.dtype)
    tl.store(out + row * n + i, gate.to(tl.float32) * up.to(tl.float32), mask=i < n)


def gated(pre: Tensor, activation: str) -> Tensor:
    """See `dipnet.kernels.steps.gated`."""
    n, block = pre.shape[-1] // 2, 512
    out = pre.new_empty(len(pre), n)
    grid = (triton.cdiv(n, block), len(pre))
    options = overlapping(pre.device)
    _gated[grid](
        pre.contiguous(), out, n, ACTIVATION=activation, BLOCK=block, num_warps=4, **options
    )
    return out
