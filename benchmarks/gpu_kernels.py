"""The GPU kernels against PyTorch's on the shapes of large models, one token; float16, where no
other kind of weights is named.

    python benchmarks/gpu_kernels.py

Medians over replays of CUDA graphs, with weights taken in turn from more than a gigabyte. The
physical limit of a row is the time to read the kept weights once, at the bandwidth of a large sum
in the same run. Prints a table and ends with one JSON line.
"""

import json

import torch
from gpu_timing import (
    DEVICE,
    LISTS,
    graph_us,
    in_turn,
    lists,
    need_gpu,
    read_bandwidth,
    stored_in_turn,
)
from torch import Tensor
from torch.nn import functional

from dipnet.kernels import gpu

HALF = torch.float16
SHAPES = [(4096, 14336), (14336, 4096), (12288, 49152), (49152, 12288)]
TEAL_SHAPES = [(5120, 17920), (7168, 28672)]
"""Those of the published kernel's rows that are not among SHAPES."""
KIND_SHAPES = SHAPES[:2]
"""Those that are measured for other kinds of weights, too."""
DENSITIES = (0.5, 0.25, 0.1)
UNITS = (4096, 5120, 7168, 12288, 14336, 17920, 28672, 49152)
MLP = (4096, 14336)


def random(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    """Normally distributed numbers."""
    return torch.empty(shape, device=DEVICE, dtype=dtype).normal_()


def row(name: str, us: float, dense: float, limit: float) -> dict[str, float | str]:
    """One line of the table, in microseconds; printed at once."""
    share = limit / us
    print(f"{name:44s} {us:8.2f} {dense:8.2f} {dense / us:7.2f} {limit:8.2f} {share:7.0%}")
    return {"what": name, "us": us, "dense_us": dense, "speedup": dense / us, "share": share}


def products(
    inputs: int,
    outputs: int,
    bandwidth: float,
    dtype: torch.dtype = HALF,
    densities: tuple[float, ...] = DENSITIES,
) -> list[dict[str, float | str]]:
    """Gathered input channels, then gathered output rows, against a dense linear layer."""
    weights = in_turn(lambda: random(inputs, outputs, dtype=dtype))
    x, found = random(1, inputs, dtype=dtype), []
    count, launches = len(weights), max(4, 2 * len(weights))
    dense_weights = [weight.view(outputs, inputs) for weight in weights]
    dense = graph_us(lambda i: functional.linear(x, dense_weights[i % count]), launches)
    title = "" if dtype == HALF else f"{dtype}".removeprefix("torch.") + " "
    for density in densities:
        for name, units in (("columns", inputs), ("rows", outputs)):
            kept = round(density * units)
            index = lists(units, kept)
            limit = kept * dtype.itemsize * inputs * outputs / units / bandwidth * 1e6

            def run(i: int, name: str = name, index: list[Tensor] = index) -> Tensor:
                if name == "columns":
                    return gpu.columns_product(x, index[i % LISTS], weights[i % count])
                return gpu.rows_product(x, index[i % LISTS], dense_weights[i % count])

            us = graph_us(run, launches)
            what = f"{title}{name}, {inputs} to {outputs}, {density:.0%}"
            found.append(row(what, us, dense, limit))
    return found


def integers(
    kind: str, inputs: int, outputs: int, bandwidth: float
) -> list[dict[str, float | str]]:
    """Half of the columns of a store's integers, against a dense linear layer in float16."""
    dense_weights, x = in_turn(lambda: random(outputs, inputs)), random(1, inputs)
    weights, index = stored_in_turn(kind, inputs, outputs), lists(inputs, inputs // 2)
    launches = max(4, len(dense_weights))
    dense = graph_us(
        lambda i: functional.linear(x, dense_weights[i % len(dense_weights)]), launches
    )

    def run(i: int) -> Tensor:
        return gpu.columns_product(x, index[i % LISTS], weights[i % len(weights)])

    limit = weights[0].data.nbytes / 2 / bandwidth * 1e6
    us = graph_us(run, max(4, len(weights)))
    return [row(f"{kind} columns, {inputs} to {outputs}, 50%", us, dense, limit)]


def selections(bandwidth: float) -> list[dict[str, float | str]]:
    """Exact top-k of magnitudes, half of them, against torch.topk; bytes take next to no time."""
    found = []
    for n in UNITS:
        scores = [random(1, n) for _ in range(4)]
        us = graph_us(lambda i, s=scores, n=n: gpu.topk_indices(s[i % 4], n // 2), 40)
        theirs = graph_us(lambda i, s=scores, n=n: s[i % 4].abs().topk(n // 2), 40)
        limit = (2 * n + 4 * (n // 2)) / bandwidth * 1e6
        found.append(row(f"top-k indices, n = {n}", us, theirs, limit))
    return found


def mlp(bandwidth: float) -> list[dict[str, float | str]]:
    """Select, gate and up, select, down: against the dense MLP, compiled."""
    width, neurons = MLP
    gates, ups = (in_turn(lambda: random(width, neurons) / 64) for _ in range(2))
    downs, xs = in_turn(lambda: random(neurons, width) / 64), [random(1, width) for _ in range(4)]
    count = len(downs)

    def sparse(i: int) -> Tensor:
        x, j = xs[i % 4], i % count
        kept = gpu.topk_indices(x, width // 2)
        hidden = gpu.gated_columns(x, kept, gates[j], ups[j], "silu")
        kept = gpu.topk_indices(hidden, neurons // 2)
        return gpu.columns_product(hidden, kept, downs[j])

    @torch.compile
    def dense(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        hidden = functional.silu(functional.linear(x, gate)) * functional.linear(x, up)
        return functional.linear(hidden, down)

    turned = [
        (gate.view(neurons, width), up.view(neurons, width), down.view(width, neurons))
        for gate, up, down in zip(gates, ups, downs, strict=True)
    ]
    dense_us = graph_us(lambda i: dense(xs[i % 4], *turned[i % count]), 2 * count)
    limit = 3 * width * neurons / bandwidth * 1e6
    return [row("MLP 4096, 14336, 50%", graph_us(sparse, 2 * count), dense_us, limit)]


def main() -> None:
    need_gpu()
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    print(f"{torch.cuda.get_device_name()}: reads {bandwidth / 1e9:.0f} GB/s")
    print(f"{'':44s} {'us':>8s} {'PyTorch':>8s} {'faster':>7s} {'limit':>8s} {'share':>7s}")
    rows = mlp(bandwidth) + selections(bandwidth)
    for inputs, outputs in SHAPES + TEAL_SHAPES:
        rows += products(inputs, outputs, bandwidth)
    for inputs, outputs in KIND_SHAPES:
        rows += products(inputs, outputs, bandwidth, torch.float32, DENSITIES[:1])
        for kind in ("int8", "int4"):
            rows += integers(kind, inputs, outputs, bandwidth)
    named = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps(named | {"bandwidth_GBps": bandwidth / 1e9, "rows": rows}))


if __name__ == "__main__":
    main()
