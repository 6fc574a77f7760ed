"""Records of a group from slabs of its matrices: read, order, quantise, sum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dipnet.errors import InputError
from dipnet.pack.plan import Plan
from dipnet.store.checksum import seal
from dipnet.store.columns import encode
from dipnet.store.index import Group

SLAB_WEIGHTS = 8 << 20
"""Weights that a worker holds: 16 MB in bf16, twice that while matrices are joined."""


@dataclass(frozen=True)
class Slab:
    """Some units of a group that are packed at a time."""

    group: int
    first: int
    units: int


@dataclass(frozen=True)
class Packed:
    """A slab's records, (units, record_bytes) uint8, and the scales of their columns."""

    slab: Slab
    records: NDArray[np.uint8]
    scales: Tensor | None


def slabs(groups: tuple[Group, ...]) -> Iterator[Slab]:
    """All slabs of a store, in the order of the file; always the same for the same groups."""
    for number, group in enumerate(groups):
        step = max(1, SLAB_WEIGHTS // group.outputs // group.columns)
        for first in range(0, group.units, step):
            yield Slab(number, first, min(step, group.units - first))


def pack_slab(plan: Plan, slab: Slab) -> Packed:
    """The records of a slab; InputError when a weight is NaN or infinite."""
    group = plan.index.groups[slab.group]
    channels = slice(slab.first * group.block, (slab.first + slab.units) * group.block)
    make = _neurons if group.input_rows else _columns
    try:
        columns, scales = make(plan, slab.group, channels)
    except InputError as error:
        raise InputError(f"{group.label} of {plan.index.source!r}: {error}") from None
    records = np.zeros((slab.units, group.record_bytes), dtype=np.uint8)
    records[:, : group.columns * group.stride] = columns.numpy().reshape(slab.units, -1)
    seal(records, group=slab.group, first_unit=slab.first)
    return Packed(slab, records, scales)


def _columns(plan: Plan, number: int, channels: slice) -> tuple[Tensor, Tensor | None]:
    """Some channels' (channels, stride) columns and their scales."""
    return encode(_weights(plan, number, channels), plan.index.weights)


def _neurons(plan: Plan, number: int, neurons: slice) -> tuple[Tensor, Tensor | None]:
    """Some neurons' rows of the matrices before down, and their columns of it.

    (neurons, matrices, stride) uint8 and (neurons, matrices) scales.
    """
    made = []
    for part in plan.parts[number][:-1]:
        rows = slice(part.rows.start + neurons.start, part.rows.start + neurons.stop)
        weights = plan.checkpoint.read(part.tensor, rows).T.contiguous()
        made.append(encode(weights, plan.index.weights))
    down = plan.parts[number][-1]
    weights = plan.checkpoint.read(down.tensor, down.rows, neurons)
    made.append(encode(weights, plan.index.weights))
    scales = [scale for _, scale in made if scale is not None]
    stacked = torch.stack([columns for columns, _ in made], dim=1)
    return stacked, torch.stack(scales, dim=1) if scales else None


def _weights(plan: Plan, number: int, channels: slice) -> Tensor:
    """The (outputs, channels) weights of some channels of a group, neurons in their new order."""
    group, order = plan.index.groups[number], None
    if group.layer is not None:
        order = plan.orders.get(group.layer)
    columns = order[channels] if order is not None and group.name == "mlp.hidden" else channels
    parts = []
    for part in plan.parts[number]:
        weights = plan.checkpoint.read(part.tensor, part.rows, columns)
        if order is not None and group.name == "mlp.in":
            weights = weights[order]
        parts.append(weights)
    return parts[0] if len(parts) == 1 else torch.cat(parts)
