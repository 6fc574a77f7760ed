"""Decoding a model larger than memory: llama.cpp's mmap, our dense streaming, DIP and DIP-CA.

    sudo python benchmarks/larger_than_memory.py [--memory 4GiB] [--rounds 3] [--folder FOLDER]

Every decoder runs in a memory cgroup of its own, in turn, with the disk's raw speed measured
before and after each. FOLDER holds phi3-medium.gguf (peer/make_gguf.py), the store phi3-medium
(peer/make_store.py), and in peer/ a virtual environment with llama-cpp-python and gguf. The ratios
are medians over the rounds; `disk` is the share of the raw speed that decoding reached. Ends with
one JSON line.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from cgroup import CgroupError, parse_size
from raw_disk import record_speed
from timing import (
    BENCHMARKS,
    FOLDER,
    Rounds,
    Setting,
    interleave,
    json_line,
    percent,
    print_table,
    run_limited,
)

from dipnet.errors import InputError
from dipnet.streaming.engine import DEPTH

LLAMA, DENSE = "llama.cpp mmap", "dense streaming"
DIP = {"DIP 50 %": (0.5, None), "DIP 50 %, γ 0.2": (0.5, 0.2), "DIP 35 %, γ 0.2": (0.35, 0.2)}


def engine(name: str, args: argparse.Namespace, *options: str, memory: str = "") -> Setting:
    """A setting of our engine; both its budget and its cgroup are the memory."""
    store = args.folder / "phi3-medium"
    script = str(BENCHMARKS / "engine_decode.py")
    counts = ["--tokens", str(args.tokens), "--warmup", str(args.warmup)]
    budget = ["--memory", memory or args.memory]
    return Setting(name, [sys.executable, script, str(store), *budget, *counts, *options], store)


def dip(name: str, args: argparse.Namespace, memory: str = "") -> Setting:
    """DIP by its name in the table."""
    density, gamma = DIP[name]
    options = ["--density", str(density)] + (["--gamma", str(gamma)] if gamma else [])
    return engine(name, args, *options, memory=memory)


def peer(args: argparse.Namespace) -> Setting:
    """llama.cpp without repacking: the weights that it repacks cannot be paged back in."""
    gguf = args.folder / "phi3-medium.gguf"
    script = str(BENCHMARKS / "peer" / "llama_decode.py")
    python = str(args.folder / "peer" / "bin" / "python")
    return Setting(LLAMA, [python, script, str(gguf), "--tokens", str(args.peer_tokens)], gguf)


def measure(setting: Setting, args: argparse.Namespace) -> dict[str, Any]:
    """One run, with what it read and how that compares to the raw disk around it."""
    store = args.folder / "phi3-medium"
    before = record_speed(store, args.disk_seconds, args.depth)
    figures = run_limited(setting, parse_size(args.memory), args.timeout)
    raw = statistics.mean([before, record_speed(store, args.disk_seconds, args.depth)])
    figures["raw_bytes_per_second"] = raw
    read = figures.get("statistics", {}).get("bytes_read")
    if read is not None:
        seconds = figures["seconds_per_token"]
        figures["bytes_per_token"] = read / len(seconds)
        figures["disk_share"] = read / sum(seconds) / raw
    return figures


def budgets_kept(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Peak memory of short runs with other budgets, each in a cgroup of just that size."""
    kept = {}
    for memory in args.budgets:
        setting = dip("DIP 50 %, γ 0.2", args, memory)
        result = interleave(
            [setting], 1, lambda s, m=memory: run_limited(s, parse_size(m), args.timeout)
        )[setting.name]
        peaks = {name: result.median(name) for name in ("peak_rss", "cgroup_peak")}
        kept[memory] = {"failure": result.failure, **peaks}
    return kept


def show(results: dict[str, Rounds]) -> None:
    """The table of all settings."""
    rows = []
    for name, rounds in results.items():
        if rounds.failure:
            rows.append((name, rounds.failure, *[""] * 6))
            continue
        read = rounds.median("bytes_per_token") / 1e9
        rows.append(
            (
                name,
                f"{rounds.median('median_seconds'):.3f}",
                f"{rounds.ratio(results[LLAMA]):.2f}",
                f"{rounds.ratio(results[DENSE]):.2f}",
                f"{read:.2f}" if read == read else "",
                f"{rounds.median('raw_bytes_per_second') / 1e6:.0f}",
                percent(rounds.median("disk_share")),
                f"{rounds.median('peak_rss') / 2**30:.2f}",
            )
        )
    header = ("", "s/token", "x llama.cpp", "x dense", "GB/token", "raw MB/s", "disk", "peak GiB")
    print_table(header, rows)


def summary(results: dict[str, Rounds]) -> dict[str, Any]:
    """The medians of every setting, for the JSON line."""
    figures = ("median_seconds", "bytes_per_token", "raw_bytes_per_second", "disk_share")
    return {
        name: {
            "failure": rounds.failure,
            "against_llama": rounds.ratio(results[LLAMA]),
            "against_dense": rounds.ratio(results[DENSE]),
            **{figure: rounds.median(figure) for figure in (*figures, "peak_rss", "cgroup_peak")},
            "rounds": [run["median_seconds"] for run in rounds.runs],
            "statistics": [run.get("statistics") for run in rounds.runs],
        }
        for name, rounds in results.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--budgets", nargs="*", default=["3GiB", "6GiB"], metavar="SIZE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=16)
    parser.add_argument("--peer-tokens", type=int, default=6)
    parser.add_argument("--depth", type=int, default=DEPTH)
    parser.add_argument("--disk-seconds", type=float, default=2.0)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of one run")
    args = parser.parse_args()
    settings = [peer(args), engine(DENSE, args, "--method", "dense")]
    settings += [dip(name, args) for name in DIP]
    try:
        results = interleave(settings, args.rounds, lambda setting: measure(setting, args))
        kept = budgets_kept(args)
    except (CgroupError, InputError, OSError) as error:
        raise SystemExit(f"nothing was measured: {error}") from None
    show(results)
    for memory, peaks in kept.items():
        peak = f"peak {peaks['peak_rss'] / 2**30:.2f} GiB"
        print(f"budget {memory}: {peaks['failure'] or peak}")
    result = {"benchmark": "larger_than_memory", "memory": args.memory, "rounds": args.rounds}
    print(json_line({**result, "settings": summary(results), "budgets": kept}))


if __name__ == "__main__":
    main()
