"""topk_mask: the native backend against the torch reference and torch.topk with a scatter.

The physical limit of a case is the time to read its scores and write its mask once, measured in
the same run as a copy of as many bytes. Ends with one JSON line.
"""

import json
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dipnet.kernels import topk_mask

SHAPES = [(512, 448), (512, 1344), (512, 14336), (1, 14336), (1, 49152)]
POOL = 8  # inputs taken in turn, so that no branch predictor learns one by heart


def topk_scatter(scores: Tensor, k: int) -> Tensor:
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    return mask.scatter_(-1, scores.topk(k, sorted=False).indices, True)


def best_us(run: Callable[[int], object], seconds: float = 0.5) -> float:
    """Shortest mean time of a pass over the pool, in microseconds a call."""
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for i in range(POOL):
            run(i)
        best = min(best, (time.perf_counter() - start) / POOL)
    return best * 1e6


def measure(rows: int, n: int) -> dict[str, float | int]:
    """Times of one case, k = n / 2; `share` is the copy's time over native's."""
    k = n // 2
    pool = [torch.randn(rows, n) for _ in range(POOL)]
    moved = rows * n * 5  # four bytes of a score read, one of the mask written
    source = torch.zeros(POOL, moved // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = best_us(lambda i: target[i].copy_(source[i]))
    native = best_us(lambda i: topk_mask(pool[i], k, "native"))
    return {
        "rows": rows,
        "n": n,
        "k": k,
        "native_us": round(native, 1),
        "reference_us": round(best_us(lambda i: topk_mask(pool[i], k, "reference")), 1),
        "topk_scatter_us": round(best_us(lambda i: topk_scatter(pool[i], k)), 1),
        "copy_us": round(copy, 1),
        "copy_gb_s": round(moved / copy / 1e3, 1),
        "share": round(copy / native, 3),
    }


def main() -> None:
    threads = torch.get_num_threads()
    print(f"topk_mask, float32, k = n / 2, {threads} threads, {platform.machine()}; microseconds")
    print(f"{'rows':>5} {'n':>6} {'native':>9} {'reference':>10} {'topk':>10} {'copy':>8} limit")
    cases = []
    for rows, n in SHAPES:
        case = measure(rows, n)
        cases.append(case)
        print(
            f"{rows:>5} {n:>6} {case['native_us']:>9} {case['reference_us']:>10} "
            f"{case['topk_scatter_us']:>10} {case['copy_us']:>8} {case['share']:>5.0%}"
        )
    print(json.dumps({"benchmark": "topk_mask", "threads": threads, "cases": cases}))


if __name__ == "__main__":
    main()
