"""How a product is cut into programs, from measurements on an H200.

`benchmarks/tune_gpu_kernels.py` tries cuts, and prints the tables of the kernels in CUDA C++, or
that of Triton's columns. For the layers of Llama-3-8B (DIP, bfloat16 and int4) and OPT-30B (Deja
Vu) a table has the cuts with which the decode loop is fastest: there other kernels run before a
product and beside it (`benchmarks/tune_gpu_decode.py`). What is in no table is cut as the product
that is nearest: in weights of a unit, and in kept units.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, TypeVar


class TritonRows(NamedTuple):
    """How a product of output rows is cut: units of a program, weights of a unit at a time, warps
    of a program.
    """

    units: int
    weights: int
    warps: int


class TritonColumns(NamedTuple):
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


class CudaColumns(NamedTuple):
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


class CudaRows(NamedTuple):
    """How a product of output rows is cut (rows.cu): threads side by side in a unit, threads of a
    block, units that a thread reads side by side, runs of 16 bytes that it reads of each at a time,
    and blocks that a multiprocessor holds at least.
    """

    lanes: int
    threads: int
    units: int
    reads: int
    resident: int = 1


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


TRITON_COLUMNS = {
    Product(1, 16, 14336, 2048): TritonColumns(64, 1, 8, 8),
    Product(1, 16, 14336, 410): TritonColumns(32, 1, 8, 4),
    Product(1, 16, 4096, 7168): TritonColumns(64, 4, 8, 8),
    Product(1, 16, 4096, 3584): TritonColumns(64, 8, 4, 8),
    Product(1, 16, 4096, 1434): TritonColumns(32, 1, 16, 4),
    Product(1, 16, 49152, 6144): TritonColumns(64, 1, 8, 8),
    Product(1, 16, 49152, 1229): TritonColumns(256, 2, 4, 8),
    Product(1, 16, 12288, 24576): TritonColumns(64, 8, 4, 8),
    Product(1, 16, 12288, 4915): TritonColumns(64, 2, 4, 8),
    Product(2, 16, 14336, 2048): TritonColumns(64, 1, 8, 4),
    Product(2, 16, 14336, 410): TritonColumns(64, 1, 4, 4),
    Product(1, 8, 14336, 2048): TritonColumns(16, 2, 8, 2),
    Product(1, 8, 4096, 7168): TritonColumns(16, 8, 8, 2),
    Product(1, 4, 14336, 2048): TritonColumns(16, 4, 8, 2),
    Product(1, 4, 4096, 7168): TritonColumns(16, 8, 8, 2),
}
CUDA_COLUMNS = {
    Product(1, 16, 14336, 2048): CudaColumns(32, 8, 256, 4, 4),
    Product(1, 16, 14336, 410): CudaColumns(16, 1, 1024, 4, 1),
    Product(1, 16, 4096, 7168): CudaColumns(8, 2, 1024, 4, 1),
    Product(1, 16, 4096, 3584): CudaColumns(8, 2, 1024, 2, 1),
    Product(1, 16, 4096, 1434): CudaColumns(8, 2, 512, 4, 2),
    Product(1, 16, 4096, 2048): CudaColumns(8, 8, 256, 4, 5),
    Product(1, 16, 6144, 2048): CudaColumns(16, 16, 128, 4, 8),
    Product(1, 16, 7168, 2867): CudaColumns(8, 4, 256, 4, 4),
    Product(1, 16, 7168, 3584): CudaColumns(16, 8, 128, 4, 10),
    Product(1, 16, 17920, 2560): CudaColumns(32, 8, 256, 2, 4),
    Product(1, 16, 17920, 512): CudaColumns(8, 1, 256, 4, 5),
    Product(1, 16, 28672, 3584): CudaColumns(8, 1, 128, 8, 6),
    Product(1, 16, 28672, 717): CudaColumns(8, 1, 128, 8, 6),
    Product(1, 16, 49152, 6144): CudaColumns(16, 1, 256, 8, 3),
    Product(1, 16, 49152, 3072): CudaColumns(16, 1, 512, 2, 2),
    Product(1, 16, 49152, 1229): CudaColumns(16, 2, 256, 2, 6),
    Product(1, 16, 12288, 24576): CudaColumns(8, 2, 512, 2, 3),
    Product(1, 16, 12288, 12288): CudaColumns(8, 2, 512, 2, 3),
    Product(1, 16, 12288, 4915): CudaColumns(8, 2, 512, 2, 3),
    Product(1, 16, 5120, 8960): CudaColumns(16, 8, 512, 2, 3),
    Product(1, 16, 5120, 2560): CudaColumns(16, 8, 512, 2, 3),
    Product(1, 16, 2048, 4096): CudaColumns(8, 16, 256, 2, 4),
    Product(1, 16, 2048, 1024): CudaColumns(8, 8, 128, 8, 6),
    Product(2, 16, 14336, 2048): CudaColumns(64, 4, 512, 4, 2),
    Product(2, 16, 14336, 410): CudaColumns(32, 4, 256, 2, 4),
    Product(2, 16, 8192, 1024): CudaColumns(16, 1, 1024, 4, 1),
    Product(1, 8, 14336, 2048): CudaColumns(32, 8, 256, 8, 1),
    Product(1, 8, 4096, 7168): CudaColumns(8, 16, 128, 4, 4),
    Product(2, 8, 14336, 2048): CudaColumns(32, 4, 512, 2, 2),
    Product(1, 4, 14336, 2048): CudaColumns(8, 4, 256, 8, 2),
    Product(2, 4, 14336, 2048): CudaColumns(16, 4, 256, 8, 2),
    Product(1, 4, 4096, 7168): CudaColumns(8, 16, 256, 2, 3),
    Product(1, 4, 4096, 2048): CudaColumns(16, 16, 256, 4, 3, 2),
    Product(1, 4, 6144, 2048): CudaColumns(8, 8, 256, 8, 2),
    Product(1, 4, 28672, 2048): CudaColumns(16, 4, 256, 4, 2),
    Product(1, 4, 128256, 4096): CudaColumns(16, 1, 256, 8, 2),
}
TRITON_ROWS = {
    Product(1, 16, 4096, 7168): TritonRows(8, 512, 4),
    Product(1, 16, 4096, 1434): TritonRows(2, 4096, 8),
    Product(2, 16, 4096, 7168): TritonRows(4, 256, 2),
    Product(2, 16, 4096, 1434): TritonRows(1, 1024, 4),
    Product(1, 8, 4096, 7168): TritonRows(8, 64, 4),
    Product(1, 4, 4096, 7168): TritonRows(8, 64, 4),
}

CUDA_ROWS = {
    Product(1, 16, 4096, 7168): CudaRows(128, 128, 1, 4, 10),
    Product(1, 16, 4096, 3584): CudaRows(128, 128, 1, 4, 8),
    Product(1, 16, 4096, 1434): CudaRows(128, 256, 2, 4, 3),
    Product(1, 16, 14336, 2048): CudaRows(128, 512, 4, 2, 1),
    Product(1, 16, 14336, 1024): CudaRows(256, 512, 2, 2, 2),
    Product(1, 16, 14336, 410): CudaRows(256, 256, 2, 4, 3),
    Product(1, 16, 5120, 8960): CudaRows(128, 128, 4, 1, 10),
    Product(1, 16, 5120, 1792): CudaRows(256, 256, 2, 4, 3),
    Product(1, 16, 17920, 2560): CudaRows(256, 256, 4, 1, 5),
    Product(1, 16, 17920, 512): CudaRows(256, 256, 1, 4, 4),
    Product(1, 16, 7168, 14336): CudaRows(256, 256, 2, 4, 3),
    Product(1, 16, 7168, 2867): CudaRows(256, 256, 2, 4, 3),
    Product(1, 16, 7168, 1000): CudaRows(256, 512, 2, 2, 2),
    Product(1, 16, 1000, 28672): CudaRows(32, 128, 2, 4, 6),
    Product(1, 16, 28672, 3584): CudaRows(128, 128, 1, 4, 10),
    Product(1, 16, 28672, 717): CudaRows(256, 256, 1, 2, 4),
    Product(1, 16, 12288, 24576): CudaRows(128, 128, 1, 4, 8),
    Product(1, 16, 12288, 4915): CudaRows(128, 128, 2, 4, 6),
    Product(1, 16, 49152, 6144): CudaRows(256, 256, 2, 4, 3),
    Product(1, 16, 49152, 1229): CudaRows(128, 128, 1, 4, 10),
    Product(2, 16, 4096, 7168): CudaRows(256, 256, 2, 1, 4),
    Product(2, 16, 4096, 1434): CudaRows(128, 128, 1, 1, 12),
}

_Tile = TypeVar("_Tile", TritonRows, TritonColumns, CudaColumns, CudaRows)


def nearest(table: Mapping[Product, _Tile], wanted: Product) -> _Tile:
    """The cut of the product in the table that is most like ``wanted``.

    Float32 weights are in no table: a unit of them is cut as a 16-bit one of as many bytes.
    """
    if wanted.bits == 32:
        wanted = wanted._replace(bits=16, width=2 * wanted.width)

    def distance(known: Product) -> float:
        sizes = zip(known[2:], wanted[2:], strict=True)
        unlike = 100 * (known.matrices != wanted.matrices) + abs(known.bits - wanted.bits) * 10
        return unlike + sum(abs(math.log(a / max(b, 1))) for a, b in sizes)

    return table[min(table, key=distance)]
