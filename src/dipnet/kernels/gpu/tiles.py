"""How a product is cut into programs, from measurements on an H200.

`benchmarks/tune_gpu_kernels.py` tries cuts, and prints the table of columns. What is in no table is
cut as the product that is nearest: in weights of a unit, and in kept units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, TypeVar


class Tile(NamedTuple):
    """How a product of output rows is cut: units of a program, weights of a unit at a time, warps
    of a program.
    """

    units: int
    weights: int
    warps: int


class ColumnsTile(NamedTuple):
    """How a product of input channels is cut: outputs of a program (words of them, of integers),
    parts that the list is cut into, warps of a program, and units that a thread reads at a time.
    """

    weights: int
    parts: int
    warps: int
    reads: int

    def group(self, size: int) -> int:
        """Units that the threads of a program read side by side, of numbers of ``size`` bytes."""
        return max(1, self.warps * 32 * (16 // size) // self.weights)


class Cut(NamedTuple):
    """How a selection is cut: blocks of a cluster, threads of a block, scores of a thread."""

    blocks: int
    threads: int
    each: int


MOST_UNITS = 8 * 1024 * 16
"""Units among which a cluster can select."""


def cut_of(units: int) -> Cut:
    """The fewest scores a thread, then the fewest blocks."""
    each = 4 if units <= MOST_UNITS // 4 else 8 if units <= MOST_UNITS // 2 else 16
    blocks = -(-units // (1024 * each))
    return Cut(1 << (blocks - 1).bit_length(), 1024, each)


class Product(NamedTuple):
    """What is cut: matrices read together, bits of a weight, weights of a unit, kept units."""

    matrices: int
    bits: int
    width: int
    kept: int


COLUMNS = {
    Product(1, 16, 14336, 2048): ColumnsTile(64, 1, 8, 8),
    Product(1, 16, 14336, 410): ColumnsTile(32, 1, 8, 4),
    Product(1, 16, 4096, 7168): ColumnsTile(64, 4, 8, 8),
    Product(1, 16, 4096, 3584): ColumnsTile(64, 8, 4, 8),
    Product(1, 16, 4096, 1434): ColumnsTile(32, 1, 16, 4),
    Product(1, 16, 49152, 6144): ColumnsTile(64, 1, 8, 8),
    Product(1, 16, 49152, 1229): ColumnsTile(256, 2, 4, 8),
    Product(1, 16, 12288, 24576): ColumnsTile(64, 8, 4, 8),
    Product(1, 16, 12288, 4915): ColumnsTile(64, 2, 4, 8),
    Product(2, 16, 14336, 2048): ColumnsTile(64, 1, 8, 4),
    Product(2, 16, 14336, 410): ColumnsTile(64, 1, 4, 4),
    Product(1, 8, 14336, 2048): ColumnsTile(16, 2, 8, 2),
    Product(1, 8, 4096, 7168): ColumnsTile(16, 8, 8, 2),
    Product(1, 4, 14336, 2048): ColumnsTile(16, 4, 8, 2),
    Product(1, 4, 4096, 7168): ColumnsTile(16, 8, 8, 2),
}
ROWS = {
    Product(1, 16, 4096, 7168): Tile(8, 512, 4),
    Product(1, 16, 4096, 1434): Tile(2, 4096, 8),
    Product(2, 16, 4096, 7168): Tile(4, 256, 2),
    Product(2, 16, 4096, 1434): Tile(1, 1024, 4),
    Product(1, 8, 4096, 7168): Tile(8, 64, 4),
    Product(1, 4, 4096, 7168): Tile(8, 64, 4),
}

_Tile = TypeVar("_Tile", Tile, ColumnsTile)


def nearest(table: Mapping[Product, _Tile], wanted: Product) -> _Tile:
    """The cut of the product in the table that is most like ``wanted``."""

    def distance(known: Product) -> float:
        sizes = zip(known[2:], wanted[2:], strict=True)
        unlike = 100 * (known.matrices != wanted.matrices) + abs(known.bits - wanted.bits) * 10
        return unlike + sum(abs(math.log(a / max(b, 1))) for a, b in sizes)

    return table[min(table, key=distance)]
