"""The fastest cut of each product of kernels/gpu/tiles.py on this GPU, among many.

    python benchmarks/tune_gpu_kernels.py [--kernel rows] [--seconds S] [--jobs N]
    python benchmarks/tune_gpu_kernels.py --only "(1, 16, 4096, 3584)" --seconds 25

Prints the best cuts of selections, then tables of that file: of columns and rows in CUDA C++, or
those of the kernels that are named. Ends with one JSON line. `--seconds` is the limit for timing
one product; what was not tried is left out, and said. The cut of the table comes first. With
`--only` no selection and no other product is tuned, and the fastest cuts are listed. Triton's
kernels are compiled by N processes before, those in CUDA C++ in threads.
"""

from __future__ import annotations

import argparse
import itertools
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from gpu_cuts import KERNELS, Cutting, Kernel
from gpu_timing import DEVICE, LISTS, graph_us, in_turn, lists, need_gpu, stored_in_turn
from timing import json_line
from torch import Tensor

from dipnet.errors import BackendError
from dipnet.kernels.gpu.selection import select
from dipnet.kernels.gpu.tiles import Cut, Product
from dipnet.kernels.gpu.weights import Weight
from dipnet.kernels.reference import row_bytes

LISTED = 8
"""Cuts of a product that are listed with --only."""
UNITS = (4096, 7168, 14336, 28672, 49152)
"""Units among which a selection is tuned."""


def matrices(product: Product, units: int, dtype: torch.dtype) -> list[Weight]:
    """Random weights, taken in turn."""
    if product.bits == 16:
        shape = units, product.width
        made = in_turn(lambda: torch.empty(shape, device=DEVICE, dtype=dtype).normal_())
        return [Weight.of(data) for data in made]
    return stored_in_turn(f"int{product.bits}", units, product.width)


def caller(
    kernel: Kernel, product: Product, x: Tensor, index: list[Tensor], weights: list[Weight]
) -> Callable[[int, Cutting], Tensor]:
    """The product with the i-th list and the i-th weights, cut as said."""

    def run(i: int, tile: Cutting) -> Tensor:
        first = i * product.matrices
        used = tuple(weights[(first + j) % len(weights)] for j in range(product.matrices))
        return kernel.run(x, index[i % LISTS], used, tile)

    return run


def tuned(
    kernel: Kernel, product: Product, seconds: float, dtype: torch.dtype = torch.float16
) -> list[tuple[float, Cutting]]:
    """Microseconds of each cut that was tried, the fastest first."""
    units = kernel.units[product]
    weights, index = matrices(product, units, dtype), lists(units, product.kept)
    x = torch.randn(1, kernel.inputs(product, units), device=DEVICE, dtype=dtype)
    run, found = caller(kernel, product, x, index, weights), []
    others = list(kernel.candidates(product))
    random.Random(0).shuffle(others)
    first = kernel.table.get(product)
    tried = list(dict.fromkeys([first, *others] if first else others))
    if not kernel.triton:
        compile_side_by_side(run, tried)
    end = time.monotonic() + seconds
    for at, tile in enumerate(tried):
        if time.monotonic() > end:
            print(f"# {product}: {len(tried) - at} of {len(tried)} cuts were not tried")
            break
        try:
            us = graph_us(lambda i, tile=tile: run(i, tile), max(4, len(weights)))
        except BackendError as error:
            print(f"# {tile} of {product} is none for this GPU: {error}")
            continue
        found.append((us, tile))
    return sorted(found)


def compile_side_by_side(run: Callable[[int, Cutting], Tensor], tiles: list[Cutting]) -> None:
    """Compile what cuts need, in threads; one that is none for this GPU says so when timed."""
    with ThreadPoolExecutor() as pool:
        made = [pool.submit(run, 0, tile) for tile in tiles]
    for error in filter(None, (each.exception() for each in made)):
        if not isinstance(error, BackendError):
            raise error


def tuned_cuts(units: int) -> list[tuple[float, Cut]]:
    """Microseconds of each cut of a selection of half of the units, the fastest first."""
    scores = [torch.randn(1, units, device=DEVICE, dtype=torch.float16) for _ in range(4)]
    index, found = torch.empty(1, units // 2, device=DEVICE, dtype=torch.int32), []
    for cut in map(Cut._make, itertools.product((1, 2, 4, 8, 16), (256, 512, 1024), (4, 8))):
        if units <= cut.blocks * cut.threads * cut.each < 4 * units:

            def run(i: int, cut: Cut = cut) -> None:
                select(cut, scores[i % 4], True, index=index, k=units // 2)

            found.append((graph_us(run, 40), cut))
    return sorted(found)


def compile_share(job: int, jobs: int) -> None:
    """Compile every jobs-th of Triton's kernels, for the processes that come after."""
    x = torch.randn(1, 64, device=DEVICE, dtype=torch.float16)
    index = torch.arange(16, device=DEVICE, dtype=torch.int32)[None]
    kernel = KERNELS["triton-columns"]
    for product in kinds():
        weights = [matrix(product) for _ in range(product.matrices)]
        run = caller(kernel, product._replace(width=4096), x, [index] * LISTS, weights)
        for tile in list(kernel.candidates(product))[job::jobs]:
            run(0, tile)


def kinds() -> list[Product]:
    """Products that want kernels of their own: the cuts of the largest one serve all sizes."""
    return [Product(m, bits, 65536, 65536) for m, bits in ((1, 16), (2, 16), (1, 8), (1, 4))]


def matrix(product: Product) -> Weight:
    """A small weight of a kind."""
    if product.bits == 16:
        return Weight.of(torch.randn(64, 4096, device=DEVICE, dtype=torch.float16))
    kind = f"int{product.bits}"
    data = torch.zeros(64, row_bytes(kind, 4096), device=DEVICE, dtype=torch.uint8)
    return Weight(data, torch.rand(64, device=DEVICE), kind, 4096)


def print_table_of(kernel: Kernel, wanted: str, seconds: float) -> dict[str, list[object]]:
    """Tune the products whose tuples contain ``wanted``, print their table, return its rows."""
    report: dict[str, list[object]] = {}
    print(f"{kernel.table_name} = {{")
    for product in [each for each in kernel.units if wanted in str(tuple(each))]:
        found = tuned(kernel, product, seconds)
        report[str(tuple(product))] = [(round(us, 2), tuple(tile)) for us, tile in found[:5]]
        read = product.matrices * product.kept * product.width * product.bits / 8
        us, tile = found[0]
        print(f"    {product!r}: {tile!r},  # {us:.2f} us, {read / us / 1e3:.0f} GB/s", flush=True)
        for rank, (us, tile) in enumerate(found if wanted else [], start=1):
            if rank <= LISTED or tile == kernel.table.get(product):
                print(f"    # {rank}: {us:.2f} us, {tile!r}", flush=True)
    print("}")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernel", action="append", choices=list(KERNELS))
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--only", default="", help="tune the products whose tuples contain this")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--job", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    kernels = [KERNELS[name] for name in args.kernel or ("columns", "rows")]
    if not any(args.only in str(tuple(each)) for kernel in kernels for each in kernel.units):
        raise SystemExit(f"error: no product's tuple contains {args.only!r}")
    need_gpu()
    if args.job is not None:
        compile_share(args.job, args.jobs)
        return
    if any(kernel.triton for kernel in kernels):
        again = [sys.executable, *sys.argv, "--jobs", str(args.jobs), "--job"]
        for process in [subprocess.Popen([*again, str(job)]) for job in range(args.jobs)]:
            process.wait()
    for units in () if args.only else UNITS:
        us, cut = tuned_cuts(units)[0]
        print(f"# selection among {units}: {cut!r}, {us:.2f} us")
    print(
        json_line(
            {
                kernel.table_name: print_table_of(kernel, args.only, args.seconds)
                for kernel in kernels
            }
        )
    )


if __name__ == "__main__":
    main()
