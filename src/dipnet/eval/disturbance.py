"""Processor time that others take while something is measured: programs, and virtual machines.

Linux counts both; elsewhere nothing is known, and nobody disturbs.
"""

from __future__ import annotations

import os
from pathlib import Path

STATISTICS = Path("/proc/stat")
"""Its first line has the ticks of all processors: user, nice, system, idle, iowait, irq, softirq,
steal (what the host gave to other virtual machines). The system's own may be for our reads: its
threads do not say for whom they work."""


class Disturbance:
    """What others take from now on."""

    def __init__(self) -> None:
        self._began = _ticks()

    @property
    def share(self) -> float:
        """Of all processors' time since then: from 0 to 1.

        What this process and the children that it has waited for take is not others', nor is what
        the system takes.
        """
        passed, others = (now - then for now, then in zip(_ticks(), self._began, strict=True))
        return min(1.0, max(0.0, others / passed)) if passed > 0 else 0.0


def _ticks() -> tuple[float, float]:
    """Ticks of all processors so far: all that have passed, and those that others took."""
    try:
        words = STATISTICS.read_text().split("\n", 1)[0].split()[1:9]
        ticks = [int(word) for word in words]
    except (OSError, ValueError):
        return 0.0, 0.0
    if len(ticks) < 8:
        return 0.0, 0.0
    user, nice, steal = ticks[0], ticks[1], ticks[7]
    return sum(ticks), user + nice + steal - _own_ticks()


def _own_ticks() -> float:
    """Ticks of this process and of its children, without the system's for them."""
    times = os.times()
    return (times.user + times.children_user) * os.sysconf("SC_CLK_TCK")
