"""`dipnet probe` on the command line; what it measures is replaced by a preset with costs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dipnet.eval import probe as measuring
from dipnet.sim.device import Device, load_device
from tests.cli.conftest import Run
from tests.sim.test_device import costs

MEASURED = load_device("laptop-nvme").model_copy(update={"engine": costs(layer=1e-3)})


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe that knows its answer."""

    def probe(_folder: Path, name: str, progress: Callable[[str, float], object]) -> Device:
        progress("disk", 0.5)
        return MEASURED.model_copy(update={"name": name})

    monkeypatch.setattr(measuring, "probe", probe)


def test_the_file_is_a_device(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "here.json"
    done = run("probe", "--out", str(file), "--folder", str(tmp_path))
    assert done.code == 0, done.err
    assert "Disk: MB/s" in done.out
    assert "262,144" in done.out
    assert load_device(file) == MEASURED.model_copy(update={"name": "here"})


def test_json_is_the_device(run: Run) -> None:
    found = run("probe", "--json").json
    assert Device.model_validate_json(MEASURED.model_dump_json()).flash.curve
    assert found == {**MEASURED.model_dump(mode="json"), "name": "probed"}


def test_a_file_that_cannot_be_written_is_said_before_the_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Device:
        raise AssertionError("measured in vain")

    monkeypatch.setattr(measuring, "probe", never)
    done = run("probe", "--out", str(tmp_path / "missing" / "here.json"))
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "does not exist" in done.err
    assert os.listdir(tmp_path) == []


def test_an_interruption_leaves_no_file(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Device:
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "probe", interrupted)
    assert run("probe", "--out", str(tmp_path / "here.json")).code == 130
    assert os.listdir(tmp_path) == []
