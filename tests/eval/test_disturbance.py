"""What others take of the processors' time."""

from __future__ import annotations

from pathlib import Path

import pytest

from dipnet.eval import disturbance
from dipnet.eval.disturbance import Disturbance


def said(file: Path, *ticks: int) -> None:
    """Let a file say what Linux would of so many ticks, from user to steal."""
    file.write_text("cpu  " + " ".join(map(str, ticks)) + " 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In the place of Linux's own; this process took nothing."""
    made = tmp_path / "stat"
    monkeypatch.setattr(disturbance, "STATISTICS", made)
    monkeypatch.setattr(disturbance, "_own_ticks", lambda: 0.0)
    return made


def test_programs_and_virtual_machines_count_and_the_system_does_not(file: Path) -> None:
    said(file, 100, 0, 50, 1000, 10, 0, 0, 7)
    watch = Disturbance()
    said(file, 120, 3, 57, 1090, 40, 0, 0, 57)
    assert watch.share == pytest.approx(73 / 200)


def test_what_this_process_takes_is_not_others(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = iter((30.0, 50.0))
    monkeypatch.setattr(disturbance, "_own_ticks", lambda: next(own))
    said(file, 100, 0, 0, 100, 0, 0, 0, 0)
    watch = Disturbance()
    said(file, 125, 0, 0, 175, 0, 0, 0, 0)
    assert watch.share == pytest.approx(0.05)


@pytest.mark.parametrize("text", ["", "cpu 1 2 3\n", "cpu a b c d e f g h\n"])
def test_nothing_is_known_of_other_systems(file: Path, text: str) -> None:
    file.write_text(text)
    assert Disturbance().share == 0.0
