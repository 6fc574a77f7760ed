"""Tiny checkpoints on disk, and a way to run the command line in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dipnet.cli import main
from dipnet.methods.allocation import Allocation
from dipnet.models.families import describe
from dipnet.models.load import empty_model, load_config
from tests.checkpoints import WORDS, save_llama, save_opt
from tests.matrix import allocated


@dataclass(frozen=True)
class Result:
    """What one call of the command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="session")
def opt(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_opt(tmp_path_factory.mktemp("opt")))


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_text(WORDS * 6)
    return str(file)


@pytest.fixture
def allocation(llama: str, tmp_path: Path) -> str:
    """The file of an allocation for that model, far from an even one."""
    file = tmp_path / "half.json"
    spec = describe(empty_model(load_config(llama)))
    found = allocated(spec).allocation
    assert isinstance(found, Allocation)
    found.save(file)
    return str(file)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call ``main()`` as the console script does."""

    def call(*arguments: str) -> Result:
        monkeypatch.setattr("sys.argv", ["dipnet", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        code = exit_.value.code
        return Result(code if isinstance(code, int) else 0, captured.out, captured.err)

    return call


@pytest.fixture
def error(run: Run) -> Callable[..., str]:
    """Call ``main()`` with arguments that must fail; the message of the one line it prints."""

    def call(*arguments: str) -> str:
        result = run(*arguments)
        assert result.code == 2
        assert result.out == ""
        start, newline = "dipnet: error: ", "\n"
        assert result.err.startswith(start), result.err
        assert result.err.count(newline) == 1, result.err
        return result.err.removeprefix(start).strip()

    return call
