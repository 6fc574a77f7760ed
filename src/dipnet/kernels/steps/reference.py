"""What stands between the products of one token, in plain torch: the meaning of the kernels.

Rounded where Hugging Face's modules round, so that masks decided on the results are theirs.
`complete` asks the device for numbers, as no kernel does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from dipnet.kernels.gpu.reference import ACTIVATIONS
from dipnet.kernels.steps.shapes import Heads, Norm


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
        ring[0].index_copy_(0, ring[1], normed)
    return hidden, normed


def gated(pre: Tensor, activation: str) -> Tensor:
    """See `dipnet.kernels.steps.gated`."""
    gate, up = pre.chunk(2, dim=-1)
    return ACTIVATIONS[activation](gate) * up


def attend(
    qkv: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    heads: Heads,
    kept: Tensor | None,
) -> Tensor:
    """See `dipnet.kernels.steps.attend`."""
    if kept is None:
        queries, rest = qkv[0].split([heads.queries * heads.size, 2 * heads.groups * heads.size])
        k, v = rest.view(2, heads.groups, 1, heads.size)
        k = _finished(k, heads.key_norm, rotation, position)
        keys[0].index_copy_(1, position, k)
        values[0].index_copy_(1, position, v)
        used = torch.arange(heads.queries, device=qkv.device)
    else:
        row = qkv.index_select(0, position % len(qkv))[0]
        queries, used = row[: kept.shape[1] * heads.size], kept[0].long()
    q = _finished(queries.view(-1, 1, heads.size), heads.query_norm, rotation, position)
    groups = used // (heads.queries // heads.groups)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = torch.matmul(q.to(wide), keys[0][groups].to(wide).mT) * heads.scale
    seen = torch.arange(keys.shape[2], device=keys.device) <= position
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.matmul(weights, values[0][groups].to(wide)).to(qkv.dtype).view(1, -1)


def complete(
    made: Tensor,
    index: Tensor,
    count: Tensor,
    kept: int,
    until: Tensor,
    rotation: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    position: Tensor,
    heads: Heads,
) -> None:
    """See `dipnet.kernels.steps.complete`."""
    last, by_head = int(position), made.unflatten(1, (-1, heads.size))
    number = (int(count) - kept) // 2
    groups = index[kept : kept + number].long() - heads.queries
    for place, group in enumerate(groups.tolist(), kept):
        tokens = torch.arange(int(until[group]) + 1, last + 1, device=index.device)
        rows = by_head[tokens % len(made)]
        keys[0, group, tokens] = _finished(rows[:, place], heads.key_norm, rotation, tokens)
        values[0, group, tokens] = rows[:, place + number]
    until[groups] = last


def _finished(
    x: Tensor, norm: Norm | None, rotation: tuple[Tensor, Tensor] | None, positions: Tensor
) -> Tensor:
    """(..., tokens, size) queries or keys as they are compared: normalised and rotated."""
    x = x if norm is None else _normalised(x, norm)
    return x if rotation is None else _rotated(x, *(table[positions] for table in rotation))


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
