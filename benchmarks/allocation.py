"""How much of what masks cost allocation, scores and a rotation win back, without any training.

    python benchmarks/allocation.py --data FOLDER

FOLDER holds gutenberg/valid.txt.xz, on which everything is fitted, and gutenberg/test.txt.xz, which
is measured. For each density: DIP with its usual split, alike in all layers; with scores (column
norms, and learned from there), with a fitted allocation or with thresholds in the place of top-k,
with both; the same for the rotated model.
`closed` is the share of the gap between DIP and the dense model's perplexity that is closed: 1 is
the limit. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import lzma
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import dipnet
from dipnet.adapt.allocation import Pieces, mean_divergence
from dipnet.eval.texts import tokenize
from dipnet.methods.base import Method
from dipnet.methods.dip import DIP
from dipnet.methods.dip_threshold import DIPThreshold
from dipnet.models.load import LoadedModel

COMPARED = 32
"""Windows on which the divergence is measured, a mean with less noise than perplexity's."""

SCORED = ("norms", "learned scores")
FITTED = ("allocation", "thresholds")
KINDS = ("DIP", *SCORED, *FITTED, *(f"{each} and {name}" for name in SCORED for each in FITTED))
THRESHOLD_TOKENS = 65_536
ROWS = [f"{title}{name}" for title in ("", "rotated, ") for name in KINDS]


def tokens_of(loaded: LoadedModel, file: Path, count: int) -> Tensor:
    """The first tokens of a packed text."""
    with lzma.open(file, "rt", encoding="utf-8") as opened:
        text = opened.read(count * 8)
    return tokenize(loaded.tokenizer, text)[:count]


def rows(
    loaded: LoadedModel, fitted_on: Tensor, arguments: argparse.Namespace, title: str
) -> Iterator[tuple[str, float, Method]]:
    """What is measured of one model: a name, a density, the method; each when it is fitted."""
    model = loaded.model
    settings = {name: getattr(arguments, name) for name in ("window", "batch_size", "seed")}
    scores: dict[str, dipnet.Factors | None] = {"": None}
    if wants(arguments, title, "norms"):
        scores["norms"] = dipnet.norm_scores(model, DIP(0.5))
    if wants(arguments, title, "learned scores"):
        steps = arguments.score_steps
        scores["learned scores"] = dipnet.fit_scores(
            model, DIP(0.5), fitted_on, steps=steps, **settings
        )
    for name, factors in scores.items():
        if f"{title}{name or 'DIP'}" in arguments.rows:
            for density in arguments.density:
                yield f"{title}{name or 'DIP'}", density, DIP(density, scores=factors)
        divided = f"{title}allocation{' and ' if name else ''}{name}"
        if divided in arguments.rows:
            steps = arguments.steps
            found = dipnet.fit_allocation(
                model,
                DIP(0.5, scores=factors),
                arguments.density,
                fitted_on,
                steps=steps,
                **settings,
            )
            for density in arguments.density:
                yield divided, density, DIP(density, allocation=found, scores=factors)
        above = f"{title}thresholds{' and ' if name else ''}{name}"
        if above in arguments.rows:
            method, tokens = DIPThreshold(0.5, scores=factors), fitted_on[:THRESHOLD_TOKENS]
            thresholds = dipnet.fit_thresholds(
                model, method, arguments.density, tokens, window=arguments.window
            )
            for density in arguments.density:
                yield above, density, replace(method, density=density, fitted=thresholds)


def wants(arguments: argparse.Namespace, title: str, scores: str) -> bool:
    """Whether any row of a model needs these scores."""
    named = (scores, *(f"{each} and {scores}" for each in FITTED))
    return any(f"{title}{row}" in arguments.rows for row in named)


def main() -> None:
    """Fit, measure, print."""
    arguments = parse()
    begun = time.perf_counter()
    loaded = dipnet.load_model(arguments.model, device=arguments.device, dtype="float32")
    fitted_on = tokens_of(loaded, arguments.data / "gutenberg/valid.txt.xz", arguments.tokens)
    count = arguments.windows * arguments.window
    test = tokens_of(loaded, arguments.data / "gutenberg/test.txt.xz", count)
    test = test.to(loaded.model.device)
    compared = test.view(-1, arguments.window)[:COMPARED]
    pieces = Pieces(test[:0], compared, arguments.batch_size)
    how = {"window": arguments.window, "batch_size": arguments.batch_size}
    dense = dipnet.perplexity(loaded.model, test, **how).perplexity
    print(f"dense: perplexity {dense:.3f}", flush=True)
    found: list[dict[str, float | str]] = []
    for title in ("", "rotated, "):
        if not any(row.startswith(title) for row in arguments.rows):
            continue
        if title:
            turned = dipnet.rotate(loaded.model, fitted_on[:32_768], window=arguments.window)
            print(f"rotated: {turned}, {time.perf_counter() - begun:.0f} s", flush=True)
        for name, density, method in rows(loaded, fitted_on, arguments, title):
            with dipnet.sparsify(loaded.model, method, backend="reference") as model:
                perplexity = dipnet.perplexity(model, test, **how).perplexity
                measured = dipnet.usage(model).density().mlp
            base = [row for row in found if row["method"] == "DIP" and row["density"] == density]
            gap = float(base[0]["perplexity"]) - dense if base else perplexity - dense
            row = {
                "method": name,
                "density": density,
                "mlp": round(measured, 5),
                "perplexity": round(perplexity, 4),
                "divergence": round(mean_divergence(loaded.model, method, pieces), 5),
                "closed": round(1 - (perplexity - dense) / gap, 4),
                "seconds": round(time.perf_counter() - begun, 1),
            }
            found.append(row)
            print(
                f"{name:28} {density:4g}  perplexity {perplexity:8.3f}  KL {row['divergence']:7.4f}"
                f"  closed {row['closed']:7.1%}  after {row['seconds']:.0f} s",
                flush=True,
            )
    about = {"tokens": count, "fitted_on": arguments.tokens, "dense": round(dense, 4)}
    print(json.dumps({"benchmark": "allocation", "model": arguments.model, **about, "rows": found}))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default="demo-swiglu")
    parser.add_argument("--density", type=float, nargs="+", default=[0.5, 0.4, 0.3])
    parser.add_argument("--rows", nargs="+", default=ROWS, help="of those, beside DIP")
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--score-steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    arguments.rows = ["DIP", *arguments.rows]  # what the others are compared with
    return arguments


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    main()
