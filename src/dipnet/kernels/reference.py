"""The kernels in plain torch: any device and dtype, the meaning that other backends must match.

Nothing here waits for the device, so a call can be captured in a CUDA graph.
"""

import torch
from torch import Tensor
from torch.nn import functional

TILE = 128
GROUP = 32
_LEVEL_BITS = 14
_INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32}


def topk_mask(scores: Tensor, k: int) -> Tensor:
    """Mask of the k highest scores of each row: (..., n) floating -> (..., n) bool, 0 < k < n."""
    keys = _order_keys(scores.detach())
    kth = torch.topk(keys, k, sorted=False).values.amin(-1, keepdim=True)
    above, ties = keys > kth, keys == kth
    quota = k - above.sum(-1, keepdim=True, dtype=torch.int32)
    return above | (ties & (ties.cumsum(-1, dtype=torch.int32) <= quota))


def cache_aware_topk(scores: Tensor, k: int, resident: Tensor, gamma: float) -> Tensor:
    """`topk_mask` with scores times ``gamma`` where ``resident`` is False."""
    return topk_mask(preferred(scores, resident, gamma), k)


def preferred(scores: Tensor, resident: Tensor, gamma: float) -> Tensor:
    """The scores that compete: as they are where ``resident``, else times ``gamma``."""
    scores = scores.detach() if scores.dtype in _INTEGERS else scores.detach().float()
    return torch.where(resident, scores, scores * gamma)


def row_bytes(kind: str, inputs: int) -> int:
    """Bytes of a row: a column's, with inputs for outputs."""
    padded = -(-inputs // TILE) * TILE
    if kind == "bf16":
        return 2 * padded
    multipliers = -(-(padded // GROUP) // 64) * 64
    return (padded // 2 if kind == "int4" else padded) + multipliers


def gather_rows(rows: Tensor, scales: Tensor | None, x: Tensor, mask: Tensor, kind: str) -> Tensor:
    """Products of the kept of (n, stride) ``rows`` with (inputs,) ``x``: (n,) float32.

    Everything up to a group's product is exact, and what is summed are doubles in the order of
    csrc/rows.cpp: the native kernels return these bits.
    """
    values = functional.pad(x.detach().float(), (0, -len(x) % TILE))
    if kind == "bf16":
        weights = rows[:, : 2 * len(values)].clone().view(torch.bfloat16)
        totals = _sum_in_lanes(weights.double() * values.double(), 32)
    else:
        assert scales is not None, "only bf16 has no scales"
        levels, units = _levels(values)
        numbers, multipliers = stored_numbers(rows, len(values), kind)
        sums = (numbers.unflatten(1, (-1, GROUP)) * levels).sum(-1)
        totals = scales.double() * _sum_in_lanes(sums * (multipliers * units), 4)
        totals = torch.where(values.isfinite().all(), totals, torch.nan)
    return torch.where(mask, totals, 0).float()


def _levels(values: Tensor) -> tuple[Tensor, Tensor]:
    """(padded,) float32 -> (groups, 32) integers and (groups,) their units, powers of two."""
    groups = values.nan_to_num(0, 0, 0).view(-1, GROUP)
    exponents = torch.frexp(groups.abs().amax(1)).exponent.clamp(min=-125)  # not of subnormals
    units = ((exponents.long() - _LEVEL_BITS + 1023) << 52).view(torch.float64)
    return (groups.double() / units[:, None]).round().long(), units


def stored_numbers(rows: Tensor, padded: int, kind: str) -> tuple[Tensor, Tensor]:
    """(n, stride) bytes -> (n, padded) integers around 0 and (n, groups) multipliers."""
    size = padded // 2 if kind == "int4" else padded
    multipliers = rows[:, size : size + padded // GROUP].clone().view(torch.int8)
    tiles = rows[:, :size].unflatten(1, (-1, 4, 4, 4))  # tile, L, v, j
    stored = tiles.transpose(2, 3).flatten(1).long()
    if kind == "int8":
        return stored - 128, multipliers
    halves = stored.unflatten(1, (-1, 1, GROUP // 2))
    return torch.cat([halves & 15, halves >> 4], dim=2).flatten(1) - 8, multipliers


def _sum_in_lanes(terms: Tensor, lanes: int) -> Tensor:
    """(n, m) float64 -> (n,): term i is added to lane i % lanes in order, then halves are added."""
    totals = terms.new_zeros(len(terms), lanes)
    for part in terms.unflatten(1, (-1, lanes)).unbind(1):
        totals = totals + part
    while lanes > 1:
        lanes //= 2
        totals = totals[:, :lanes] + totals[:, lanes:]
    return totals[:, 0]


def _order_keys(scores: Tensor) -> Tensor:
    """Integers in the scores' order, NaN highest and both zeros equal: (..., n) -> (..., n)."""
    scores = scores if scores.dtype in _INTEGERS else scores.float()
    integer = _INTEGERS[scores.dtype]
    largest = torch.iinfo(integer).max
    bits = (scores + 0.0).contiguous().view(integer)  # -0.0 + 0.0 is 0.0
    keys = bits ^ ((bits >> (torch.iinfo(integer).bits - 1)) & largest)
    return keys.masked_fill(scores.isnan(), largest)
