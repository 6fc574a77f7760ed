"""Replay of a trace of Llama-3-8B's shape on one core: unit accesses a second, and memory.

A unit access is one unit that is looked at for one token, wanted or not. The trace is synthetic:
half of the units wanted, drifting slowly, as tokens of a text want them. Memory is what a replay
adds at most to its process, files left out, which the system may drop; for two lengths. Ends with
one JSON line.
"""

import json
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dipnet.sim.replay import POLICIES, replay
from dipnet.sim.shape import load_shape
from dipnet.sim.sizes import divide_slots, unit_bytes
from dipnet.sim.trace import TraceSite, open_trace
from dipnet.sim.trace_writer import TraceWriter

SHAPE = load_shape("llama-3-8b")
TOKENS, SHORT = 1000, 250
ROUNDS = 3
SHARE = 0.5  # of the bytes that can be streamed
WEIGHTS = "int4"
DRIFT = 0.9  # correlation of a unit's activation with that at the token before


def sites() -> list[TraceSite]:
    neurons, width = SHAPE.matrices["up"]
    inputs = {"gate": neurons, "up": neurons}
    return [
        site
        for layer in range(SHAPE.layers)
        for site in (
            TraceSite(layer, "mlp.in", width, 1, 0.5, inputs),
            TraceSite(layer, "mlp.hidden", neurons, 1, 0.5, {"down": width}),
        )
    ]


def drifting(units: int, tokens: int) -> Iterator[NDArray[np.bool_]]:
    rng = np.random.default_rng(units)
    state = rng.normal(size=units).astype(np.float32)
    for _ in range(tokens):
        noise = rng.standard_normal(units, np.float32)
        state = np.float32(DRIFT) * state + np.float32((1 - DRIFT**2) ** 0.5) * noise
        yield np.abs(state) > np.median(np.abs(state))


def write_trace(path: Path, tokens: int) -> None:
    """Every layer has the masks of the first, moved along, so that making them takes no minute."""
    described = sites()
    with TraceWriter(path, SHAPE, "synthetic", described) as writer:
        for first in zip(*(drifting(site.units, tokens) for site in described[:2]), strict=True):
            for at, site in enumerate(described):
                writer.add(site.key, np.roll(first[at % 2], 37 * site.layer)[None])
            writer.end_tokens(1)


def own_bytes() -> int:
    """Memory of this process that is no file's."""
    found = re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def measure(file: Path, policy: str) -> dict[str, float | int | str]:
    """The figures of a policy, in a process of its own and on one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    trace = open_trace(file)
    everything = sum(site.units * unit_bytes(site, WEIGHTS) for site in trace.sites)
    slots = divide_slots(trace.sites, WEIGHTS, int(SHARE * everything))
    records = [unit_bytes(site, WEIGHTS) for site in trace.sites]
    seconds, before, peak = [], own_bytes(), 0

    def watch(*_: int) -> None:
        nonlocal peak
        peak = max(peak, own_bytes())

    for _ in range(ROUNDS):
        start = time.perf_counter()
        found = replay(trace, slots, policy, records, watch)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    units = trace.tokens * sum(site.units for site in trace.sites)
    return {
        "policy": policy,
        "tokens": trace.tokens,
        "seconds": round(median, 2),
        "million_units_a_second": round(units / median / 1e6),
        "million_wanted_a_second": round((found.hits + found.misses) / median / 1e6),
        "hit_rate": round(found.hit_rate() or 0, 4),
        "memory_mib": round((peak - before) / 2**20, 1),
    }


def main() -> None:
    rows = []
    fresh = {"max_workers": 1, "max_tasks_per_child": 1, "mp_context": get_context("spawn")}
    with (
        tempfile.TemporaryDirectory(prefix="dipnet-replay-") as folder,
        ProcessPoolExecutor(**fresh) as processes,
    ):
        files = {tokens: Path(folder) / f"{tokens}.trace" for tokens in (SHORT, TOKENS)}
        for tokens, file in files.items():
            write_trace(file, tokens)
            for policy in POLICIES:
                rows.append(processes.submit(measure, file, policy).result())
                print(" ".join(f"{name}={value}" for name, value in rows[-1].items()), flush=True)
    print(json.dumps({"benchmark": "replay_speed", "machine": platform.processor(), "rows": rows}))


if __name__ == "__main__":
    main()
