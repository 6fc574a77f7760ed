"""Lists of the heads that a batch needs, in one launch of one program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dipnet.kernels.gpu.common import after_previous
from dipnet.kernels.gpu.compaction import write_kept
from dipnet.kernels.steps.launch import overlapping
from dipnet.kernels.steps.shapes import UsedHeads, most_used


def list_heads(kept: Tensor, turn: Tensor, queries: int, groups: int, ring: int) -> UsedHeads:
    """See `dipnet.kernels.steps.list_heads`."""
    batch, k = kept.shape
    most, length = most_used(kept, queries, groups, ring)
    index, count, used = (kept.new_empty(size) for size in (length, 1, 1))
    wanted = kept.new_empty(batch, queries, dtype=torch.bool) if batch > 1 else None
    _list_heads[(1,)](
        kept.contiguous(),
        turn,
        index,
        count,
        used,
        None if wanted is None else wanted.view(torch.uint8),
        batch,
        k,
        QUERIES=queries,
        GROUPS=groups,
        RING=ring,
        BLOCK_Q=triton.next_power_of_2(queries),
        BLOCK_G=triton.next_power_of_2(groups),
        BLOCK_K=triton.next_power_of_2(k),
        num_warps=4,
        **overlapping(kept.device),
    )
    return UsedHeads(index, count, used, most, wanted)


@triton.jit(do_not_specialize=["batch", "k"])
def _list_heads(
    kept,
    turn,
    index,
    count,
    used,
    wanted,
    batch,
    k,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    RING: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    head, group, place = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_K)
    after_previous(OVERLAP)
    asked = tl.zeros((BLOCK_Q,), tl.int32)
    needed = (group % RING == tl.load(turn)).to(tl.int32)
    for row in range(batch):
        units = tl.load(kept + row * k + place, mask=place < k, other=QUERIES)[None, :]
        own = tl.max((units == head[:, None]).to(tl.int32), 1)
        if wanted is not None:
            tl.store(wanted + row * QUERIES + head, own, mask=head < QUERIES)
        asked |= own
        needed |= tl.max((units // (QUERIES // GROUPS) == group[:, None]).to(tl.int32), 1)
    queries = write_kept((asked != 0) & (head < QUERIES), head, index)
    needed = (needed != 0) & (group < GROUPS)
    keys = QUERIES + group
    groups = write_kept(needed, keys, index + queries)
    write_kept(needed, keys + GROUPS, index + queries + groups)
    tl.store(used, queries)
    tl.store(count, queries + 2 * groups)
