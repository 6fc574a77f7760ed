"""The fastest cuts of a model's own products where they run: inside a token's CUDA graph.

    python benchmarks/tune_gpu_decode.py [--model opt-30b] [--weights int4] [--tried 12]

There other kernels run before a product, and beside it, so the cut that is fastest alone need not
be the fastest. Finds the products of one token of the sparse loop (of `gpu_decode.py`, with fewer
layers), times each one's cuts alone as `tune_gpu_kernels.py` does, in bfloat16, and then the whole
token with each of the best; first and last with the cut of the table, which shows the drift.
Medians over rounds. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from gpu_cuts import KERNELS, Cutting, Kernel
from gpu_decode import BYTES, SUBJECTS, put_int4
from gpu_timing import need_gpu
from timing import json_line
from tune_gpu_kernels import tuned

import dipnet
from dipnet.kernels.gpu import launch
from dipnet.kernels.gpu.tiles import Product
from dipnet.models.attach import ATTACHED

LENGTH, TOKENS, ROUNDS = 256, 20, 5
TABLES = {id(kernel.table): name for name, kernel in KERNELS.items()}
nearest = launch.nearest


Call = tuple[str, Product]
"""A kernel's name in KERNELS, and what it multiplies."""


@contextmanager
def cut_instead(instead: dict[Call, Cutting], seen: list[Call]) -> Iterator[None]:
    """Products are cut as said ``instead`` of as in the table; all that are cut are ``seen``."""

    def cut(table: Any, product: Product) -> Any:
        if id(table) not in TABLES:
            return nearest(table, product)
        key = TABLES[id(table)], product
        seen.append(key)
        return instead.get(key) or nearest(table, product)

    launch.nearest = cut
    try:
        yield
    finally:
        launch.nearest = nearest


def token_us(model: Any, method: Any, instead: dict[Call, Cutting]) -> tuple[float, list[Call]]:
    """Microseconds of one token, and the products that its graph cut."""
    seen: list[Call] = []
    with cut_instead(instead, seen), dipnet.sparsify(model, method, backend="gpu", prefill="dense"):
        replay = getattr(model, ATTACHED).decoding.replay(LENGTH)
        replay.begin()
        replay.prompt_ended(LENGTH // 2)
        token, times = torch.ones(1, dtype=torch.int64, device="cuda"), []
        for _ in range(ROUNDS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(TOKENS):
                replay.run(token)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / TOKENS)
            replay.prompt_ended(LENGTH // 2)
    return statistics.median(times), list(dict.fromkeys(seen))


def best_alone(kernel: Kernel, product: Product, seconds: float, tried: int) -> list[Cutting]:
    """The cuts that are fastest alone, of twice as many units as are kept."""
    subject = replace(kernel, units={product: 2 * product.kept})
    return [tile for _, tile in tuned(subject, product, seconds, torch.bfloat16)[:tried]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=list(SUBJECTS), default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--weights", choices=list(BYTES), default="bf16")
    parser.add_argument("--tried", type=int, default=12, help="cuts of each product, in the loop")
    parser.add_argument(
        "--seconds", type=float, default=5, help="for timing a product's cuts alone"
    )
    parser.add_argument("--only", default="", help="tune the products whose tuples contain this")
    args = parser.parse_args()
    need_gpu()
    torch.manual_seed(0)
    subject = SUBJECTS[args.model]
    model = subject.build(args.layers)
    model = put_int4(model) if args.weights == "int4" else model
    method = subject.method(model)
    first, products = token_us(model, method, {})
    named = {"model": args.model, "weights": args.weights, "layers": args.layers}
    print(f"{named}: {first:.1f} us a token with the table", flush=True)
    report = {}
    for name, product in products:
        kernel = KERNELS[name]
        if args.only not in str(tuple(product)) or kernel.triton:
            continue
        in_use = nearest(kernel.table, product)
        tiles = dict.fromkeys([in_use, *best_alone(kernel, product, args.seconds, args.tried)])
        found = [
            (token_us(model, method, {(name, product): tile})[0], tile) for tile in [*tiles, in_use]
        ]
        report[f"{name} {tuple(product)}"] = [(round(us, 1), tuple(tile)) for us, tile in found]
        print(f"{name}, {product!r}: {found[0][0]:.1f} and {found[-1][0]:.1f} us with {in_use!r}")
        for us, tile in sorted(found)[:4]:
            print(f"    {us:.1f} us with {tile!r}", flush=True)
    print(json_line(named | {"us": first, "cuts": report}))


if __name__ == "__main__":
    main()
