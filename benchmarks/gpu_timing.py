"""What the benchmarks of GPU kernels share: replays of CUDA graphs, weights in turn, bandwidth."""

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from dipnet.kernels.gpu.weights import Weight
from dipnet.kernels.reference import row_bytes

DEVICE = torch.device("cuda")
READ_IN_TURN = 1.1e9
"""Bytes of weights that are read before the first are read again: far more than a cache holds."""
LISTS = 7
"""Lists of kept units that are taken in turn."""
REPLAYS = 5


def need_gpu() -> None:
    """End with one line where there is no GPU to measure."""
    if not torch.cuda.is_available():
        raise SystemExit("error: this measures a CUDA GPU, and PyTorch finds none here")


def graph_us(run: Callable[[int], object], launches: int) -> float:
    """Microseconds of `run(i)`, i = 0, 1, ...: the median over replays of a graph of `launches`."""
    for i in range(2):
        run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            run(i)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / launches)
    return statistics.median(times)


def read_bandwidth() -> float:
    """Bytes a second of a sum over 4 GiB."""
    numbers = torch.ones(1 << 30, device=DEVICE)
    return numbers.nbytes / graph_us(lambda i: numbers.sum(), 4) * 1e6


def in_turn(make: Callable[[], Tensor]) -> list[Tensor]:
    """As many random matrices of one kind as READ_IN_TURN holds."""
    first = make()
    return [first, *(make() for _ in range(int(READ_IN_TURN / first.nbytes)))]


def stored_in_turn(kind: str, units: int, width: int) -> list[Weight]:
    """As `in_turn`: random integers of a kind, as a store has them."""
    size, scales = row_bytes(kind, width), torch.rand(units, device=DEVICE)
    made = in_turn(lambda: torch.randint(255, (units, size), device=DEVICE, dtype=torch.uint8))
    return [Weight(data, scales, kind, width) for data in made]


def lists(units: int, kept: int) -> list[Tensor]:
    """Random lists of kept units, (1, kept) int32 each."""
    shuffled = (torch.randperm(units, device=DEVICE)[:kept] for _ in range(LISTS))
    return [index.sort().values.int()[None] for index in shuffled]
