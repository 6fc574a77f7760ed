"""Quality against traffic of streamed models: γ, what a cache evicts, and the size of the caches.

    python benchmarks/streamed_quality.py [--data FOLDER] [--windows 4]

The bundled models are packed as int8 into a temporary folder and decode a text with the engine
that generates, with DIP at density 0.5. The text is the bundled held-out one, or with --data
FOLDER/gutenberg/test.txt (plain or .xz). Bytes per token are those of the records that a token
misses; "of dense" is their share of what dense streaming reads with a cache of the same size.
Before, streamed logits are compared with those of the same store in memory, for all three kinds of
weights. Writes docs/results/streamed_quality.json and ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from results import OUT, TEXTS, WINDOW, read
from timing import json_line, print_table

import dipnet
from dipnet.eval.streamed import StoreSetting, stream_sweep
from dipnet.eval.sweep import DENSE, Job, Setting
from dipnet.eval.texts import Text, bos_token, bundled_text, tokenize
from dipnet.files import make_folder, write_file
from dipnet.models.load import DEMO_MODELS, load_tokenizer
from dipnet.pack.packing import pack
from dipnet.store.geometry import WEIGHTS
from dipnet.store.index import Index, read_index
from dipnet.streaming.budget import CACHED, divide

DENSITY = 0.5
GAMMAS = (None, 0.5, 0.2, 0.1)
POLICIES = ("lru", "lfu")
SHARES = (0.25, 0.5, 0.75)
DECODED = 8
"""Tokens that follow the compared window one by one, as `generate` computes them."""


@dataclass(frozen=True)
class Work:
    """What the models' processes are told."""

    data: Path | None
    windows: int
    folder: Path


def mlp_bytes(index: Index) -> int:
    """Bytes of the records that may be streamed."""
    return sum(group.bytes for group in index.groups if group.name in CACHED)


def text_of(data: Path | None) -> Text:
    """The text that is measured on."""
    return read(data / TEXTS["gutenberg"]) if data else bundled_text("heldout")


def plan(store: Path, text: Text, windows: int) -> tuple[Setting, torch.Tensor]:
    """How the text is measured, and its first windows' tokens."""
    tokenizer = load_tokenizer(str(store))
    setting = Setting(WINDOW, WINDOW, bos=bos_token(tokenizer))
    return setting, setting.first(tokenize(tokenizer, text.content), windows)


def measure(
    store: Path, method: dipnet.Method | None, how: StoreSetting, text: Text, windows: int
) -> dict[str, Any]:
    """Perplexity, hit rates and bytes per token of a method (None: dense) on a store."""
    setting, tokens = plan(store, text, windows)
    job = Job(method.name, DENSITY, method) if method else DENSE
    row = next(stream_sweep(store, [job], tokens, setting, how, ready=lambda found: found))
    if row.measured is None or row.measured.store is None:
        raise SystemExit(f"nothing was measured: {row.reason}")
    use = row.measured.store
    return {
        "perplexity": row.measured.perplexity.perplexity,
        "mlp_density": row.measured.density.mlp,
        "hit_rates": use.hit_rates,
        "hit_rate": use.hit_rate,
        "bytes_per_token": use.bytes_per_token,
        "seconds": row.measured.seconds,
    }


def measure_model(model: str, work: Work, core: int) -> dict[str, Any]:
    """Everything about one model, on one core."""
    take_core(core)
    text = text_of(work.data)
    stores = {weights: work.folder / f"{model}-{weights}" for weights in WEIGHTS}
    for weights, store in stores.items():
        pack(model, store, weights)
    equal = {weights: bit_equal(store, text) for weights, store in stores.items()}
    return {
        "bit_equal": equal,
        "mlp_bytes": mlp_bytes(read_index(stores["int8"])),
        **grid(stores["int8"], text, work.windows),
    }


def take_core(core: int) -> None:
    """This process on one core: two models side by side do not disturb each other."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[core % len(cores)]})
    torch.set_num_threads(1)


def dense_bytes(index: Index, cache: int) -> int:
    """Bytes that a token of dense streaming reads: all records but those that are pinned."""
    groups = [group for group in index.groups if group.name in CACHED]
    slots = divide(index, cache, dict.fromkeys((group.key for group in groups), 1.0))
    return sum((group.units - slots[group.key]) * group.record_bytes for group in groups)


def grid(store: Path, text: Text, windows: int) -> dict[str, Any]:
    """The dense model, and DIP with every γ, policy and size."""
    size = mlp_bytes(read_index(store))
    caches = {share: int(share * size) for share in SHARES}
    resident = measure(store, None, StoreSetting(None), text, windows)
    dense = {share: dense_bytes(read_index(store), cache) for share, cache in caches.items()}
    rows = []
    for share, policy, gamma in (
        (share, policy, gamma) for share in SHARES for policy in POLICIES for gamma in GAMMAS
    ):
        how = StoreSetting(caches[share], policy)
        found = measure(store, dipnet.DIP(DENSITY, cache_aware=gamma), how, text, windows)
        setting = {"cache_share": share, "policy": policy, "gamma": gamma or 1.0}
        rows.append({**setting, **found, "of_dense": found["bytes_per_token"] / dense[share]})
        print(f"{store.name} {setting} {found['perplexity']:.2f}", flush=True)
    return {
        "dense_perplexity": resident["perplexity"],
        "dense_bytes_per_token": {str(share): size for share, size in dense.items()},
        "rows": rows,
    }


def bit_equal(store: Path, text: Text) -> bool:
    """Whether a quarter of the MLP in memory gives the logits that all of it gives, bit for bit."""
    cache = mlp_bytes(read_index(store)) // 4
    tokens = tokenize(load_tokenizer(str(store)), text.content)[: WINDOW - DECODED]
    found = [list(logits(store, tokens[None], size)) for size in (None, cache)]
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@torch.inference_mode()
def logits(store: Path, tokens: torch.Tensor, cache: int | None) -> Iterator[torch.Tensor]:
    """The logits of a window, and of each token that is then decoded greedily."""
    method = dipnet.DIP(DENSITY)
    model = dipnet.load(store, method, cache=cache, context=WINDOW, prefill="sparse")
    past = None
    for _ in range(DECODED):
        out = model(input_ids=tokens, past_key_values=past, use_cache=True)
        yield out.logits
        past, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)


def show(name: str, found: dict[str, Any]) -> None:
    """A model's table."""
    equal = ", ".join(f"{w} {'yes' if ok else 'NO'}" for w, ok in found["bit_equal"].items())
    print(
        f"\n{name}: dense perplexity {found['dense_perplexity']:.2f}, MLP records "
        f"{found['mlp_bytes'] / 1e6:.1f} MB; streamed and resident bit-equal: {equal}\n"
    )
    header = ("cache", "policy", "γ", "perplexity", "hits in", "hidden", "all", "kB/token")
    print_table((*header, "of dense"), (cells(row) for row in found["rows"]))


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    rates = [row["hit_rates"][name] for name in CACHED] + [row["hit_rate"]]
    return (
        f"{row['cache_share']:.0%}",
        row["policy"],
        f"{row['gamma']:g}",
        f"{row['perplexity']:.2f}",
        *(f"{rate:.1%}" for rate in rates),
        f"{row['bytes_per_token'] / 1e3:.0f}",
        f"{row['of_dense']:.2f}",
    )


def main() -> None:
    """Measure both models side by side, write the JSON file, end with one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="by default the bundled held-out text")
    parser.add_argument("--windows", type=int, default=4, help=f"of {WINDOW} tokens")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    start = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(len(DEMO_MODELS), spawn) as pool,
    ):
        work = Work(args.data, args.windows, Path(folder))
        models = dict(
            zip(
                DEMO_MODELS,
                pool.map(measure_model, DEMO_MODELS, repeat(work), range(len(DEMO_MODELS))),
                strict=True,
            )
        )
    for name, found in models.items():
        show(name, found)
    text = text_of(args.data)
    result = {
        "benchmark": "streamed_quality",
        "text": {"name": text.name, "sha256": text.sha256, "windows": args.windows},
        "density": DENSITY,
        "seconds": round(time.perf_counter() - start, 1),
        "models": models,
    }
    write_file(make_folder(args.out) / "streamed_quality.json", json.dumps(result, indent=1) + "\n")
    print(json_line(result))


if __name__ == "__main__":
    main()
