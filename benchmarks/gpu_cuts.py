"""Which cuts of the GPU's products are tried, of which products: what the tuning commands share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gpu_timing import DEVICE
from torch import Tensor

from dipnet.kernels.gpu.columns import columns
from dipnet.kernels.gpu.cuda_columns import cuda_columns
from dipnet.kernels.gpu.cuda_rows import cuda_rows
from dipnet.kernels.gpu.integers import integer_columns
from dipnet.kernels.gpu.tiles import (
    CUDA_COLUMNS,
    CUDA_ROWS,
    TRITON_COLUMNS,
    CudaColumns,
    CudaRows,
    Product,
    TritonColumns,
)
from dipnet.kernels.gpu.weights import Weight

RESIDENT = {2: (1536, 1024), 4: (1280, 1024), 8: (1024, 768)}
"""Threads on a multiprocessor, where each reads so many runs of 16 bytes at a time: with more of
them fewer registers are left to each, and some of its reads wait for others."""
MOST_SHARED = 32768
"""Bytes of shared memory that a block of columns takes at most."""
IN_FLIGHT = 2**21
"""Bytes that are on their way at a time at least, where all blocks run."""

Cutting = TritonColumns | CudaColumns | CudaRows
COLUMNS = {
    Product(1, 16, 14336, 2048): 4096,
    Product(1, 16, 14336, 410): 4096,
    Product(1, 16, 4096, 7168): 14336,
    Product(1, 16, 4096, 1434): 14336,
    Product(1, 16, 4096, 2048): 4096,
    Product(1, 16, 5120, 8960): 17920,
    Product(1, 16, 5120, 2560): 5120,
    Product(1, 16, 2048, 4096): 8192,
    Product(1, 16, 2048, 1024): 2048,
    Product(1, 16, 4096, 3584): 14336,
    Product(1, 16, 6144, 2048): 4096,
    Product(1, 16, 7168, 2867): 28672,
    Product(1, 16, 7168, 3584): 7168,
    Product(1, 16, 49152, 6144): 12288,
    Product(1, 16, 49152, 3072): 12288,
    Product(1, 16, 49152, 1229): 12288,
    Product(1, 16, 12288, 24576): 49152,
    Product(1, 16, 12288, 12288): 49152,
    Product(1, 16, 12288, 4915): 49152,
    Product(1, 16, 17920, 2560): 5120,
    Product(1, 16, 17920, 512): 5120,
    Product(1, 16, 28672, 3584): 7168,
    Product(1, 16, 28672, 717): 7168,
    Product(2, 16, 14336, 2048): 4096,
    Product(2, 16, 14336, 410): 4096,
    Product(2, 16, 8192, 1024): 2048,
    Product(1, 8, 14336, 2048): 4096,
    Product(1, 8, 4096, 7168): 14336,
    Product(2, 8, 14336, 2048): 4096,
    Product(1, 4, 14336, 2048): 4096,
    Product(2, 4, 14336, 2048): 4096,
    Product(1, 4, 4096, 7168): 14336,
    Product(1, 4, 4096, 2048): 4096,
    Product(1, 4, 6144, 2048): 4096,
    Product(1, 4, 28672, 2048): 4096,
    Product(1, 4, 128256, 4096): 4096,
}
"""The products of columns that are tuned, and the input channels of each."""
ROWS = {
    Product(1, 16, 4096, 7168): 14336,
    Product(1, 16, 4096, 3584): 14336,
    Product(1, 16, 4096, 1434): 14336,
    Product(1, 16, 14336, 2048): 4096,
    Product(1, 16, 14336, 1024): 4096,
    Product(1, 16, 14336, 410): 4096,
    Product(1, 16, 5120, 8960): 17920,
    Product(1, 16, 5120, 1792): 17920,
    Product(1, 16, 17920, 2560): 5120,
    Product(1, 16, 17920, 512): 5120,
    Product(1, 16, 7168, 14336): 28672,
    Product(1, 16, 7168, 2867): 28672,
    Product(1, 16, 7168, 1000): 1000,
    Product(1, 16, 1000, 28672): 28672,
    Product(1, 16, 28672, 3584): 7168,
    Product(1, 16, 28672, 717): 7168,
    Product(1, 16, 12288, 24576): 49152,
    Product(1, 16, 12288, 4915): 49152,
    Product(1, 16, 49152, 6144): 12288,
    Product(1, 16, 49152, 1229): 12288,
    Product(2, 16, 4096, 7168): 14336,
    Product(2, 16, 4096, 1434): 14336,
}
"""The products of rows that are tuned, and the outputs among which each keeps some."""


def multiprocessors() -> int:
    """Of this GPU."""
    return torch.cuda.get_device_properties(DEVICE).multi_processor_count


def triton_columns(product: Product) -> Iterator[TritonColumns]:
    """Enough programs for the GPU, and work for each of their threads."""
    integer = product.bits < 16
    sizes = (8, 16) if integer else (32, 64, 128)
    reads = (2, 4) if integer or product.matrices == 2 else (4, 8)
    width = product.width * product.bits // 32 if integer else product.width
    for weights, parts, warps, ahead in itertools.product(sizes, (1, 2, 4, 8), (4, 8), reads):
        tile = TritonColumns(weights, parts, warps, ahead)
        programs = -(-width // weights) * parts
        units = ahead * tile.group(4 if integer else 2)
        if programs >= multiprocessors() / 2 and product.kept / parts >= units / 2:
            yield tile


def of_columns(product: Product) -> Iterator[CudaColumns]:
    """Between half a block and sixteen for each multiprocessor."""
    words = {16: (4,), 8: (2, 4), 4: (1, 2, 4)}[product.bits]
    sizes = (8, 16, 32, 64), (1, 2, 4, 8, 16), (128, 256, 512, 1024), (2, 4, 8), words
    for lanes, parts, threads, reads, each in itertools.product(*sizes):
        bits = 32 * each
        outputs = lanes // product.matrices * bits // product.bits
        blocks = -(-product.width // outputs) * parts
        filled = product.kept / parts >= threads / lanes * reads / 2
        fits = threads * bits // product.bits * 4 <= MOST_SHARED
        flying = threads * each * 4 * reads * blocks
        busy = multiprocessors() / 2 <= blocks <= 16 * multiprocessors() and flying >= IN_FLIGHT
        if busy and filled and fits:
            held = RESIDENT[reads] if product.bits == 16 else of_integers(reads, each, product.bits)
            for resident in {max(1, most // threads) for most in held}:
                yield CudaColumns(lanes, parts, threads, reads, resident, each)


def of_integers(reads: int, words: int, bits: int) -> tuple[int, ...]:
    """As RESIDENT: registers are wanted for what is read, multipliers and the sums of outputs."""
    registers = reads * (words + 4) + words * (32 // bits + 1) + 20
    return tuple(most for most in (512, 768, 1024, 1536) if most * registers < 65536)


def of_rows(product: Product) -> Iterator[CudaRows]:
    """Threads that all have something to read, and no more than eight runs at a time."""
    runs = product.width * product.bits // 128
    sizes = (8, 16, 32, 64, 128, 256), (64, 128, 256, 512), (1, 2, 4), (1, 2, 4, 8)
    for lanes, threads, units, reads in itertools.product(*sizes):
        at_once = units * reads * product.matrices
        blocks = -(-product.kept // max(1, threads // lanes * units))
        fits = lanes <= threads and lanes * reads < 2 * runs and at_once in RESIDENT
        if fits and blocks >= multiprocessors() / 2:
            for resident in {most // threads for most in RESIDENT[at_once]}:
                yield CudaRows(lanes, threads, units, reads, resident)


def run_triton_columns(
    x: Tensor, index: Tensor, weights: tuple[Weight, ...], tile: TritonColumns
) -> Tensor:
    if weights[0].bits < 16:
        return integer_columns(x, index, weights, tile)
    data = tuple(weight.data for weight in weights)
    return columns(x, index, data, weights[0].width, tile, activation="silu")


def run_columns(x: Tensor, index: Tensor, weights: tuple[Weight, ...], tile: CudaColumns) -> Tensor:
    return cuda_columns(x, index, weights, tile, activation="silu")


def run_rows(x: Tensor, index: Tensor, weights: tuple[Weight, ...], tile: CudaRows) -> Tensor:
    return cuda_rows(x, index, weights, tile, x.dtype, activation="silu")


@dataclass(frozen=True)
class Kernel:
    """Whose cuts are tuned: ``table`` has those in use, ``units`` the products that are tuned, with
    the units among which each keeps some, and ``candidates`` the cuts of one that are tried.
    Units of ``by_output`` are outputs, else input channels. Triton's kernels are compiled ahead by
    processes (``triton``).
    """

    table_name: str
    table: Mapping[Product, Cutting]
    units: Mapping[Product, int]
    candidates: Callable[[Product], Iterator[Cutting]]
    run: Callable[[Tensor, Tensor, tuple[Weight, ...], Any], Tensor]
    by_output: bool = False
    triton: bool = False

    def inputs(self, product: Product, units: int) -> int:
        """Numbers of x."""
        return product.width if self.by_output else units


KERNELS = {
    "columns": Kernel("CUDA_COLUMNS", CUDA_COLUMNS, COLUMNS, of_columns, run_columns),
    "rows": Kernel("CUDA_ROWS", CUDA_ROWS, ROWS, of_rows, run_rows, by_output=True),
    "triton-columns": Kernel(
        "TRITON_COLUMNS",
        TRITON_COLUMNS,
        COLUMNS,
        triton_columns,
        run_triton_columns,
        triton=True,
    ),
}
