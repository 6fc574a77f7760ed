"""What evaluating a method costs beside the dense model, on the bundled SwiGLU model.

    python benchmarks/eval_overhead.py [--windows 64] [--rounds 3]

Every round measures the dense model and then each method on the same windows of 512 tokens; the
table gives the median time and the median over the rounds of the ratio to that round's dense
time. The physical limit is the arithmetic of the dense forward pass at the rate of a large float32
matrix product measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

import dipnet
from dipnet.eval.texts import bundled_text, tokenize
from dipnet.methods.base import Method
from dipnet.models.load import LoadedModel, load_model

WINDOW = 512


def methods(loaded: LoadedModel) -> dict[str, Method]:
    """Every method at MLP density 0.5 (GLU pruning at 0.8), calibrated where it needs to be."""
    asked: dict[str, Method] = {
        "glu": dipnet.GLUPruning(0.8),
        "gate": dipnet.GatePruning(0.5),
        "up": dipnet.UpPruning(0.5),
        "glu-oracle": dipnet.GLUOracle(0.5),
        "cats": dipnet.CATS(0.5),
        "dip": dipnet.DIP(0.5),
        "dip, attention too": dipnet.DIP(0.5, attention_density=0.5),
        "teal": dipnet.TEAL(0.5),
        "wina": dipnet.WINA(0.5),
        "wanda": dipnet.Wanda(0.5),
        "wanda 2:4": dipnet.Wanda(0.5, pattern="2:4"),
    }
    text = tokenize(loaded.tokenizer, bundled_text("calibration").content)[: 8 * WINDOW]
    return {name: dipnet.calibrate(loaded.model, m, text) for name, m in asked.items()}


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def matrix_rate() -> float:
    """Floating-point operations per second of a large float32 matrix product: best of five."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return 2 * 2048**3 / min(seconds(lambda: a @ b) for _ in range(5))


def measure(loaded: LoadedModel, windows: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, by method; the dense model under "dense"."""
    tokens = tokenize(loaded.tokenizer, bundled_text("heldout").content)
    tokens = tokens.repeat(-(-windows * WINDOW // len(tokens)))[: windows * WINDOW]
    ready = methods(loaded)
    times: dict[str, list[float]] = {"dense": [], **{name: [] for name in ready}}
    dipnet.perplexity(loaded.model, tokens[:WINDOW])  # warm-up
    for _ in range(rounds):
        times["dense"].append(seconds(lambda: dipnet.perplexity(loaded.model, tokens)))
        for name, method in ready.items():
            with dipnet.sparsify(loaded.model, method):
                times[name].append(seconds(lambda: dipnet.perplexity(loaded.model, tokens)))
    return times


def main() -> None:
    """Measure, print the table, end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    loaded = load_model("demo-swiglu", device="cpu")
    times = measure(loaded, args.windows, args.rounds)
    spec = dipnet.describe(loaded.model)
    limit = 2 * spec.weights_per_token * args.windows * WINDOW / matrix_rate()
    ratios = {
        name: statistics.median(t / d for t, d in zip(ts, times["dense"], strict=True))
        for name, ts in times.items()
    }
    print(f"{'method':<20}{'seconds':>9}{'x dense':>9}{'of limit':>10}")
    for name, ts in times.items():
        median = statistics.median(ts)
        print(f"{name:<20}{median:>9.2f}{ratios[name]:>9.2f}{limit / median:>10.0%}")
    result = {
        "benchmark": "eval_overhead",
        "windows": args.windows,
        "rounds": args.rounds,
        "threads": torch.get_num_threads(),
        "limit_seconds": limit,
        "median_seconds": {name: statistics.median(ts) for name, ts in times.items()},
        "ratio_to_dense": ratios,
        "worst_ratio": max(ratios.values()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
