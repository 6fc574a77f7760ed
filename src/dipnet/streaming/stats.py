"""Where the time of a streamed model goes, and what it read."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields, replace
from operator import sub
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from dipnet.streaming.engine import Engine, Key
from dipnet.streaming.linear import Seconds
from dipnet.streaming.worth import Worth

_STATUS = Path("/proc/self/status")


def process_bytes(field: str = "VmRSS") -> int:
    """Memory of this process: ``VmRSS`` now, ``VmHWM`` at most so far; 0 where Linux is not."""
    if not _STATUS.is_file():
        return 0
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return 0


@dataclass(frozen=True)
class SiteStats:
    """Units wanted by tokens of one kind of site, over all layers, and what became of them.

    ``hits`` and ``misses`` are the cache's; ``read`` counts records that a request read, and
    ``guessed`` those read ahead, of which ``useful`` were wanted; of these, ``early``
    had arrived when they were asked for.
    """

    hits: int
    misses: int
    read: int
    guessed: int
    useful: int
    early: int

    def since(self, earlier: SiteStats) -> SiteStats:
        """What was counted after ``earlier``."""
        return SiteStats(*map(sub, astuple(self), astuple(earlier)))

    @property
    def hit_rate(self) -> float | None:
        """The share of wanted units that were in memory; None when none was wanted."""
        wanted = self.hits + self.misses
        return self.hits / wanted if wanted else None


@dataclass(frozen=True)
class Stats:
    """What a model did since its counts were reset; times in seconds, sizes in bytes.

    ``total`` is the time inside forward calls. It divides into ``selection`` (scores, masks, the
    caches' bookkeeping), ``guessing`` (of masks, to read ahead), ``disk`` (waiting for records with
    nothing to compute), ``kernels`` (products) and ``other`` (the rest of the model). ``disk_busy``
    is the time in which a read was under way, whatever else went on.
    """

    calls: int
    total: float
    selection: float
    guessing: float
    disk: float
    kernels: float
    other: float
    disk_busy: float
    bytes_read: int
    reads: int
    peak_memory: int
    sites: dict[str, SiteStats]

    def since(self, earlier: Stats) -> Stats:
        """What was done after ``earlier``, statistics of the same model; the peak stays."""
        values = {name: getattr(self, name) - getattr(earlier, name) for name in _COUNTED}
        sites = {name: site.since(earlier.sites[name]) for name, site in self.sites.items()}
        return replace(self, **values, sites=sites)

    @property
    def disk_rate(self) -> float | None:
        """Bytes per second while the disk was busy; None when it never was."""
        return self.bytes_read / self.disk_busy if self.disk_busy else None


_COUNTED = [f.name for f in fields(Stats) if f.name not in ("peak_memory", "sites")]


class Counting(Protocol):
    """What a loaded model's statistics come from."""

    def reset(self) -> None:
        """Start counting anew."""

    def stats(self) -> Stats:
        """The figures so far."""


class Recorder:
    """Times the calls of one model, and collects its statistics."""

    def __init__(self, engine: Engine, seconds: Seconds, worth: Worth) -> None:
        self._engine = engine
        self._seconds = seconds
        self._worth = worth
        self._begun = 0.0
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self._calls = 0
        self._total = 0.0
        self._seconds.selection = self._seconds.guessing = 0.0
        self._engine.reset_totals()
        self._reader = self._engine.reader_totals()

    def watch(self, model: nn.Module) -> None:
        """Time the forward calls of a model."""
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)

    def _begin(self, _module: nn.Module, _args: Any) -> None:
        self._begun = time.perf_counter()

    def _end(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._calls += 1
        took = time.perf_counter() - self._begun
        self._total += took
        self._worth.token(took)

    def stats(self) -> Stats:
        """The figures so far."""
        groups = {g.key: g for g in self._engine.index.groups}
        totals = {key: self._engine.totals(key) for key in groups}
        reader = self._engine.reader_totals()
        parts = {
            "selection": self._seconds.selection + _sum(totals, "bookkeeping"),
            "guessing": self._seconds.guessing,
            "disk": _sum(totals, "wait"),
            "kernels": _sum(totals, "kernels"),
        }
        return Stats(
            calls=self._calls,
            total=self._total,
            **parts,
            other=max(0.0, self._total - sum(parts.values())),
            disk_busy=reader["busy"] - self._reader["busy"],
            bytes_read=reader["bytes"] - self._reader["bytes"],
            reads=reader["reads"] - self._reader["reads"],
            peak_memory=process_bytes("VmHWM"),
            sites=_by_site(totals),
        )


def _sum(totals: Mapping[Key, Mapping[str, Any]], name: str) -> float:
    return float(sum(each[name] for each in totals.values()))


def _by_site(totals: Mapping[Key, Mapping[str, Any]]) -> dict[str, SiteStats]:
    names = dict.fromkeys(name for _, name in totals)
    counts = ("hits", "misses", "read", "guessed", "useful", "early")
    return {
        name: SiteStats(*(sum(t[c] for key, t in totals.items() if key[1] == name) for c in counts))
        for name in names
    }
