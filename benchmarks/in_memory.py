"""Decoding with everything in memory: llama.cpp with repacked weights, our dense engine, DIP.

    python benchmarks/in_memory.py [--memory 16GiB] [--rounds 3] [--folder FOLDER]

FOLDER is that of larger_than_memory.py. `limit` is the share of the physical limit that a decoder
reaches: the time to read a token's weights once at the DRAM bandwidth measured in the same run,
over its time. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from timing import (
    BENCHMARKS,
    FOLDER,
    Rounds,
    Setting,
    dram_bandwidth,
    interleave,
    json_line,
    percent,
    print_table,
    run_free,
)

import dipnet
from dipnet.errors import InputError
from dipnet.models.families import describe
from dipnet.models.load import empty_model, load_config
from dipnet.store.index import read_index

LLAMA, DENSE, DIP = "llama.cpp, repacked", "dense", "DIP 50 %"


def settings(args: argparse.Namespace) -> list[Setting]:
    """The three decoders."""
    store, gguf = args.folder / "phi3-medium", args.folder / "phi3-medium.gguf"
    script = str(BENCHMARKS / "engine_decode.py")
    ours = [sys.executable, script, str(store), "--memory", args.memory]
    ours += ["--tokens", str(args.tokens), "--warmup", str(args.warmup)]
    python = str(args.folder / "peer" / "bin" / "python")
    theirs = [python, str(BENCHMARKS / "peer" / "llama_decode.py"), str(gguf), "--repack"]
    return [
        Setting(LLAMA, [*theirs, "--tokens", str(args.tokens)], gguf),
        Setting(DENSE, [*ours, "--method", "dense"], store),
        Setting(DIP, [*ours, "--density", "0.5"], store),
    ]


def bytes_per_token(store: Path) -> dict[str, float]:
    """Bytes of records that a token touches, by setting; the peer's are those of its file."""
    index = read_index(store)
    spec = describe(empty_model(load_config(str(store))))
    densities = {site.name: site.density for site in dipnet.DIP(0.5).sites(spec)}
    return {
        DENSE: sum(group.bytes for group in index.groups),
        DIP: sum(group.bytes * densities.get(group.name, 1.0) for group in index.groups),
    }


def overhead(run: dict[str, Any]) -> float | None:
    """The share of masks and caches (scores, selection, bookkeeping) in the timed tokens' time."""
    statistics = run.get("statistics")
    return statistics["selection"] / sum(run["seconds_per_token"]) if statistics else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--memory", default="16GiB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds of one run")
    args = parser.parse_args()
    try:
        touched = bytes_per_token(args.folder / "phi3-medium")
        touched[LLAMA] = (args.folder / "phi3-medium.gguf").stat().st_size
    except (InputError, OSError) as error:
        raise SystemExit(f"nothing was measured: {error}") from None

    def measure(setting: Setting) -> dict[str, Any]:
        run = run_free(setting, args.timeout)
        # Measured next to every run: other programs share the bandwidth.
        run["bandwidth"] = dram_bandwidth(args.threads)
        run["limit_share"] = touched[setting.name] / run["bandwidth"] / run["median_seconds"]
        return run | {"overhead": overhead(run)}

    results = interleave(settings(args), args.rounds, measure)
    rows = [row(name, rounds, results) for name, rounds in results.items()]
    print_table(("", "s/token", "x llama.cpp", "x dense", "limit", "overhead", "GB/s"), rows)
    figures = ("median_seconds", "limit_share", "overhead", "bandwidth", "peak_rss")
    summary = {
        name: {
            "failure": rounds.failure,
            "bytes_per_token": touched[name],
            "against_llama": rounds.ratio(results[LLAMA]),
            "against_dense": rounds.ratio(results[DENSE]),
            **{figure: rounds.median(figure) for figure in figures},
            "statistics": [run.get("statistics") for run in rounds.runs],
        }
        for name, rounds in results.items()
    }
    result = {"benchmark": "in_memory", "rounds": args.rounds, "threads": args.threads}
    print(json_line({**result, "settings": summary}))


def row(name: str, rounds: Rounds, results: dict[str, Rounds]) -> tuple[str, ...]:
    """A line of the table."""
    if rounds.failure:
        return (name, rounds.failure, *[""] * 5)
    return (
        name,
        f"{rounds.median('median_seconds'):.3f}",
        f"{rounds.ratio(results[LLAMA]):.2f}",
        f"{rounds.ratio(results[DENSE]):.2f}",
        percent(rounds.median("limit_share")),
        percent(rounds.median("overhead"), 1),
        f"{rounds.median('bandwidth') / 1e9:.0f}",
    )


if __name__ == "__main__":
    main()
