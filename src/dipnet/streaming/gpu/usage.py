"""What was touched, counted on the device: hits and misses of the caches there, and the figures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple
from typing import Any

import torch
from torch import nn

from dipnet.methods.base import Method, SiteKey
from dipnet.models.usage import CacheUsage, Usage
from dipnet.streaming.engine import Key
from dipnet.streaming.gpu.groups import CachedGroup, DeviceGroup
from dipnet.streaming.stats import SiteStats, Stats, process_bytes
from dipnet.units import ModelSpec


class DeviceUsage(Usage):
    """`Usage` whose caches are on the device: their hits are read when somebody asks."""

    def __init__(self, method: Method, spec: ModelSpec) -> None:
        self.groups: Mapping[Key, DeviceGroup] = {}
        self._earlier = 0
        super().__init__(method, spec)

    def reset(self) -> None:
        """Forget all counts."""
        self._earlier = self.decoded()
        super().reset()
        self._before = self._seen()

    def decoded(self) -> int:
        """Tokens that were ever decoded: no reset forgets them."""
        return self._earlier + (0 if self.steps is None else self.steps.decoded())

    def cache(self) -> CacheUsage:
        """Hits and misses so far, of the sites that have a cache and have used it."""
        found = {key: hits - self._before.get(key, 0) for key, hits in self._seen().items()}
        held = {key: self._kept_units(key) for key in self.sites if key not in found}
        used = self.steps is not None and self.steps.decoded() > 0
        self._hits = {**found, **held} if used else {}
        return super().cache()

    def _seen(self) -> dict[SiteKey, int]:
        groups = {key: self.groups.get(key) for key in self.sites}
        return {
            key: int(group.cache.counts[0])
            for key, group in groups.items()
            if isinstance(group, CachedGroup)
        }


class DeviceRecorder:
    """Times the calls of one model, and collects its statistics.

    Nothing waits for the device, so that time is not divided: all of it is ``other``. Of groups
    whose records are all on the device nothing is counted.
    """

    def __init__(self, groups: Mapping[Key, DeviceGroup], usage: DeviceUsage) -> None:
        self._groups = groups
        self._usage = usage
        self._begun: float | None = None
        self.in_loop = False
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self._prompts = 0
        self._total = 0.0
        self._tokens = self._usage.decoded()
        self._before = {key: _seen(group) for key, group in self._groups.items()}
        for group in self._groups.values():
            group.streamed_bytes = 0

    def watch(self, model: nn.Module) -> None:
        """Time the forward calls of a model."""
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end, always_call=True)

    def _begin(self, *_: Any) -> None:
        self._begun = None if self.in_loop else time.perf_counter()

    def _end(self, *_: Any) -> None:
        if self._begun is not None:
            self._total += time.perf_counter() - self._begun
        self._begun = None

    @contextmanager
    def loop(self) -> Iterator[None]:
        """Time our decode loop, the prompt's forward call among it."""
        begun, self.in_loop = time.perf_counter(), True
        try:
            yield
        finally:
            self._total += time.perf_counter() - begun
            self.in_loop = False

    def prompt(self) -> None:
        """A call begins that decodes no token."""
        self._prompts += 1

    def stats(self) -> Stats:
        """The figures so far."""
        tokens = self._usage.decoded()
        seen = {key: _seen(g).since(self._before[key]) for key, g in self._groups.items()}
        names = dict.fromkeys(name for _, name in seen)
        sites = {name: SiteStats(*map(sum, zip(*_of(name, seen), strict=True))) for name in names}
        read = sum(
            seen[key].read * group.records.units.shape[1] + group.streamed_bytes
            for key, group in self._groups.items()
        )
        return Stats(
            calls=self._prompts + tokens - self._tokens,
            total=self._total,
            selection=0.0,
            guessing=0.0,
            disk=0.0,
            kernels=0.0,
            other=self._total,
            disk_busy=0.0,
            bytes_read=read,
            reads=sum(site.read for site in sites.values()),
            peak_memory=self._peak_memory(),
            sites=sites,
        )

    def _peak_memory(self) -> int:
        steps = self._usage.steps
        if steps is not None and steps.tokens.is_cuda:
            return torch.cuda.max_memory_allocated(steps.tokens.device)
        return process_bytes("VmHWM")


def _seen(group: DeviceGroup) -> SiteStats:
    """What a group's cache ever saw; nothing where all records are there."""
    if not isinstance(group, CachedGroup):
        return SiteStats(0, 0, 0, 0, 0, 0)
    hits, misses, _ = group.cache.counts.tolist()
    return SiteStats(hits, misses, misses, 0, 0, 0)


def _of(name: str, groups: Mapping[Key, SiteStats]) -> list[tuple[Any, ...]]:
    """The counts of the groups of that name."""
    return [astuple(site) for (_, each), site in groups.items() if each == name]
