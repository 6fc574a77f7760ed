"""Neurons of one record: what larger records cost in quality and give in speed.

    python benchmarks/blocks.py [--data FOLDER] [--windows 4] [--folder FOLDER] [--rounds 3]

Quality: the bundled models in int8 with 1, 2, 4 and 8 neurons a record, as they are and in the
order in which neurons that fire together are neighbours (fitted on the bundled calibration text),
DIP at density 0.5, caches of 35 % of the MLP's records. Speed: stores of a few layers of
Phi-3-Medium's shapes with random int4 weights (four of about 1.1 GB), which --folder holds
while they are measured; it should be on the disk in question. Writes docs/results/blocks.json and
ends with one JSON line.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from engine_decode import decode
from results import OUT
from streamed_quality import DENSITY, Work, measure, mlp_bytes, take_core, text_of
from timing import BENCHMARKS, json_line, print_table

import dipnet
from dipnet.adapt.coactivation import fit_orders
from dipnet.eval.streamed import StoreSetting
from dipnet.eval.texts import bos_token, bundled_text, tokenize
from dipnet.files import make_folder, write_file
from dipnet.models.load import DEMO_MODELS, load_model
from dipnet.pack.packing import pack
from dipnet.store.index import read_index

BLOCKS = (1, 2, 4, 8)
GAMMAS = (None, 0.2)
SHARE = 0.35
LAYERS = 4
WARMUP = 24
"""Tokens that fill the caches before any is timed."""


def quality(model: str, work: Work, core: int) -> list[dict[str, Any]]:
    """A model with every block, with and without the order, on one core."""
    take_core(core)
    text, rows = text_of(work.data), []
    loaded = load_model(model)
    known = tokenize(loaded.tokenizer, bundled_text("calibration").content)
    for block in BLOCKS:
        for ordered in (False, True) if block > 1 else (False,):
            bos = bos_token(loaded.tokenizer)
            orders = fit_orders(loaded.model, known, block, bos) if ordered else None
            store = work.folder / f"{model}-{block}-{ordered}"
            index = pack(model, store, "int8", block, orders)
            how = StoreSetting(int(SHARE * mlp_bytes(index)))
            found = measure(store, dipnet.DIP(DENSITY), how, text, work.windows)
            rows.append({"block": block, "ordered": ordered, **found})
            print(f"{model} {block} {ordered} {found['perplexity']:.2f}", flush=True)
    return rows


def make_store(block: int, folder: Path) -> Path:
    """A store of random weights with that many neurons a record."""
    store = folder / f"block-{block}"
    script = str(BENCHMARKS / "peer" / "make_store.py")
    options = ["--layers", str(LAYERS), "--block", str(block)]
    subprocess.run([sys.executable, script, str(store), *options], check=True, stdout=sys.stderr)
    return store


def speed(store: Path, gamma: float | None, tokens: int) -> dict[str, float]:
    """Decoding a few tokens from a store: seconds, bytes and reads of each."""
    gc.collect()  # a model and its hooks hold each other
    index = read_index(store)
    cache = int(SHARE * mlp_bytes(index))
    model = dipnet.load(store, dipnet.DIP(DENSITY, cache_aware=gamma), cache=cache)
    seconds, counted = decode(model, WARMUP, tokens, seed=0)
    return {
        "seconds_per_token": statistics.median(seconds),
        "bytes_per_token": counted["bytes_read"] / tokens,
        "reads_per_token": counted["reads"] / tokens,
        "disk_rate": counted["bytes_read"] / counted["disk_busy"],
        "disk_share": counted["disk_busy"] / sum(seconds),
        "record_bytes": index.group(0, "mlp.hidden").record_bytes,
    }


def speeds(folder: Path, rounds: int, tokens: int) -> list[dict[str, Any]]:
    """Every block and γ: medians over rounds, as a disk changes from minute to minute."""
    stores = {block: make_store(block, folder) for block in BLOCKS}
    settings = [(block, gamma) for gamma in GAMMAS for block in BLOCKS]
    runs: dict[Any, list[dict[str, float]]] = {setting: [] for setting in settings}
    for _ in range(rounds):
        for block, gamma in settings:
            runs[block, gamma].append(speed(stores[block], gamma, tokens))
    return [
        {"block": block, "gamma": gamma or 1.0}
        | {name: statistics.median(run[name] for run in found) for name in found[0]}
        for (block, gamma), found in runs.items()
    ]


def show(models: dict[str, list[dict[str, Any]]], timed: list[dict[str, Any]]) -> None:
    """Both tables."""
    for name, rows in models.items():
        print(f"\n{name}, int8, caches of {SHARE:.0%}\n")
        header = ("block", "order", "perplexity", "hits", "kB/token")
        print_table(header, (quality_cells(row) for row in rows))
    print(f"\n{LAYERS} layers of Phi-3-Medium's shapes, int4, caches of {SHARE:.0%}\n")
    header = ("block", "γ", "KiB/record", "ms/token", "MB/token", "reads/token", "disk MB/s")
    print_table((*header, "disk busy"), (speed_cells(row) for row in timed))


def quality_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A line of a model's table."""
    return (
        str(row["block"]),
        "fitted" if row["ordered"] else "as is",
        f"{row['perplexity']:.2f}",
        f"{row['hit_rate']:.1%}",
        f"{row['bytes_per_token'] / 1e3:.0f}",
    )


def speed_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table of speeds."""
    return (
        str(row["block"]),
        f"{row['gamma']:g}",
        f"{row['record_bytes'] / 1024:g}",
        f"{row['seconds_per_token'] * 1e3:.1f}",
        f"{row['bytes_per_token'] / 1e6:.1f}",
        f"{row['reads_per_token']:.0f}",
        f"{row['disk_rate'] / 1e6:.0f}",
        f"{row['disk_share']:.0%}",
    )


def qualities(work: Work) -> dict[str, list[dict[str, Any]]]:
    """The models side by side."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(DEMO_MODELS), spawn) as pool:
        rows = pool.map(quality, DEMO_MODELS, repeat(work), range(len(DEMO_MODELS)))
        return dict(zip(DEMO_MODELS, rows, strict=True))


def main() -> None:
    """Measure quality, then speed; write the JSON file, end with one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="by default the bundled held-out text")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="by default a temporary one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        models = qualities(Work(args.data, args.windows, Path(folder)))
        timed = speeds(Path(folder), args.rounds, args.tokens)
    show(models, timed)
    result = {
        "benchmark": "blocks",
        "density": DENSITY,
        "cache_share": SHARE,
        "windows": args.windows,
        "text": text_of(args.data).name,
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - start, 1),
        "quality": models,
        "speed": timed,
    }
    write_file(make_folder(args.out) / "blocks.json", json.dumps(result, indent=1) + "\n")
    print(json_line(result))


if __name__ == "__main__":
    main()
