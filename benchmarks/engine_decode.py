"""Decodes with our engine from a store, batch 1; ends with one JSON line.

    python benchmarks/engine_decode.py STORE [--method dip --density 0.5 --gamma 0.2]
        [--memory 4GiB] [--warmup 16] [--tokens 16]

Token ids are random: with random weights a generated text would soon repeat itself, and a cache
would look better than it is. The statistics are those of the timed tokens alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import dipnet


def method_of(args: argparse.Namespace) -> Any:
    """The method that the options ask for."""
    if args.method == "dense":
        return dipnet.Dense()
    return dipnet.DIP(args.density, cache_aware=args.gamma)


@torch.inference_mode()
def decode(model: Any, warmup: int, tokens: int, seed: int) -> tuple[list[float], dict[str, Any]]:
    """Seconds of every timed token, and the statistics of those tokens."""
    generator = torch.Generator().manual_seed(seed)
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(3, size, (warmup + tokens, 1, 1), generator=generator)
    seconds, past, before = [], None, dipnet.stats(model)
    for step, token in enumerate(ids):
        if step == warmup:
            before = dipnet.stats(model)
        start = time.perf_counter()
        out = model(input_ids=token, past_key_values=past, use_cache=True)
        past = out.past_key_values
        int(out.logits[0, -1].argmax())
        seconds.append(time.perf_counter() - start)
    return seconds[warmup:], asdict(dipnet.stats(model).since(before))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--method", choices=["dense", "dip"], default="dip")
    parser.add_argument("--density", type=float, default=0.5)
    parser.add_argument("--gamma", type=float, default=None, help="cache-aware masks")
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--warmup", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    model = dipnet.load(args.store, method_of(args), memory=args.memory, context=args.context)
    loading = time.perf_counter() - start
    seconds, statistics_ = decode(model, args.warmup, args.tokens, args.seed)
    result = {
        "engine": "dipnet",
        "method": args.method,
        "density": args.density if args.method == "dip" else 1.0,
        "gamma": args.gamma,
        "memory": args.memory,
        "threads": args.threads,
        "load_seconds": loading,
        "seconds_per_token": seconds,
        "median_seconds": statistics.median(seconds),
        "statistics": statistics_,
        "peak_rss": dipnet.stats(model).peak_memory,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
