"""What the benchmarks of whole decoders share: settings, rounds, medians, the machine's limits."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import cgroup

from dipnet.eval.disturbance import QUIET, Disturbance

FOLDER = Path("/var/tmp/dipnet-bench")
BENCHMARKS = Path(__file__).parent
TRIES = 10
"""Of a measurement, until others take less."""
PAUSE = 20.0
"""Seconds until the next try."""
Measured = TypeVar("Measured")


class Failed(Exception):
    """One line: why a setting gave no figures."""


@dataclass(frozen=True)
class Setting:
    """A decoder to measure: a command that ends with one JSON line, and the file it reads."""

    name: str
    command: Sequence[str]
    reads: Path


@dataclass
class Rounds:
    """The figures of one setting, one entry a round; `failure` says why there are none."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    failure: str = ""

    def median(self, name: str) -> float:
        """The median over the rounds of a figure; not a number where there is none."""
        values = [run[name] for run in self.runs if run.get(name) is not None]
        return statistics.median(values) if values else float("nan")

    def ratio(self, other: Rounds, name: str = "median_seconds") -> float:
        """How many times as large the other's figure is: the median over paired rounds."""
        pairs = [(b[name], a[name]) for a, b in zip(self.runs, other.runs, strict=False)]
        return statistics.median(b / a for b, a in pairs) if pairs else float("nan")


def last_json(text: str) -> dict[str, Any]:
    """The JSON line that a benchmark ended with."""
    lines = text.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        raise Failed("it printed no figures")
    return json.loads(lines[-1])


def run_limited(setting: Setting, limit: int, timeout: float) -> dict[str, Any]:
    """The setting's figures from a cgroup of `limit` bytes, its file not in the page cache."""
    done = cgroup.run(setting.command, limit, [setting.reads], timeout)
    if done.timed_out:
        raise Failed(f"not ready after {timeout:g} s")
    if done.oom_kills:
        raise Failed(f"killed: more than {limit / 2**30:g} GiB of memory")
    if done.returncode:
        raise Failed(f"exit status {done.returncode}")
    return last_json(done.stdout) | {"cgroup_peak": done.peak}


def run_free(setting: Setting, timeout: float) -> dict[str, Any]:
    """The setting's figures without any limit."""
    try:
        done = subprocess.run(
            setting.command, stdout=subprocess.PIPE, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"not ready after {timeout:g} s") from None
    if done.returncode:
        raise Failed(f"exit status {done.returncode}")
    return last_json(done.stdout)


def interleave(
    settings: Sequence[Setting], rounds: int, measure: Callable[[Setting], dict[str, Any]]
) -> dict[str, Rounds]:
    """Every setting once a round, as disks and machines change from minute to minute.

    A setting that fails is not tried again.
    """
    results = {setting.name: Rounds() for setting in settings}
    for number in range(rounds):
        for setting in settings:
            result = results[setting.name]
            if result.failure:
                continue
            try:
                figures = measure(setting)
            except Failed as error:
                result.runs.clear()
                result.failure = str(error)
                print(f"round {number + 1}: {setting.name}: {error}", flush=True)
                continue
            result.runs.append(figures)
            seconds = figures["median_seconds"]
            print(f"round {number + 1}: {setting.name}: {seconds:.3f} s/token", flush=True)
    return results


def undisturbed(measure: Callable[[], Measured]) -> tuple[Measured, float]:
    """What is measured while others are quiet, and the share of the processors' time they took.

    That of the first try in which they are, else of the one in which they took least. Only what
    others take decides, not what is measured.
    """
    found: list[tuple[float, Measured]] = []
    while len(found) < TRIES:
        if found:
            time.sleep(PAUSE)
        others = Disturbance()
        measured = measure()
        found.append((others.share, measured))
        if found[-1][0] <= QUIET:
            break
    share, measured = min(found, key=lambda each: each[0])
    return measured, share


def json_line(result: Any) -> str:
    """The last line of a benchmark; what is not a number becomes null, which JSON knows."""
    if isinstance(result, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {json_line(v)}" for k, v in result.items()) + "}"
    if isinstance(result, list):
        return "[" + ", ".join(map(json_line, result)) + "]"
    return "null" if result != result else json.dumps(result)


def dram_bandwidth(threads: int, tries: int = 8) -> float:
    """Bytes per second of reading 1 GiB: the best of some sums with torch."""
    import torch

    torch.set_num_threads(threads)
    values, best = torch.ones(1 << 28), float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - start)
    return values.nbytes / best


def percent(value: float, digits: int = 0) -> str:
    """A share for the table; nothing where there is none."""
    return f"{value:.{digits}%}" if value == value else ""


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as their widest cell, numbers to the right."""
    table = [header, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    for first, *others in table:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join(cells).rstrip())
