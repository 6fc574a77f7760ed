"""Fit Deja Vu's predictors for both bundled models: time, memory, and how good they are.

Each model is fitted in a process of its own, so that its peak memory is its own. Recall and
precision are those of the deployed top-k on the bundled held-out text, of other books than the
text that was fitted on; the perplexities there are with the predictors in use. Ends with one JSON
line.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import dipnet
from dipnet.eval.texts import Text, bundled_text, read_text, tokenize
from dipnet.models.load import DEMO_MODELS, load_model

MOST_CHARACTERS = 16  # read of the text for each token that is used of it
BATCH = 4  # windows of a perplexity's forward call


def fitted_text(file: Path | None) -> Text:
    return read_text(file) if file else bundled_text("calibration")


def measure(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """Fit on one model, then see what the predictors are worth on the held-out text."""
    if options.threads:
        torch.set_num_threads(options.threads)
    loaded = load_model(model, device=options.device)
    text = fitted_text(options.text)
    tokens = tokenize(loaded.tokenizer, text.content[: options.tokens * MOST_CHARACTERS])
    settings = {name: getattr(options, name) for name in ("mlp_density", "head_density")}
    predictors = dipnet.fit_predictors(
        loaded.model,
        tokens[: options.tokens],
        rank=options.rank,
        look_ahead=options.look_ahead,
        magnitude=options.magnitude,
        positive_weight=options.positive_weight,
        **settings,
    )
    held_out = tokenize(loaded.tokenizer, bundled_text("heldout").content)
    qualities = dipnet.measure_predictors(loaded.model, predictors, held_out, **settings)
    card = predictors.card
    spec = dipnet.describe(loaded.model)
    return {
        "model": model,
        "parameters": spec.weights_per_token,
        "predictors": {kind: predictors.numbers(kind) for kind in predictors.kinds},
        "text": text.name,
        **{key: card[key] for key in ("tokens", "settings", "steps", "device", "seconds")},
        "peak_memory_bytes": card["peak_memory_bytes"],
        "layers": {kind: [asdict(each) for each in rows] for kind, rows in qualities.items()},
        "perplexity": perplexities(loaded.model, predictors, held_out, options),
    }


def perplexities(
    model: Any, predictors: dipnet.Predictors, tokens: torch.Tensor, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Dense, and with what is predicted left out: perplexity and the share of weights read."""
    tokens = tokens[: options.windows * 512]
    mlp, head = {"mlp_density": options.mlp_density}, {"head_density": options.head_density}
    shown = {"dense": {"perplexity": dipnet.perplexity(model, tokens, batch_size=BATCH).perplexity}}
    for name, densities in {"mlp": mlp, "heads": head, "both": mlp | head}.items():
        method = dipnet.DejaVu(**densities, predictors=predictors, look_ahead=predictors.look_ahead)
        with dipnet.sparsify(model, method):
            found = dipnet.perplexity(model, tokens, batch_size=BATCH)
            total = dipnet.usage(model).density().total
        shown[name] = {"perplexity": found.perplexity, "total_density": total}
    return shown


def show(row: dict[str, Any]) -> None:
    seconds, peaks = row["seconds"], row["peak_memory_bytes"]
    memory = ", ".join(f"{name} {size / 2**20:,.0f} MiB" for name, size in peaks.items())
    print(
        f"\n{row['model']}: {row['tokens']['trained']:,} tokens of {row['text']}, "
        f"{row['steps']['made']} steps on {row['device']}: {seconds['total']:.1f} s "
        f"({seconds['collecting']:.1f} collecting, {seconds['training']:.1f} training); "
        f"peak memory {memory}"
    )
    for kind, layers in row["layers"].items():
        rank = row["settings"]["ranks"][kind]
        print(f"{kind}, rank {rank}, {layers[0]['density']:.3f} kept")
        print("layer  wanted  recall  at most  precision  recall by weight")
        for each in layers:
            print(
                f"{each['layer']:5d}  {each['wanted']:6.3f}  {each['recall']:6.3f}  "
                f"{each['bound']:7.3f}  {each['precision']:9.3f}  {each['captured']:16.3f}"
            )
        means = (
            f"{statistics.fmean(each[name] for each in layers):.3f} {said}"
            for name, said in (("recall", "recall"), ("captured", "recall by weight"))
        )
        print(f"mean of the layers: {', '.join(means)}")
    for name, found in row["perplexity"].items():
        read = f", {found['total_density']:.3f} of all weights" if "total_density" in found else ""
        print(f"perplexity, {name}: {found['perplexity']:.2f}{read}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(DEMO_MODELS))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--text", type=Path, help="default: the bundled calibration text")
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--windows", type=int, default=32, help="of 512 tokens, for perplexity")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--look-ahead", type=int, default=1)
    parser.add_argument("--magnitude", type=float, default=1.0)
    parser.add_argument("--positive-weight", type=float, default=1.0)
    parser.add_argument("--dense-first", type=int, default=0, help="layers, for perplexity")
    parser.add_argument("--mlp-density", type=float, default=0.2)
    parser.add_argument("--head-density", type=float, default=0.5)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    fresh = {"max_workers": 1, "max_tasks_per_child": 1, "mp_context": get_context("spawn")}
    rows = []
    with ProcessPoolExecutor(**fresh) as processes:
        for model in options.models:
            rows.append(processes.submit(measure, model, options).result())
            show(rows[-1])
    print(json.dumps({"benchmark": "fit_predictors", "rows": rows}))


if __name__ == "__main__":
    main()
