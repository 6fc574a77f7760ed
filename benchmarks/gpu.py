"""All that is wanted of a GPU, in one run: kernels, decoding and quality, beside the targets.

    python benchmarks/gpu.py [--windows 64] [--rounds 3]

Runs gpu_kernels.py, gpu_decode.py for each of its models and gpu_quality.py, one after another in
processes of their own, whose output comes first. The last table has the worst figure of each kind,
what is wanted at least and what to go for. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpu_timing import need_gpu
from timing import BENCHMARKS, Failed, json_line, last_json, print_table

Figures = dict[str, dict[str, Any]]
"""The JSON lines of what was run, by name."""
SMALL, LARGE = ((4096, 14336), (14336, 4096)), ((12288, 49152), (49152, 12288))
TEAL = {
    (4096, 14336): (1.50, 1.68, 1.78),
    (14336, 4096): (1.50, 1.69, 1.78),
    (5120, 17920): (1.67, 1.87, 2.01),
    (12288, 49152): (1.66, 1.98, 2.13),
    (49152, 12288): (1.67, 2.00, 2.14),
    (7168, 28672): (1.63, 1.88, 2.04),
}
"""How many times as fast as cuBLAS TEAL's published kernel is at 50, 25 and 10 %, on an H200."""
DENSITIES = ("50%", "25%", "10%")


@dataclass(frozen=True)
class Wanted:
    """A figure that is wanted; of times and differences the least is the best."""

    what: str
    measured: Callable[[Figures], float]
    at_least: float
    go_for: float
    low: bool = False

    def met(self, measured: float) -> bool:
        return measured <= self.at_least if self.low else measured >= self.at_least


def kernel(figures: Figures, what: str, figure: str = "speedup") -> float:
    """A figure of one line of gpu_kernels.py."""
    return next(row[figure] for row in figures["kernels"]["rows"] if row["what"] == what)


def product(figures: Figures, shape: tuple[int, int], density: str) -> float:
    """The slower one of columns and rows, against cuBLAS."""
    inputs, outputs = shape
    names = (f"{name}, {inputs} to {outputs}, {density}" for name in ("columns", "rows"))
    return min(kernel(figures, name) for name in names)


def products(shapes: tuple[tuple[int, int], ...], density: str) -> Callable[[Figures], float]:
    return lambda figures: min(product(figures, shape, density) for shape in shapes)


def selection(figures: Figures) -> float:
    """Microseconds of the slowest top-k."""
    rows = figures["kernels"]["rows"]
    return max(row["us"] for row in rows if row["what"].startswith("top-k"))


def against_teal(figures: Figures) -> float:
    """The least of ours over theirs."""
    return min(
        product(figures, shape, density) / theirs
        for shape, row in TEAL.items()
        for density, theirs in zip(DENSITIES, row, strict=True)
    )


def decoding(model: str, other: str) -> Callable[[Figures], float]:
    """How many times as fast as another way our sparse loop is, at batch 1."""

    def ratio(figures: Figures) -> float:
        rows = figures[model]["rows"]
        plain = [row for row in rows if row["batch"] == 1 and row["weights"] == "bf16"]
        seconds = {row["how"]: row["median_seconds"] for row in plain}
        return seconds[other] / seconds["sparse"]

    return ratio


LLAMA, OPT = "llama-3-8b", "opt-30b"
MLP = "MLP 4096, 14336, 50%"
WANTED = [
    *(
        Wanted(f"products of small shapes, {density}, x cuBLAS", products(SMALL, density), *bounds)
        for density, *bounds in (("50%", 1.65, 1.85), ("25%", 2.8, 3.4), ("10%", 4.5, 7))
    ),
    *(
        Wanted(f"products of large shapes, {density}, x cuBLAS", products(LARGE, density), *bounds)
        for density, *bounds in (("50%", 1.95, 2), ("25%", 3.7, 4), ("10%", 8, 10))
    ),
    Wanted("exact top-k, slowest, us", selection, 6, 3, low=True),
    Wanted(
        "MLP at 50%, x compiled dense",
        lambda found: kernel(found, "MLP 4096, 14336, 50%"),
        1.5,
        1.8,
    ),
    Wanted("Llama-3-8B, DIP, x HF compiled", decoding(LLAMA, "hf-compiled"), 2.2, 2.8),
    Wanted("Llama-3-8B, DIP, x our dense loop", decoding(LLAMA, "dense"), 1.4, 1.7),
    Wanted("Llama-3-8B, DIP, x HF eager", decoding(LLAMA, "hf-eager"), 8, 8),
    Wanted("OPT-30B, Deja Vu, x HF compiled", decoding(OPT, "hf-compiled"), 2.5, 3.5),
    Wanted("OPT-30B, Deja Vu, x our dense loop", decoding(OPT, "dense"), 2, 3),
    Wanted("OPT-30B, Deja Vu, x HF eager", decoding(OPT, "hf-eager"), 3, 3),
    Wanted("products, x TEAL's published kernel", against_teal, 1, 1),
    Wanted(
        "perplexity, largest difference, %",
        lambda found: 100 * found["quality"]["largest_difference"],
        0.1,
        0,
        low=True,
    ),
]


def run(script: str, *options: str) -> dict[str, Any]:
    """The figures of another benchmark, whose output is passed on."""
    command, lines = [sys.executable, str(BENCHMARKS / script), *options], []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
    if process.returncode:
        raise Failed(f"{script} ended with status {process.returncode}")
    return last_json("".join(lines))


def summary(figures: Figures) -> list[dict[str, Any]]:
    """What was measured of each figure that is wanted, and whether that is enough."""
    found = []
    for wanted in WANTED:
        measured = wanted.measured(figures)
        row = {"what": wanted.what, "at_least": wanted.at_least, "go_for": wanted.go_for}
        found.append(row | {"measured": measured, "met": wanted.met(measured)})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, default=64, help="of text, for the perplexity")
    parser.add_argument("--rounds", type=int, default=3, help="of decoding")
    args = parser.parse_args()
    need_gpu()
    try:
        figures = {"kernels": run("gpu_kernels.py")}
        for model in (LLAMA, OPT):
            figures[model] = run("gpu_decode.py", "--model", model, "--rounds", str(args.rounds))
        figures["quality"] = run("gpu_quality.py", "--windows", str(args.windows))
    except Failed as error:
        raise SystemExit(f"error: {error}") from None
    rows = summary(figures)
    print_table(
        ["", "measured", "wanted", "go for", "met"],
        [
            [
                row["what"],
                f"{row['measured']:.2f}",
                f"{row['at_least']:g}",
                f"{row['go_for']:g}",
                "yes" if row["met"] else "NO",
            ]
            for row in rows
        ],
    )
    print(json_line({"wanted": rows} | figures))


if __name__ == "__main__":
    main()
