"""What a packing will write, and where in the checkpoint each part of it is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dipnet.errors import InputError
from dipnet.methods.allocation import Allocation
from dipnet.models.families import Decoder, context_length
from dipnet.models.load import empty_model, load_config
from dipnet.pack.checkpoint import Checkpoint
from dipnet.pack.names import Part, TensorNames
from dipnet.pack.rest import Rest
from dipnet.store.geometry import (
    GROUP_ALIGNMENT,
    Unit,
    Weights,
    column_stride,
    padded_outputs,
    record_bytes,
    round_up,
)
from dipnet.store.index import LAYER_GROUPS, MATRICES, VERSIONS, Group, GroupName, Index
from dipnet.units import ModelSpec

Block = int | Literal["auto"]
BLOCKS = (1, 2)
"""What ``auto`` chooses from: two neurons cost 7 % of perplexity and save a quarter of the time;
each doubling beyond that costs more than it saves (docs/results.md)."""
WORTHWHILE_RECORD = 3584
"""Bytes of a record that ``auto`` asks for: of smaller ones, two make no worthwhile read either."""


@dataclass(frozen=True)
class Plan:
    """A store as it will be. ``parts`` belong to the index's groups, one for each matrix.

    ``orders`` are the permuted layers' neurons, (neurons,) int64; the index lacks its checksum of
    the rest, which is not known before that is written.
    """

    checkpoint: Checkpoint
    index: Index
    parts: tuple[tuple[Part, ...], ...]
    rest: Rest
    orders: Mapping[int, Tensor]


def make_plan(
    source: str,
    weights: Weights,
    block: Block,
    unit: Unit,
    orders: Mapping[int, Tensor],
    allocation: Allocation | None,
) -> Plan:
    """The plan of packing ``source``; InputError when it is no checkpoint that can be packed, or
    the allocation is another model's.
    """
    if unit == "neuron":
        _check_single(block, orders, allocation)
    config = load_config(source)
    checkpoint = Checkpoint(source)
    decoder = Decoder(empty_model(config))
    names = TensorNames(decoder, checkpoint)
    groups = groups_of(decoder, names.head_shape, weights, block, unit)
    parts = tuple(names.parts(group) for group in groups)
    scales = [] if weights == "bf16" else [(g.scale_name, g.units * g.columns) for g in groups]
    rest = Rest(scales, names.rest())
    spec = decoder.spec
    _check_orders(orders, spec)
    if allocation is not None:
        allocation.check_model(spec)
    index = Index(
        version=VERSIONS[unit],
        weights=weights,
        family=spec.family,
        activation=spec.activation,
        layers=spec.layers,
        context=context_length(decoder.model),
        source=source,
        neurons_permuted=bool(orders),
        records_bytes=groups[-1].end,
        rest_bytes=rest.size,
        rest_sha256="0" * 64,
        allocation_sha256=None if allocation is None else _sha256(allocation.text),
        groups=tuple(groups),
    )
    return Plan(checkpoint, index, parts, rest, orders)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_single(
    block: Block, orders: Mapping[int, Tensor], allocation: Allocation | None
) -> None:
    """Whole neurons are records of their own: nothing is gained from neighbours."""
    if block not in ("auto", 1):
        raise InputError(
            f"a record of a whole neuron holds one: leave out block {block}, or pack columns"
        )
    if orders:
        raise InputError(
            "the order of whole neurons has no effect: leave out the permutation, or pack columns"
        )
    if allocation is not None:
        raise InputError(
            "an allocation divides densities of columns: leave it out, or pack columns"
        )


def _check_orders(orders: Mapping[int, Tensor], spec: ModelSpec) -> None:
    neurons = torch.arange(spec.matrices["down"][1])
    for layer, order in orders.items():
        if not 0 <= layer < spec.layers:
            raise InputError(f"the permutation is of layer {layer}: there is no layer {layer}")
        if order.shape != neurons.shape or not torch.equal(order.sort().values, neurons):
            raise InputError(
                f"the permutation of layer {layer} must hold every neuron once, each number from 0 "
                f"to {len(neurons) - 1}"
            )


def automatic_block(weights: Weights, outputs: int, channels: int) -> int:
    """The smallest block that makes a worthwhile record, 1 where even the largest does not."""
    stride = column_stride(weights, padded_outputs(outputs))
    for block in BLOCKS:
        if record_bytes(stride, block) >= WORTHWHILE_RECORD and channels % block == 0:
            return block
    return 1


def groups_of(
    decoder: Decoder, head: tuple[int, ...], weights: Weights, block: Block, unit: Unit
) -> list[Group]:
    """The groups of a store of a model whose head is (vocabulary, width)."""
    shapes = decoder.spec.matrices
    groups: list[Group] = []
    for layer in range(decoder.spec.layers):
        for name in LAYER_GROUPS[unit]:
            held = [m for m in MATRICES[name][0] if m in shapes]
            matrices = {matrix: shapes[matrix][0] for matrix in held}
            channels = shapes[held[-1]][1]
            size = 1
            if name == "mlp.hidden":
                size = chosen_block(weights, block, matrices["down"], channels)
            groups.append(_group(weights, layer, name, matrices, channels, size, groups))
    groups.append(_group(weights, None, "head", {"head": head[0]}, head[1], 1, groups))
    return groups


def _group(
    weights: Weights,
    layer: int | None,
    name: GroupName,
    matrices: dict[str, int],
    channels: int,
    block: int,
    before: list[Group],
) -> Group:
    neuron = name == "mlp.neuron"
    outputs = padded_outputs(matrices["down"] if neuron else sum(matrices.values()))
    stride = column_stride(weights, outputs)
    return Group(
        layer=layer,
        name=name,
        matrices=matrices,
        channels=channels,
        block=block,
        outputs=outputs,
        stride=stride,
        record_bytes=record_bytes(stride, len(matrices) if neuron else block),
        offset=round_up(before[-1].end, GROUP_ALIGNMENT) if before else 0,
    )


def chosen_block(weights: Weights, block: Block, outputs: int, neurons: int) -> int:
    """The neurons of a record; InputError when a given ``block`` does not divide them."""
    if block == "auto":
        return automatic_block(weights, outputs, neurons)
    if neurons % block:
        fitting = ", ".join(str(size) for size in (1, 2, 4, 8, 16) if neurons % size == 0)
        raise InputError(
            f"--block {block} does not divide the {neurons} neurons of a layer: use auto or one of "
            f"{fitting}"
        )
    return block
