"""How a product is cut into programs, from measurements on an H200.

`benchmarks/tune_gpu_kernels.py` tries cuts, and prints the tables of columns: those of clusters, or
with --triton those of Triton's programs. For the layers of Llama-3-8B (DIP) and OPT-30B (Deja Vu)
the table has the cuts with which, of those tried, the decode loop was fastest: there other kernels
run before a product and beside it. What is in no table is cut as the product that is nearest: in
weights of a unit, and in kept units.
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


class ClusterTile(NamedTuple):
    """How a cluster of thread blocks cuts a product of input channels (columns.cu): threads side by
    side in a unit (of gate one half, of up the other), parts of the list, threads of a block, units
    that a thread reads at a time, blocks that a multiprocessor holds at least, and words of 4 bytes
    that are read of a unit.
    """

    lanes: int
    parts: int
    threads: int
    reads: int
    resident: int = 1
    words: int = 4


class Cut(NamedTuple):
    """How a selection is cut: blocks of a cluster, threads of a block, scores of a thread."""

    blocks: int
    threads: int
    each: int


MOST_UNITS = 16 * 1024 * 8
"""Units among which a cluster can select."""


def cut_of(units: int) -> Cut:
    """The fastest of those that `benchmarks/tune_gpu_kernels.py` tried; more blocks add more."""
    if units <= 4096:
        return Cut(1, 1024, 4)
    for threads, each in ((512, 4), (1024, 4)):
        blocks = 1 << (-(-units // (threads * each)) - 1).bit_length()
        if blocks <= 8:
            return Cut(blocks, threads, each)
    return Cut(16, 512 if units <= 16 * 512 * 8 else 1024, 8)


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
CLUSTERS = {
    Product(1, 16, 14336, 2048): ClusterTile(32, 8, 256, 4, 4),
    Product(1, 16, 14336, 410): ClusterTile(16, 1, 1024, 4, 1),
    Product(1, 16, 4096, 7168): ClusterTile(8, 2, 1024, 4, 1),
    Product(1, 16, 4096, 3584): ClusterTile(8, 2, 1024, 2, 1),
    Product(1, 16, 4096, 1434): ClusterTile(8, 2, 512, 4, 2),
    Product(1, 16, 4096, 2048): ClusterTile(16, 16, 256, 2, 4),
    Product(1, 16, 6144, 2048): ClusterTile(16, 16, 128, 4, 8),
    Product(1, 16, 7168, 2867): ClusterTile(16, 8, 128, 4, 10),
    Product(1, 16, 7168, 3584): ClusterTile(16, 8, 128, 4, 10),
    Product(1, 16, 17920, 2560): ClusterTile(32, 8, 256, 2, 4),
    Product(1, 16, 17920, 512): ClusterTile(8, 1, 256, 4, 5),
    Product(1, 16, 28672, 3584): ClusterTile(8, 1, 128, 8, 6),
    Product(1, 16, 28672, 717): ClusterTile(8, 1, 128, 8, 6),
    Product(1, 16, 49152, 6144): ClusterTile(16, 1, 256, 8, 3),
    Product(1, 16, 49152, 3072): ClusterTile(16, 1, 512, 2, 2),
    Product(1, 16, 49152, 1229): ClusterTile(16, 2, 256, 2, 6),
    Product(1, 16, 12288, 24576): ClusterTile(8, 2, 512, 2, 3),
    Product(1, 16, 12288, 12288): ClusterTile(8, 2, 512, 2, 3),
    Product(1, 16, 12288, 4915): ClusterTile(8, 2, 512, 2, 3),
    Product(1, 16, 5120, 8960): ClusterTile(16, 8, 512, 2, 3),
    Product(1, 16, 5120, 2560): ClusterTile(16, 8, 512, 2, 3),
    Product(1, 16, 2048, 4096): ClusterTile(8, 16, 256, 2, 4),
    Product(1, 16, 2048, 1024): ClusterTile(8, 8, 128, 8, 6),
    Product(2, 16, 14336, 2048): ClusterTile(64, 4, 512, 4, 2),
    Product(2, 16, 14336, 410): ClusterTile(32, 4, 256, 2, 4),
    Product(2, 16, 8192, 1024): ClusterTile(16, 1, 1024, 4, 1),
    Product(1, 8, 14336, 2048): ClusterTile(32, 8, 256, 8),
    Product(1, 8, 4096, 7168): ClusterTile(8, 16, 128, 4),
    Product(2, 8, 14336, 2048): ClusterTile(64, 4, 512, 8),
    Product(1, 4, 14336, 2048): ClusterTile(16, 8, 256, 4),
    Product(2, 4, 14336, 2048): ClusterTile(64, 16, 256, 4),
    Product(1, 4, 4096, 7168): ClusterTile(8, 2, 1024, 4, words=1),
}
ROWS = {
    Product(1, 16, 4096, 7168): Tile(8, 512, 4),
    Product(1, 16, 4096, 1434): Tile(2, 4096, 8),
    Product(2, 16, 4096, 7168): Tile(4, 256, 2),
    Product(2, 16, 4096, 1434): Tile(1, 1024, 4),
    Product(1, 8, 4096, 7168): Tile(8, 64, 4),
    Product(1, 4, 4096, 7168): Tile(8, 64, 4),
}

_Tile = TypeVar("_Tile", Tile, ColumnsTile, ClusterTile)


def nearest(table: Mapping[Product, _Tile], wanted: Product) -> _Tile:
    """The cut of the product in the table that is most like ``wanted``."""

    def distance(known: Product) -> float:
        sizes = zip(known[2:], wanted[2:], strict=True)
        unlike = 100 * (known.matrices != wanted.matrices) + abs(known.bits - wanted.bits) * 10
        return unlike + sum(abs(math.log(a / max(b, 1))) for a, b in sizes)

    return table[min(table, key=distance)]
