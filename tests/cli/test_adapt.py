"""``dipnet adapt``: a folder that the other commands use, or one line that says why not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import dipnet
from tests.checkpoints import WORDS
from tests.cli.conftest import Run

Error = Callable[..., str]
QUICK = ("--window", "32", "--rank", "4", "--steps", "3", "--batch", "2")


@pytest.fixture
def book(tmp_path: Path) -> str:
    """A text of a few windows."""
    file = tmp_path / "book.txt"
    file.write_text(WORDS * 30)
    return str(file)


def test_three_commands(run: Run, llama: str, book: str, tmp_path: Path) -> None:
    """Adapt, pack, and measure from the store: perplexity is torch's, but for rounding."""
    out, store = tmp_path / "out", str(tmp_path / "store")
    losses = ("--kl", "0", "--cross-entropy", "1", "--rate", "0.05", "--steps", "20")
    found = run("adapt", llama, "--text", book, "--out", str(out), *QUICK, *losses, "--json").json
    assert found["schema"] == "dipnet.adapt/1"
    assert found["text"]["name"] == book
    assert found["method"].startswith("DIP(density=0.5")
    assert found["settings"]["window"] == 32
    assert found["perplexity"]["adapted"] < 0.95 * found["perplexity"]["masked"]
    merged = str(out / "merged")
    run("pack", merged, store, "--weights", "bf16")
    measured = ("--text", book, "--windows", "3", "--window", "32", "--density", "0.5")
    rows = run("eval", merged, *measured, "--json").json["rows"]
    streamed = run("eval", store, *measured, "--json").json["rows"]
    plain = run("eval", llama, *measured, "--json").json["rows"]
    assert streamed[-1]["perplexity"] == pytest.approx(rows[-1]["perplexity"], rel=0.02)
    assert rows[-1]["perplexity"] < 0.95 * plain[-1]["perplexity"]
    assert rows[-1]["density"] == plain[-1]["density"]  # no byte more for a token
    assert run("run", merged, "--prompt", "The ship", "--max-new-tokens", "2").code == 0


def test_the_table(run: Run, llama: str, book: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("adapt", llama, "--text", book, "--out", str(out), *QUICK, "--checkpointing")
    assert result.code == 0
    assert "perplexity of held-out text" in result.out
    assert "trained on 192 tokens" in result.out


def test_with_a_cache_and_with_thresholds(run: Run, llama: str, book: str, tmp_path: Path) -> None:
    cached = ("--method", "dip:cache_aware=0.2", "--cache", "0.5", "--policy", "lfu")
    teal = ("--method", "teal", "--density", "0.6", "--accumulate", "2", "--precision", "bfloat16")
    for name, arguments in (("cached", cached), ("teal", teal)):
        given = ("--text", book, "--out", str(tmp_path / name), *QUICK, *arguments)
        found = run("adapt", llama, *given, "--json").json
        assert found["tokens"]["trained"] == 3 * 2 * 32
    assert found["settings"]["precision"] == "bfloat16"


def test_an_interrupted_training_says_how_to_go_on(
    run: Run, llama: str, book: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(vars(dipnet), "fit_adapters", interrupted)
    result = run("adapt", llama, "--text", book, "--out", str(tmp_path / "out"), *QUICK)
    assert result.code == 130
    assert "repeat the command to go on" in " ".join(result.err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "none.txt"), "there is no text file none.txt"),
        (("--rate", "0"), "rate is a number above 0"),
        (("--kl", "0"), "one of them above 0"),
        (("--window", "65"), "--window 65 is longer than the context"),
        (("--cache", "1.5"), "a cache's share must be in 0..1"),
        (("--cache", "0.5"), "a cache changes no mask of dip as it is"),
        (("--cache", "0.5", "--policy", "fifo"), "unknown cache policy 'fifo'"),
        (("--accumulate", "3"), "2 windows of a step cannot be computed in 3 parts"),
        (("--method", "dipp"), "unknown method 'dipp'"),
        (("--density", "2"), "density must be in (0, 1]"),
        (("--precision", "half"), "Invalid value for '--precision'"),
        (("--device", "tpu"), "unknown device 'tpu'"),
    ],
)
def test_bad_input(
    error: Error, llama: str, book: str, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    given = ("--text", book, "--out", str(tmp_path / "out"), *QUICK)
    assert message in error("adapt", llama, *given, *arguments)
    assert [each.name for each in tmp_path.iterdir()] == ["book.txt"]


def test_a_short_text_and_a_missing_option(
    error: Error, llama: str, text: str, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text(WORDS)
    short = ("--text", str(tmp_path / "short.txt"), "--out", str(tmp_path / "out"), *QUICK)
    assert "tokens, and two windows of 32 are needed" in error("adapt", llama, *short)
    assert "Missing option '--text'" in error("adapt", llama, "--out", str(tmp_path / "out"))
