"""What stands between the products of one token, in plain torch: the meaning of the kernels.

Rounded where Hugging Face's modules round, so that masks decided on the results are theirs.
`complete` asks the device for numbers, as no kernel does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dipnet.kernels.gpu.reference import (
    ACTIVATIONS,
    threshold_indices,
    topk_indices,
    union_indices,
)
from dipnet.kernels.steps.shapes import Heads, Norm, Rows, UsedHeads, most_used


def add_norm(
    hidden: Tensor,
    delta: Tensor | None,
    norm: Norm,
    ring: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """See `dipnet.kernels.steps.add_norm`."""
    if delta is not None:
        hidden = hidden + delta
    normed = _normalised(hidden, norm)
    if ring is not None:
        ring[0].index_copy_(0, ring[1], normed[None])
    return hidden, normed


def add_norm_topk(
    hidden: Tensor, delta: Tensor | None, norm: Norm, k: int, factor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dipnet.kernels.steps.add_norm_topk`."""
    summed, normed = add_norm(hidden, delta, norm, None)
    return summed, normed, topk_indices(normed, k, True, factor)


def add_norm_above(
    hidden: Tensor, delta: Tensor | None, norm: Norm, threshold: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `dipnet.kernels.steps.add_norm_above`."""
    summed, normed = add_norm(hidden, delta, norm, None)
    return summed, normed, *threshold_indices(normed, threshold, True)


def gated(pre: Tensor, activation: str) -> Tensor:
    """See `dipnet.kernels.steps.gated`."""
    gate, up = pre.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


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
    batch, at = len(rows.padding), rows.position
    turns = (at - rows.padding)[:, None]
    if used is None:
        asked, rest = qkv.split([heads.queries * heads.size, 2 * heads.groups * heads.size], dim=1)
        k, v = rest.view(batch, 2, heads.groups, 1, heads.size).unbind(1)
        keys.index_copy_(2, at, _finished(k, heads.key_norm, rotation, turns))
        values.index_copy_(2, at, v)
        index = torch.arange(heads.queries, device=qkv.device)
    else:
        last = qkv.view(-1, batch, qkv.shape[1]).index_select(0, at % (len(qkv) // batch))[0]
        asked, index = last[:, : used.most * heads.size], used.index[: used.most].long()
        index = index.clamp(0, heads.queries - 1)
    q = asked.reshape(batch, -1, 1, heads.size)
    q = _finished(q, heads.query_norm, rotation, turns)
    groups = index // (heads.queries // heads.groups)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.matmul(q.to(wide), keys[:, groups].to(wide).mT) * heads.scale
    columns = torch.arange(keys.shape[2], device=keys.device)
    seen = (columns >= rows.padding[:, None]) & (columns <= at)
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    made = torch.matmul(weights, values[:, groups].to(wide)).to(qkv.dtype)
    if used is not None:
        valid = (torch.arange(used.most, device=qkv.device) < used.queries).expand(batch, -1)
        if used.wanted is not None:
            valid = valid & used.wanted[:, index]
        made = torch.where(valid[:, :, None, None], made, 0)
    return made.view(batch, -1)


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
    batch, last, queries = len(until), int(rows.position), int(used.queries)
    by_head = made.view(-1, batch, made.shape[1]).unflatten(2, (-1, heads.size))
    number = (int(used.count) - queries) // 2
    groups = used.index[queries : queries + number].long() - heads.queries
    for row in range(batch):
        for place, group in enumerate(groups.tolist(), queries):
            tokens = torch.arange(int(until[row, group]) + 1, last + 1, device=made.device)
            found = by_head[tokens % len(by_head), row]
            turns = tokens - rows.padding[row]
            keys[row, group, tokens] = _finished(found[:, place], heads.key_norm, rotation, turns)
            values[row, group, tokens] = found[:, place + number]
    until[:, groups] = last


def list_heads(kept: Tensor, turn: Tensor, queries: int, groups: int, ring: int) -> UsedHeads:
    """See `dipnet.kernels.steps.list_heads`."""
    most, length = most_used(kept, queries, groups, ring)
    heads = kept.long()
    wanted = torch.zeros(len(kept), queries, dtype=torch.bool, device=kept.device)
    wanted.scatter_(1, heads, True)
    asked = wanted.any(dim=0)
    needed = torch.arange(groups, device=kept.device) % ring == turn
    needed.index_fill_(0, heads.flatten() // (queries // groups), True)
    index, count = union_indices(torch.cat([asked, needed, needed])[None])
    used = asked.sum(dim=0, keepdim=True, dtype=torch.int32)
    return UsedHeads(index[:length], count, used, most, wanted if len(kept) > 1 else None)


def _finished(
    x: Tensor, norm: Norm | None, rotation: tuple[Tensor, Tensor] | None, positions: Tensor
) -> Tensor:
    """(..., tokens, size) queries or keys as they are compared: normalised and rotated.

    ``positions`` are (tokens,) or (batch, tokens), of x (batch, heads, tokens, size).
    """
    x = x if norm is None else _normalised(x, norm)
    if rotation is None:
        return x
    tables = [table[positions] for table in rotation]
    return _rotated(x, *(table if positions.dim() == 1 else table[:, None] for table in tables))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Hugging Face's rotary embedding of the first channels of (..., tokens, size)."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], dim=-1)


def _normalised(x: Tensor, norm: Norm) -> Tensor:
    if norm.centred:
        return functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.epsilon)
    assert norm.weight is not None
    wide = x.float()  # as Hugging Face does, whatever the dtype
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.epsilon)
    return norm.weight * scaled.to(x.dtype)
