"""Attention of one token over a static key/value cache, with all that goes before it: one launch.

Each program has one sequence's group of heads and every so many tiles of the cache; it rotates its
queries itself, and the one whose tile holds the new token writes the token's keys and values. The
last program of a group to finish adds up what all of the group found, in a fixed order.

Where heads are skipped a program has one head that is used, and their keys and values come first
(`complete`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dipnet.kernels.gpu.common import after_previous
from dipnet.kernels.gpu.sums import counters
from dipnet.kernels.steps.launch import overlapping
from dipnet.kernels.steps.shapes import Heads, Rows, UsedHeads

TILE = 64
"""Tokens that a program looks at at a time."""
MOST_SPLITS = 16
LOWEST = tl.constexpr(-1e30)
"""Below every score, and still a number: where a program has seen no token."""


@triton.jit
def _normalised(x, weight, places, factor, inside):
    """Rounded where Hugging Face rounds."""
    scale = tl.load(weight + places, mask=inside, other=0.0).to(tl.float32)
    return (scale * (x.to(tl.float32) * factor).to(x.dtype).to(tl.float32)).to(x.dtype)


@triton.jit
def _finished(
    base,
    rows,
    at,
    cosines,
    sines,
    weight,
    epsilon,
    SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    NORMED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(heads, BLOCK_D) queries or keys as they are compared: normalised and rotated.

    ``base`` (heads, 1) points at each head's channels, ``rows`` (heads, 1) says which there are,
    ``at`` is the position, of all or (heads, 1) of each.
    """
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = d < SIZE
    x = tl.load(base + d, mask=rows & inside, other=0.0)
    half: tl.constexpr = ROTARY // 2
    turned = tl.where(d < half, d + half, tl.where(d < ROTARY, d - half, d))
    if ROTARY > 0:
        other = tl.load(base + turned, mask=rows & inside, other=0.0)
    if NORMED:
        wide = x.to(tl.float32)
        factor = tl.rsqrt(tl.sum(wide * wide, axis=1, keep_dims=True) / SIZE + epsilon)
        x = _normalised(x, weight, d, factor, inside)
        if ROTARY > 0:
            other = _normalised(other, weight, turned, factor, inside)
    if ROTARY > 0:  # rounded where Hugging Face rounds
        rotated = rows & (d < ROTARY)
        cosine = tl.load(cosines + at * ROTARY + d, mask=rotated, other=0.0).to(tl.float32)
        sine = tl.load(sines + at * ROTARY + d, mask=rotated, other=0.0).to(tl.float32)
        signed = tl.where(d < half, -other.to(tl.float32), other.to(tl.float32))
        left = (x.to(tl.float32) * cosine).to(x.dtype).to(tl.float32)
        right = (signed * sine).to(x.dtype).to(tl.float32)
        x = tl.where(d < ROTARY, (left + right).to(x.dtype), x)
    return x


@triton.jit
def _attend(
    qkv,
    used,
    used_queries,
    wanted,
    cosines,
    sines,
    query_weight,
    key_weight,
    keys,
    values,
    position,
    padding,
    out,
    found,
    done,
    scale,
    epsilon,
    stride,
    row_stride,
    RING: tl.constexpr,
    USED: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    NORMED: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    unit, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    units = tl.num_programs(0)
    each: tl.constexpr = 1 if USED else QUERIES // GROUPS
    q, d = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    after_previous(OVERLAP)
    at, first = tl.load(position), tl.load(padding + row)
    turn = at - first  # the token's place in its own sequence
    last, group = at, unit
    if USED:
        head = tl.load(used + unit)
        group = head // (QUERIES // GROUPS)
        needed = unit < tl.load(used_queries)
        if wanted is not None:
            needed &= tl.load(wanted + row * QUERIES + head, mask=needed, other=0) != 0
        last = tl.where(needed, at, -1)  # of other heads nothing is read
        qkv += (at % RING) * tl.num_programs(2) * row_stride
    qkv += row * row_stride
    rows, in_head = (q < each)[:, None], (d < SIZE)[None, :]
    place = (unit * each + q[:, None]) * SIZE
    query = _finished(
        qkv + place,
        rows,
        turn,
        cosines,
        sines,
        query_weight,
        epsilon,
        SIZE,
        ROTARY,
        NORMED,
        BLOCK_D,
    )
    in_cache = (row * GROUPS + group).to(tl.int64) * stride
    kept_keys, kept_values = keys + in_cache, values + in_cache
    behind = at + 1
    if not USED:  # the token's own keys and values are not in the cache yet
        behind = at
        one = tl.zeros([1, 1], tl.int32)
        new = qkv + (QUERIES + group) * SIZE + one
        key = _finished(
            new, one == 0, turn, cosines, sines, key_weight, epsilon, SIZE, ROTARY, NORMED, BLOCK_D
        )
        value = tl.load(new + GROUPS * SIZE + d[None, :], mask=in_head, other=0.0)
    best = tl.full([BLOCK_Q], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    summed = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    start = split * TILE
    while start <= last:
        t = start + tl.arange(0, TILE)
        tile = t[:, None] * SIZE + d[None, :]
        own = (t >= first) & (t <= at)
        seen = (own & (t < behind))[:, None] & in_head
        k = tl.load(kept_keys + tile, mask=seen, other=0.0)
        v = tl.load(kept_values + tile, mask=seen, other=0.0)
        if not USED:
            k, v = tl.where((t == at)[:, None], key, k), tl.where((t == at)[:, None], value, v)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(own[None, :], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))
        shrink = tl.exp(best - higher)
        weights = tl.exp(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        summed = summed * shrink[:, None]
        summed += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        best = higher
        start += SPLITS * TILE
    if not USED:  # noqa: SIM102 (known when compiled, and then `key` exists)
        if (at // TILE) % SPLITS == split:
            tl.store(kept_keys + at * SIZE + d[None, :], key, mask=in_head)
            tl.store(kept_values + at * SIZE + d[None, :], value, mask=in_head)
    both = rows & in_head
    out += row * units * each * SIZE + place + d[None, :]
    unit += row * units
    if SPLITS == 1:
        tl.store(out, _divided(summed, total), mask=both)
    else:
        numbers: tl.constexpr = BLOCK_D + 2
        unit_found = found + unit * SPLITS * BLOCK_Q * numbers
        mine = unit_found + (split * BLOCK_Q + q) * numbers
        tl.store(mine, best)
        tl.store(mine + 1, total)
        tl.store(mine[:, None] + 2 + d[None, :], summed, mask=both)
        tl.debug_barrier()
        if tl.atomic_add(done + unit, 1, sem="acq_rel") == SPLITS - 1:
            tl.debug_barrier()
            best = tl.full([BLOCK_Q], LOWEST, tl.float32)
            total = tl.zeros([BLOCK_Q], tl.float32)
            summed = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
            for other in tl.static_range(SPLITS):
                theirs = unit_found + (other * BLOCK_Q + q) * numbers
                their_best = tl.load(theirs, cache_modifier=".cg")
                higher = tl.maximum(best, their_best)
                shrink, grow = tl.exp(best - higher), tl.exp(their_best - higher)
                total = total * shrink + tl.load(theirs + 1, cache_modifier=".cg") * grow
                part = theirs[:, None] + 2 + d[None, :]
                part = tl.load(part, mask=both, other=0.0, cache_modifier=".cg")
                summed = summed * shrink[:, None] + part * grow[:, None]
                best = higher
            tl.store(out, _divided(summed, total), mask=both)
            tl.store(done + unit, 0)


@triton.jit
def _divided(summed, total):
    """A weighted mean; 0 where nothing was added up."""
    return summed / tl.where(total > 0, total, 1.0)[:, None]


def attend(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    rows: Rows,
    heads: Heads,
    used: UsedHeads | None,
) -> Tensor:
    """See `dipnet.kernels.steps.attend`."""
    batch, size, length = len(rows.padding), heads.size, keys.shape[2]
    units = heads.groups if used is None else used.most
    each = heads.queries // heads.groups if used is None else 1
    splits = max(1, min(MOST_SPLITS, triton.next_power_of_2(length // TILE)))
    block_q, block_d = (max(16, triton.next_power_of_2(number)) for number in (each, size))
    out = qkv.new_empty(batch, units * each * size)
    parts = batch * units * splits * block_q
    found = qkv.new_empty(parts * (block_d + 2), dtype=torch.float32)
    cosines, sines = rotation or (None, None)
    norms = heads.query_norm, heads.key_norm
    _attend[(units, splits, batch)](
        qkv,
        *((used.index, used.queries, _bytes(used.wanted)) if used else (None, None, None)),
        cosines,
        sines,
        *(norm and norm.weight for norm in norms),
        keys,
        values,
        rows.position,
        rows.padding,
        out,
        found,
        counters(qkv, batch * units),
        heads.scale,
        _epsilon(heads),
        length * size,
        qkv.stride(0),
        RING=len(qkv) // batch,
        USED=used is not None,
        QUERIES=heads.queries,
        GROUPS=heads.groups,
        SIZE=size,
        ROTARY=_rotary(rotation),
        NORMED=norms[0] is not None,
        SPLITS=splits,
        TILE=TILE,
        BLOCK_Q=block_q,
        BLOCK_D=block_d,
        num_warps=4,
        **overlapping(qkv.device),
    )
    return out


def _bytes(flags: Tensor | None) -> Tensor | None:
    return None if flags is None else flags.view(torch.uint8)


def _rotary(rotation: tuple[Tensor, Tensor] | None) -> int:
    return 0 if rotation is None else rotation[0].shape[-1]


def _epsilon(heads: Heads) -> float:
    return 0.0 if heads.key_norm is None else heads.key_norm.epsilon


@triton.jit
def _complete(
    made,
    index,
    count,
    queries,
    until,
    cosines,
    sines,
    key_weight,
    keys,
    values,
    position,
    padding,
    epsilon,
    row_stride,
    stride,
    QUERIES: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    ROTARY: tl.constexpr,
    NORMED: tl.constexpr,
    RING: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    d = tl.arange(0, BLOCK_D)[None, :]
    after_previous(OVERLAP)
    row, begin = tl.program_id(1), tl.load(queries)
    number = (tl.load(count) - begin) // 2
    if tl.program_id(0) < number:
        place = begin + tl.program_id(0)
        group, at = tl.load(index + place) - QUERIES, tl.load(position)
        first = tl.load(padding + row)
        until += row * GROUPS + group
        age = tl.arange(0, BLOCK_R)[:, None]
        t = tl.maximum(at - age, first)
        missing = (age < RING) & (at - age > tl.load(until))
        read = made + ((t % RING) * tl.num_programs(1) + row) * row_stride
        key = _finished(
            read + place * SIZE,
            missing,
            t - first,
            cosines,
            sines,
            key_weight,
            epsilon,
            SIZE,
            ROTARY,
            NORMED,
            BLOCK_D,
        )
        both = missing & (d < SIZE)
        value = tl.load(read + (place + number) * SIZE + d, mask=both, other=0.0)
        kept = (row * GROUPS + group).to(tl.int64) * stride + t * SIZE + d
        tl.store(keys + kept, key, mask=both)
        tl.store(values + kept, value, mask=both)
        tl.debug_barrier()
        tl.store(until, at)


def complete(
    made: Tensor,
    used: UsedHeads,
    until: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    rows: Rows,
    heads: Heads,
) -> None:
    """See `dipnet.kernels.steps.complete`."""
    batch, size, norm = len(until), heads.size, heads.key_norm
    ring = len(made) // batch
    _complete[(heads.groups, batch)](
        made,
        used.index,
        used.count,
        used.queries,
        until,
        *(rotation or (None, None)),
        norm and norm.weight,
        keys,
        values,
        rows.position,
        rows.padding,
        _epsilon(heads),
        made.stride(0),
        keys.shape[2] * size,
        QUERIES=heads.queries,
        GROUPS=heads.groups,
        SIZE=size,
        ROTARY=_rotary(rotation),
        NORMED=norm is not None,
        RING=ring,
        BLOCK_R=triton.next_power_of_2(ring),
        BLOCK_D=max(16, triton.next_power_of_2(size)),
        num_warps=4,
        **overlapping(keys.device),
    )
