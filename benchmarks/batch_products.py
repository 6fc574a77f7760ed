"""How several sequences should read the weights of one site: each way, and the one that is taken.

    python benchmarks/batch_products.py [--rows 2 --rows 4] [--density 0.1]

A site's units are chosen and multiplied for a token of each row, in bfloat16: by lists of the rows'
own, by one list of what they keep together, and with all weights (`models/decoding/sharing.py`,
whose constants come from here). Medians over replays of CUDA graphs, weights taken in turn from
more than a gigabyte. The limit is what is kept together over the read bandwidth of the same run.
Ends with one JSON line.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from gpu_timing import DEVICE, READ_IN_TURN, graph_us, need_gpu, read_bandwidth
from timing import json_line, print_table
from torch import nn

import dipnet
from dipnet.models.decoding.blocks import columns
from dipnet.models.decoding.counts import StepCounts
from dipnet.models.decoding.sharing import WAYS, kept_together
from dipnet.models.decoding.sites import SiteStep
from dipnet.models.decoding.stacked import Stacked
from dipnet.units import Operand, Site

SHAPES = ((4096, 28672), (14336, 4096), (4096, 4096), (28672, 7168))
LAUNCHES = 20


def stacks(inputs: int, outputs: int) -> list[Stacked]:
    """As many matrices as READ_IN_TURN holds."""
    number = max(2, int(READ_IN_TURN / (2 * inputs * outputs)))
    options: dict[str, Any] = {"bias": False, "device": DEVICE, "dtype": torch.bfloat16}
    layers = (nn.Linear(inputs, outputs, **options) for _ in range(number))
    return [Stacked([layer], turned=True) for layer in layers]


def measure(weights: list[Stacked], inputs: int, rows: int, density: float) -> dict[str, Any]:
    """Microseconds of each way."""
    outputs = weights[0].weight.shape[0]
    site = Site(0, "mlp.hidden", inputs, density, (Operand("down", outputs),), "hidden")
    counts = StepCounts([site], [], DEVICE)
    step = SiteStep(site, dipnet.DIP(density), counts, DEVICE, 2)
    chosen = step.ways[rows - 1]
    inputs_of = [torch.randn(rows, inputs, device=DEVICE, dtype=torch.bfloat16) for _ in range(5)]
    found: dict[str, Any] = {"shape": [inputs, outputs], "rows": rows, "density": density}
    for each in WAYS:
        step.ways = (each,) * len(step.ways)

        def run(i: int) -> object:
            x = inputs_of[i % len(inputs_of)]
            return columns(weights[i % len(weights)], x, step.decide(x))

        found[each] = graph_us(run, LAUNCHES)
    return found | {"taken": chosen}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, action="append")
    parser.add_argument("--density", type=float, action="append")
    args = parser.parse_args()
    need_gpu()
    bandwidth = read_bandwidth()
    table, figures = [], []
    for inputs, outputs in SHAPES:
        weights = stacks(inputs, outputs)
        for rows in args.rows or (2, 4, 8):
            for density in args.density or (0.1, 0.25, 0.5):
                found = measure(weights, inputs, rows, density)
                figures.append(found)
                size = 2 * inputs * outputs
                limit = size * kept_together(rows, density) / bandwidth * 1e6
                best = min(WAYS, key=lambda each: found[each])
                lost = found[found["taken"]] / found[best] - 1
                times = [f"{found[each]:.1f}" for each in WAYS]
                name = f"{inputs}->{outputs} x{rows} {density:.0%}"
                table.append([name, *times, f"{limit:.1f}", found["taken"], best, f"{lost:.0%}"])
                print(*table[-1], flush=True)
    print_table(["", *(f"{each} us" for each in WAYS), "limit", "taken", "best", "lost"], table)
    print(json_line({"gpu": torch.cuda.get_device_name(), "bandwidth": bandwidth, "rows": figures}))


if __name__ == "__main__":
    main()
