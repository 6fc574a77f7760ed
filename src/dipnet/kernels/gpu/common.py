"""What the kernels share: launching, lists, what is done to a sum; Triton's helpers among it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether Triton runs programs on the CPU, for tests (TRITON_INTERPRET=1)."""
HOPPER = (9, 0)


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a kernel may start while the one before it ends (programmatic dependent launch)."""
    return not INTERPRETED and torch.cuda.get_device_capability(device) >= HOPPER


def launch_options(warps: int, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a launch that are not the kernel's own."""
    options = {"num_warps": warps, "OVERLAP": overlaps(device)}
    return options | ({"launch_pdl": True} if overlaps(device) else {})


def list_stride(index: Tensor) -> int:
    """From one row's indices to the next's; 0 where all rows share them."""
    return index.stride(0) if index.dim() == 2 else 0


@triton.jit
def after_previous(OVERLAP: tl.constexpr):
    """Wait until what the previous kernel wrote is there; the next one's programs may come then.

    Before, they would crowd the multiprocessors, and those of all that follow.
    """
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def valid_units(count, row, shared, kept, BLOCK: tl.constexpr):
    """How many of ``kept`` places of a row's list are valid."""
    if count is not None:
        kept = tl.minimum(kept, tl.load(count + tl.where(shared, 0, row)) * BLOCK)
    return kept


@triton.jit
def units_at(index, places, end, BLOCK: tl.constexpr):
    """The units at some places of a list of blocks; 0 from ``end`` on."""
    blocks = tl.load(index + places // BLOCK, mask=places < end, other=0)
    return blocks * BLOCK + places % BLOCK


@triton.jit
def units_ahead(index, start, end, BLOCK: tl.constexpr, READS: tl.constexpr, GROUP: tl.constexpr):
    """The units at the next places of a list: READS tensors of (GROUP,)."""
    units = ()
    for step in tl.static_range(READS):
        units += (units_at(index, start + step * GROUP + tl.arange(0, GROUP), end, BLOCK),)
    return units


@triton.jit
def activated(value, ACTIVATION: tl.constexpr):
    """An activation function by its name in `reference.ACTIVATIONS`; NaN stays NaN."""
    if ACTIVATION == "relu":
        value = tl.where(value < 0, 0.0, value)
    elif ACTIVATION == "silu":
        value = value / (1 + tl.exp(-value))
    elif ACTIVATION == "gelu":
        value = 0.5 * value * (1 + tl.erf(value * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        value = value / (1 + tl.exp(-2 * inner))
    return value
