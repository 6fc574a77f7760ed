"""Sums over kept input channels that several programs compute in parts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dipnet.kernels.gpu.common import activated

EAGER, CAPTURED = 1 << 16, 1 << 22
"""Counters of a stream, and those of a device for all CUDA graphs together."""
ALIGNED = 4
"""Counters in 16 bytes: kernels are compiled for addresses that are multiples of them."""
_of_stream: dict[tuple[torch.device, int], Tensor] = {}
_left: dict[torch.device, Tensor] = {}


def sums_of_parts(
    out: Tensor, tiles: int, parts: int, matrices: int
) -> tuple[Tensor | None, Tensor | None]:
    """Room for the parts' float32 sums, and for each tile of ``out``'s rows a counter that is 0."""
    if parts == 1:
        return None, None
    partial = out.new_empty(parts * matrices * out.numel(), dtype=torch.float32)
    return partial, counters(out, tiles * len(out))


def counters(like: Tensor, count: int) -> Tensor:
    """(count or more,) int32 zeros, which a kernel leaves at 0.

    The counters of a stream serve its kernels one after another. A kernel in a CUDA graph, which
    may be replayed beside any other, gets some of its own; where no graph was expected or too many
    have taken theirs, the graph sets them to 0 at every replay.
    """
    device = like.device
    if not like.is_cuda or count > EAGER:
        return like.new_zeros(count, dtype=torch.int32)
    if torch.cuda.is_current_stream_capturing():
        left, taken = _left.get(device), -(-count // ALIGNED) * ALIGNED
        if left is None or len(left) < taken:
            return like.new_zeros(count, dtype=torch.int32)
        _left[device] = left[taken:]
        return left[:count]
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _of_stream:
        _of_stream[key] = like.new_zeros(EAGER, dtype=torch.int32)
        if device not in _left:
            _left[device] = like.new_zeros(CAPTURED, dtype=torch.int32)
            torch.cuda.synchronize(device)  # zeros for every stream from here on
    return _of_stream[key]


@triton.jit
def write_columns(
    total,
    raised,
    outputs,
    up,
    bias,
    residual,
    out,
    partial,
    counter,
    width,
    ACTIVATION: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Write a program's sums at its outputs: of the second matrix too where there is ``up``.

    With PARTS, the program that is the last to come adds up what all have, in the parts' order.
    """
    inside = outputs < width
    row = tl.program_id(1)
    last = True
    if PARTS > 1:
        matrices: tl.constexpr = 1 if up is None else 2
        step = tl.num_programs(1) * width  # of one matrix's sums
        own = partial + row * width + outputs
        here = own + tl.program_id(2) * matrices * step
        tl.store(here, total, mask=inside)
        if up is not None:
            tl.store(here + step, raised, mask=inside)
        tl.debug_barrier()  # every thread's sums are written before the program counts itself
        counter += row * tl.num_programs(0) + tl.program_id(0)
        last = tl.atomic_add(counter, 1, sem="acq_rel") == PARTS - 1
        if last:
            total = tl.zeros_like(total)
            raised = tl.zeros_like(raised)
            for part in tl.static_range(PARTS):
                there = own + part * matrices * step
                total += tl.load(there, mask=inside, other=0)
                if up is not None:
                    raised += tl.load(there + step, mask=inside, other=0)
            tl.store(counter, 0)
    if last:
        if bias is not None:
            total += tl.load(bias + outputs, mask=inside, other=0).to(tl.float32)
        total = activated(total, ACTIVATION)
        if up is not None:
            total *= raised
        at = row * width + outputs
        if residual is not None:
            total += tl.load(residual + at, mask=inside, other=0).to(tl.float32)
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
