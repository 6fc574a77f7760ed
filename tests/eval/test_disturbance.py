"""What others take of the processors' time."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable

import psutil
import pytest

from dipnet.eval import disturbance
from dipnet.eval.disturbance import Disturbance

Say = Callable[..., None]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """Lets the system say such seconds so far; this process took nothing."""
    monkeypatch.setattr(disturbance, "_own_seconds", lambda: 0.0)

    def said(**seconds: float) -> None:
        made = namedtuple("Times", seconds)(**seconds)
        monkeypatch.setattr(psutil, "cpu_times", lambda: made)

    return said


def test_programs_and_virtual_machines_count_and_the_system_does_not(say: Say) -> None:
    say(user=100, nice=0, system=50, idle=1000, iowait=10, steal=7, guest=4)
    watch = Disturbance()
    say(user=120, nice=3, system=57, idle=1090, iowait=40, steal=57, guest=9)
    assert watch.share == pytest.approx(73 / 200)


def test_systems_without_steal(say: Say) -> None:
    say(user=100, system=50, idle=1000)
    watch = Disturbance()
    say(user=110, system=80, idle=1060)
    assert watch.share == pytest.approx(0.1)


def test_what_this_process_takes_is_not_others(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    own = iter((30.0, 50.0))
    monkeypatch.setattr(disturbance, "_own_seconds", lambda: next(own))
    say(user=100, idle=100)
    watch = Disturbance()
    say(user=125, idle=175)
    assert watch.share == pytest.approx(0.05)


def test_nothing_passed(say: Say) -> None:
    say(user=100, idle=100)
    assert Disturbance().share == 0.0
