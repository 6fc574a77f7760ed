"""Processor time that others take while something is measured: programs, and virtual machines."""

from __future__ import annotations

import os

import psutil

QUIET = 0.03
"""The share of all processors' time that others may take without a word about it."""


class Disturbance:
    """What others take from now on."""

    def __init__(self) -> None:
        self._began = _seconds()

    @property
    def share(self) -> float:
        """Of all processors' time since then: from 0 to 1.

        What this process and the children that it has waited for take is not others', nor is what
        the system takes: its threads do not say for whom they work, and it may be our reads.
        """
        passed, others = (now - then for now, then in zip(_seconds(), self._began, strict=True))
        return min(1.0, max(0.0, others / passed)) if passed > 0 else 0.0


def _seconds() -> tuple[float, float]:
    """Of all processors so far: what has passed, and what others took.

    Steal is what a host gave to other virtual machines. Only some systems have it, or niceness;
    guests' time is within users'.
    """
    times = psutil.cpu_times()._asdict()
    passed = sum(taken for name, taken in times.items() if not name.startswith("guest"))
    used = sum(times.get(name, 0.0) for name in ("user", "nice", "steal"))
    return passed, used - _own_seconds()


def _own_seconds() -> float:
    """Of this process and of its children, without the system's for them."""
    times = os.times()
    return times.user + times.children_user
