"""Add to the residual stream and normalise, in one launch; and what is between gate and down.

A row is whole in one program's registers, so that its sums need no second launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dipnet.kernels.gpu.common import activated, after_previous
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
