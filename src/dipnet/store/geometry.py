"""Sizes of what lies in a store: columns, records and where they may begin.

The one place that knows them; docs/store-format.md explains them.
"""

from __future__ import annotations

from typing import Literal, get_args

Weights = Literal["int4", "int8", "bf16"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
Unit = Literal["column", "neuron"]
"""What a record of the MLP holds: columns of input channels, or neurons whole."""
UNITS: tuple[Unit, ...] = get_args(Unit)

TILE = 128
"""A group's outputs are padded to a multiple of this, so that no kernel has a remainder."""
SCALED_TOGETHER = 32
"""Neighbouring outputs of a column that share one int8 multiplier."""
COLUMN_ALIGNMENT = 64
"""Columns begin at multiples of a cache line inside their record."""
SECTOR = 512
"""Records are whole sectors, so that they can be read past the page cache."""
GROUP_ALIGNMENT = 4096
CHECKSUM_BYTES = 8
MAX_CHANNELS = 65536
"""Of a group of integer weights: so many products of 255 and 127 still add up in 32 bits."""


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``size``."""
    return -(-size // multiple) * multiple


def padded_outputs(outputs: int) -> int:
    """A group's outputs with the zero rows that fill its last tile."""
    return round_up(outputs, TILE)


def weight_bytes(weights: Weights, outputs: int) -> int:
    """Bytes of a column's weights alone, for padded ``outputs``."""
    return {"int4": outputs // 2, "int8": outputs, "bf16": 2 * outputs}[weights]


def multiplier_bytes(weights: Weights, outputs: int) -> int:
    """Bytes of a column's int8 multipliers, which follow its weights."""
    return 0 if weights == "bf16" else outputs // SCALED_TOGETHER


def column_stride(weights: Weights, outputs: int) -> int:
    """Bytes from one column of a record to the next, for padded ``outputs``."""
    used = weight_bytes(weights, outputs) + multiplier_bytes(weights, outputs)
    return round_up(used, COLUMN_ALIGNMENT)


def record_bytes(stride: int, columns: int) -> int:
    """Bytes of a record: its columns (a neuron's rows among them), padding, and the checksum."""
    return round_up(columns * stride + CHECKSUM_BYTES, SECTOR)
