"""The fastest cut of each product of kernels/gpu/tiles.py on this GPU, among many.

    python benchmarks/tune_gpu_kernels.py [--seconds S] [--triton [--jobs N]]
    python benchmarks/tune_gpu_kernels.py --only "(1, 16, 4096, 3584)" --seconds 25

Prints the best cuts of selections, a table of that file, of clusters or of Triton's programs, and
ends with one JSON line.
`--seconds` is the limit for timing one product; what was not tried is left out, and said. The cut
of the table comes first. With `--only` no selection and no other product is tuned, and the fastest
cuts are listed. Triton's kernels are compiled by N processes before, those of clusters in threads.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from gpu_timing import DEVICE, LISTS, graph_us, in_turn, lists, need_gpu
from torch import Tensor

from dipnet.errors import BackendError
from dipnet.kernels.gpu.clusters import cluster_columns
from dipnet.kernels.gpu.columns import columns
from dipnet.kernels.gpu.integers import integer_columns
from dipnet.kernels.gpu.selection import select
from dipnet.kernels.gpu.tiles import CLUSTERS, COLUMNS, ClusterTile, ColumnsTile, Cut, Product
from dipnet.kernels.gpu.weights import Weight
from dipnet.kernels.reference import row_bytes

INPUTS = {
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
}
"""The products of columns that are tuned, and the input channels of each."""
RESIDENT = {2: (1536, 1024), 4: (1280, 1024), 8: (1024, 768)}
"""Threads on a multiprocessor, where each reads so many units of 16-bit weights at a time: with
more of them fewer registers are left to each, and some of its reads wait for others."""
LISTED = 8
"""Cuts of a product that are listed with --only."""
UNITS = (4096, 7168, 14336, 28672, 49152)
"""Units among which a selection is tuned."""
Cutting = ColumnsTile | ClusterTile


def candidates(product: Product, *, triton: bool) -> Iterator[Cutting]:
    """Cuts with enough programs for the GPU, and work for each of their threads."""
    return triton_candidates(product) if triton else cluster_candidates(product)


def triton_candidates(product: Product) -> Iterator[ColumnsTile]:
    """Those of Triton's programs."""
    integer = product.bits < 16
    sizes = (8, 16) if integer else (32, 64, 128)
    reads = (2, 4) if integer or product.matrices == 2 else (4, 8)
    width = product.width * product.bits // 32 if integer else product.width
    for weights, parts, warps, ahead in itertools.product(sizes, (1, 2, 4, 8), (4, 8), reads):
        tile = ColumnsTile(weights, parts, warps, ahead)
        programs = -(-width // weights) * parts
        units = ahead * tile.group(4 if integer else 2)
        filled = product.kept / parts >= units / 2
        if programs >= multiprocessors() / 2 and filled:
            yield tile


def cut_in_use(product: Product, *, triton: bool) -> Cutting | None:
    """The cut that is in use, if the table has the product."""
    return (COLUMNS if triton else CLUSTERS).get(product)


def cluster_candidates(product: Product) -> Iterator[ClusterTile]:
    """Those of clusters: between half a block and sixteen for each multiprocessor."""
    words = {16: (4,), 8: (2, 4), 4: (1, 2, 4)}[product.bits]
    sizes = (8, 16, 32, 64), (1, 2, 4, 8, 16), (128, 256, 512, 1024), RESIDENT, words
    for lanes, parts, threads, reads, each in itertools.product(*sizes):
        bits = 32 * each
        outputs = lanes // product.matrices * bits // product.bits
        blocks = -(-product.width // outputs) * parts
        filled = product.kept / parts >= threads / lanes * reads / 2
        fits = threads * bits // product.bits * 4 <= 32768  # bytes of shared memory
        flying = threads * each * 4 * reads * blocks
        busy = multiprocessors() / 2 <= blocks <= 16 * multiprocessors() and flying >= 2**21
        if busy and filled and fits:
            held = RESIDENT[reads] if product.bits == 16 else ()  # of integers it is not known
            for resident in {max(1, most // threads) for most in held} or {1}:
                yield ClusterTile(lanes, parts, threads, reads, resident, each)


def multiprocessors() -> int:
    """Of this GPU."""
    return torch.cuda.get_device_properties(DEVICE).multi_processor_count


def matrices(product: Product, inputs: int) -> list[Weight]:
    """Random weights, taken in turn."""
    if product.bits == 16:
        shape = inputs, product.width
        made = in_turn(lambda: torch.empty(shape, device=DEVICE, dtype=torch.float16).normal_())
        return [Weight.of(data) for data in made]
    kind, scales = f"int{product.bits}", torch.rand(inputs, device=DEVICE)
    size = inputs, row_bytes(kind, product.width)
    made = in_turn(lambda: torch.randint(255, size, device=DEVICE, dtype=torch.uint8))
    return [Weight(data, scales, kind, product.width) for data in made]


def caller(
    product: Product, x: Tensor, index: list[Tensor], weights: list[Weight]
) -> Callable[[int, Cutting], Tensor]:
    """The product with the i-th list and the i-th weights, cut as said."""

    def run(i: int, tile: Cutting) -> Tensor:
        first = i * product.matrices
        used = [weights[(first + j) % len(weights)] for j in range(product.matrices)]
        if isinstance(tile, ClusterTile):
            return cluster_columns(x, index[i % LISTS], tuple(used), tile, activation="silu")
        if product.bits < 16:
            return integer_columns(x, index[i % LISTS], tuple(used), tile)
        data = tuple(weight.data for weight in used)
        return columns(x, index[i % LISTS], data, product.width, tile, activation="silu")

    return run


def tuned(
    product: Product, inputs: int, seconds: float, *, triton: bool
) -> list[tuple[float, Cutting]]:
    """Microseconds of each cut that was tried, the fastest first."""
    weights, index = matrices(product, inputs), lists(inputs, product.kept)
    x = torch.randn(1, inputs, device=DEVICE, dtype=torch.float16)
    run, found = caller(product, x, index, weights), []
    others = list(candidates(product, triton=triton))
    random.Random(0).shuffle(others)
    first = cut_in_use(product, triton=triton)
    tried = list(dict.fromkeys([first, *others] if first else others))
    if not triton:
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
    """Compile every jobs-th kernel, for the processes that come after."""
    x = torch.randn(1, 64, device=DEVICE, dtype=torch.float16)
    index = torch.arange(16, device=DEVICE, dtype=torch.int32)[None]
    for product in kinds():
        weights = [matrix(product) for _ in range(product.matrices)]
        run = caller(product._replace(width=4096), x, [index] * LISTS, weights)
        for tile in list(triton_candidates(product))[job::jobs]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--triton", action="store_true", help="tune Triton's programs")
    parser.add_argument("--only", help="tune the products whose tuples contain this")
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--job", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    wanted = {each: n for each, n in INPUTS.items() if (args.only or "") in str(tuple(each))}
    if not wanted:
        raise SystemExit(f"error: no product's tuple contains {args.only!r}")
    need_gpu()
    if args.job is not None:
        compile_share(args.job, args.jobs)
        return
    if args.triton:
        again = [sys.executable, *sys.argv, "--jobs", str(args.jobs), "--job"]
        for process in [subprocess.Popen([*again, str(job)]) for job in range(args.jobs)]:
            process.wait()
    report = {}
    for units in () if args.only else UNITS:
        us, cut = tuned_cuts(units)[0]
        print(f"# selection among {units}: {cut!r}, {us:.2f} us")
    print("COLUMNS = {" if args.triton else "CLUSTERS = {")
    for product, inputs in wanted.items():
        found = tuned(product, inputs, args.seconds, triton=args.triton)
        report[str(tuple(product))] = [(round(us, 2), tuple(tile)) for us, tile in found[:5]]
        read = product.matrices * product.kept * product.width * product.bits / 8
        us, tile = found[0]
        print(f"    {product!r}: {tile!r},  # {us:.2f} us, {read / us / 1e3:.0f} GB/s")
        in_use = cut_in_use(product, triton=args.triton)
        for rank, (us, tile) in enumerate(found if args.only else [], start=1):
            if rank <= LISTED or tile == in_use:
                print(f"    # {rank}: {us:.2f} us, {tile!r}", flush=True)
    print("}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
