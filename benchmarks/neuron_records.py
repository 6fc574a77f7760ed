"""Deja Vu from disk, in records of whole neurons: what asking for them a block ahead is worth.

    python benchmarks/neuron_records.py [--predictors FILE] [--rounds 5]

The bundled ReLU model, packed by neurons, decodes its held-out text (every token is given) with
half of the records cached, with and without the look-ahead in turn; the masks and the bytes are the
same. `early` is the share of the missing records that had arrived when their block began. `limit`
is the share of the physical limit: the time in which this disk brings as many bytes as a token's
missing records have, in large reads and for a program that does nothing else, over the token's.
Without --predictors they are fitted first, in some minutes. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from raw_disk import block_speed
from torch import Tensor

import dipnet
from dipnet.eval.texts import bundled_text, tokenize
from dipnet.methods.predictors import Predictors
from dipnet.models.load import load_model, load_tokenizer
from dipnet.pack.packing import pack
from dipnet.store.index import read_index
from dipnet.streaming.stats import Stats

MODEL = "demo-relu"
SITE = "mlp.neuron"
SETTINGS = {"asked for a block ahead": True, "asked for when needed": False}


def predictors_of(args: argparse.Namespace) -> Predictors:
    """Those of the file, or newly fitted ones."""
    if args.predictors:
        return Predictors.load(args.predictors)
    loaded = load_model(MODEL, device="cpu")
    tokens = tokenize(loaded.tokenizer, bundled_text("calibration").content)
    return dipnet.fit_predictors(
        loaded.model, tokens, mlp_density=args.density, head_density=None, look_ahead=1
    )


@torch.inference_mode()
def decode(model: Any, tokens: Tensor, warmup: int) -> tuple[float, Stats]:
    """Seconds of a token after the first ones, in the mean, and the statistics of those tokens."""
    past, before, start = None, dipnet.stats(model), 0.0
    for step, token in enumerate(tokens):
        if step == warmup:
            before, start = dipnet.stats(model), time.perf_counter()
        past = model(input_ids=token.view(1, 1), past_key_values=past, use_cache=True)
        past = past.past_key_values
    seconds = (time.perf_counter() - start) / (len(tokens) - warmup)
    return seconds, dipnet.stats(model).since(before)


def figures(rounds: list[tuple[float, Stats]], record: int, speed: float) -> dict[str, Any]:
    """Of all rounds, seconds of a token their median; ``record`` and ``speed`` are in bytes."""
    seconds = statistics.median(each for each, _ in rounds)
    tokens = sum(stats.calls for _, stats in rounds)
    sites = [stats.sites[SITE] for _, stats in rounds]
    misses = sum(site.misses for site in sites)
    missed = misses * record / tokens
    return {
        "tokens_per_second": 1 / seconds,
        "bytes_per_token": missed,
        "read_bytes_per_token": sum(stats.bytes_read for _, stats in rounds) / tokens,
        "hit_rate": 1 - misses / sum(site.hits + site.misses for site in sites),
        "asked_ahead": sum(site.guessed for site in sites) / misses,
        "useful": sum(site.useful for site in sites) / misses,
        "early": sum(site.early for site in sites) / misses,
        "waiting_ms": 1e3 * sum(stats.disk for _, stats in rounds) / tokens,
        "kernels_ms": 1e3 * sum(stats.kernels for _, stats in rounds) / tokens,
        "limit": missed / speed / seconds,
    }


def measure(store: Path, predictors: Predictors, args: argparse.Namespace) -> dict[str, Any]:
    """Both settings in turn, on one text after another."""
    index = read_index(store)
    record = index.neurons.record_bytes
    cache = int(args.cached * index.layers * index.neurons.bytes)
    method = dipnet.DejaVu(mlp_density=args.density, predictors=predictors)
    models = {
        name: dipnet.load(store, method, cache=cache, context=args.tokens, look_ahead=ahead)
        for name, ahead in SETTINGS.items()
    }
    text = tokenize(load_tokenizer(MODEL), bundled_text("heldout").content)
    rounds: dict[str, list[tuple[float, Stats]]] = {name: [] for name in SETTINGS}
    for number in range(args.rounds + 1):
        tokens = text[number * args.tokens : (number + 1) * args.tokens]
        for name, model in models.items():
            made = decode(model, tokens, args.warmup)
            if number:  # the first fills the caches
                rounds[name].append(made)
    speed = block_speed(store)
    return {"disk_bytes_per_second": speed, "settings": {
        name: figures(made, record, speed) for name, made in rounds.items()
    }}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--predictors", type=Path)
    parser.add_argument("--weights", choices=["int4", "int8", "bf16"], default="bf16")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--cached", type=float, default=0.5, help="share of the records")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--tokens", type=int, default=160, help="of a round, the first ones untimed"
    )
    parser.add_argument("--warmup", type=int, default=32, help="of them untimed")
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="on the disk to read")
    args = parser.parse_args()
    predictors = predictors_of(args)
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="dipnet-") as folder:
        store = Path(folder) / "store"
        pack(MODEL, store, args.weights, unit="neuron")
        made = measure(store, predictors, args)
    print(f"{MODEL}, {args.weights}, {args.density:.0%} of the neurons, {args.cached:.0%} cached")
    for name, row in made["settings"].items():
        print(
            f"{name:24s} {row['tokens_per_second']:6.1f} tokens/s, "
            f"{row['bytes_per_token'] / 1e3:.0f} kB/token, in memory {row['hit_rate']:.1%}, "
            f"there in time {row['early']:.1%}, waiting {row['waiting_ms']:.2f} ms, "
            f"{row['limit']:.1%} of the disk's limit"
        )
    ahead, late = (made["settings"][name]["tokens_per_second"] for name in SETTINGS)
    print(json.dumps({"benchmark": "neuron_records", "model": MODEL, "weights": args.weights,
                      "density": args.density, "cached": args.cached, "speedup": ahead / late,
                      **made}))  # fmt: skip


if __name__ == "__main__":
    main()
