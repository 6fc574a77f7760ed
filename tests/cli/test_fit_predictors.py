"""``dipnet fit predictors``: a file that the other commands use, or one line that says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import dipnet
from dipnet.methods.predictors import Predictors
from tests.checkpoints import WORDS
from tests.cli.conftest import Run

Error = Callable[..., str]
QUICK = ("--rank", "4", "--epochs", "2", "--batch", "128")


@pytest.fixture
def book(tmp_path: Path) -> str:
    """A text that is long enough."""
    file = tmp_path / "book.txt"
    file.write_text(WORDS * 120)
    return str(file)


def test_what_is_fitted_is_used(run: Run, opt: str, book: str, tmp_path: Path) -> None:
    file = str(tmp_path / "opt.predictors")
    found = run("fit", "predictors", opt, "--text", book, "--out", file, *QUICK, "--json").json
    assert found["schema"] == "dipnet.fit-predictors/1"
    assert found["out"] == file
    assert found["text"]["name"] == book
    assert {kind: len(rows) for kind, rows in found["held_out"].items()} == {"mlp": 2, "head": 2}
    assert Predictors.load(file).card["held_out"] == found["held_out"]
    method = f"dejavu:mlp_density=0.2,head_density=0.5,predictors={file}"
    rows = run("eval", opt, "--text", book, "--windows", "2", "--method", method, "--json").json
    assert rows["rows"][-1]["perplexity"] > 0


def test_the_table(run: Run, llama: str, book: str, tmp_path: Path) -> None:
    file = tmp_path / "llama.predictors"
    arguments = ("--kind", "mlp", "--mlp-density", "0.25", "--target", "0.3", "--look-ahead", "2")
    result = run("fit", "predictors", llama, "--text", book, "--out", str(file), *QUICK, *arguments)
    assert result.code == 0
    assert "MLP neurons, 0.250 of them kept" in result.out
    assert "attention heads" not in result.out
    assert "fitted on" in result.out
    made = Predictors.load(file)
    assert (made.kinds, made.look_ahead) == (("mlp",), 2)
    assert made.card["settings"]["targets"] == {"mlp": 0.3}


def test_no_more_of_the_text_than_is_asked_for(
    run: Run, opt: str, book: str, tmp_path: Path
) -> None:
    file = str(tmp_path / "a")
    arguments = ("--tokens", "1400", "--kind", "heads", "--seed", "3", "--criterion", "gradient")
    found = run(
        *("fit", "predictors", opt, "--text", book, "--out", file, *QUICK, *arguments, "--json")
    ).json
    assert found["text"]["tokens"] == 1400
    assert (found["settings"]["seed"], found["settings"]["criterion"]) == (3, "gradient")
    assert found["settings"]["mlp_density"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target", "most"), "--target is active or a share such as 0.2, not 'most'"),
        (("--look-ahead", "5"), "look_ahead is one of 0, 1, 2 blocks, not 5"),
        (("--mlp-density", "0"), "mlp_density must be in (0, 1], got 0"),
        (("--buffer", "much"), "'much' is no size in memory"),
        (("--buffer", "1KiB"), "a buffer of 1024 bytes holds no batch"),
        (("--window", "65"), "--window 65 is longer than the context"),
        (("--tokens", "100"), "the text is too short to fit predictors on"),
        (("--target", "active"), "every neuron of layer 0 is wanted by every token"),
        (("--text", "none.txt"), "there is no text file none.txt"),
        (("--out", "none/file"), "the folder none does not exist"),
        (("--kind", "neurons"), "Invalid value for '--kind'"),
    ],
)
def test_bad_input(
    error: Error, llama: str, book: str, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = ("--text", book, "--out", str(tmp_path / "a.predictors"), *QUICK)
    assert message in error("fit", "predictors", llama, *given, *arguments)
    assert [each.name for each in tmp_path.iterdir()] == ["book.txt"]


def test_what_is_missing(error: Error, llama: str, tmp_path: Path) -> None:
    assert "Missing option '--out'" in error("fit", "predictors", llama)
    out = ("--out", str(tmp_path / "a"))
    assert "what shall be fitted on for" in error("fit", "predictors", llama, *out)
    assert "No such command 'predictor'" in error("fit", "predictor")


def test_an_interrupted_fit(
    run: Run, llama: str, book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(vars(dipnet), "fit_predictors", interrupted)
    file = tmp_path / "a.predictors"
    result = run("fit", "predictors", llama, "--text", book, "--out", str(file))
    assert result.code == 130
    assert f"nothing was written to {file}" in " ".join(result.err.split())
    assert not file.exists()


def test_the_group_names_what_can_be_fitted(run: Run) -> None:
    shown = run("fit", "--help").out
    assert "split" in shown
    assert "predictors" in shown
