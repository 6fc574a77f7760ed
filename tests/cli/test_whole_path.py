"""From a checkpoint to a packed model that runs, with all that wins quality back: one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import WORDS
from tests.cli.conftest import Run

MEASURED = ("--windows", "4", "--window", "32", "--density", "0.5", "--json")
SMALL = ("--window", "32", "--steps", "2", "--batch-size", "2")
LEARNED = ("--window", "32", "--rank", "4", "--steps", "20", "--batch", "2", "--rate", "0.05")
NO_CACHE = ("--cache", "1B")
"""Every record that a token wants is read: bytes do not depend on what it wants."""


def test_the_whole_path(run: Run, llama: str, tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text(WORDS * 30)
    names = ("rotated", "norms", "half.json", "adapted", "store", "plain")
    rotated, norms, half, adapted, store, plain = (str(tmp_path / name) for name in names)
    merged, text = f"{adapted}/merged", ("--text", str(book))
    scored = f"dip:scores={norms}"
    divided = f"{scored},allocation={half}"

    def done(*arguments: str) -> None:
        result = run(*arguments)
        assert result.code == 0, result.err

    def row(model: str, method: str, *options: str) -> Any:
        return run("eval", model, *text, "--method", method, *MEASURED, *options).json["rows"][1]

    done("rotate", llama, *text, "--window", "32", "--out", rotated)
    done("fit", "scores", rotated, "--kind", "norm", "--out", norms)
    done("fit", "allocation", rotated, *text, "--method", scored, *SMALL, "--out", half)
    learned = ("--kl", "0", "--cross-entropy", "1", *LEARNED)
    done("adapt", rotated, *text, "--method", divided, "--out", adapted, *learned)
    packed = ("--weights", "int8", "--block", "1", "--allocation", half)
    done("pack", merged, store, *packed)
    done("pack", rotated, plain, *packed)
    done("check", store)

    whole, streamed = row(merged, divided), row(store, scored, *NO_CACHE)
    before = row(rotated, divided)
    assert whole["perplexity"] < 0.9 * before["perplexity"]
    assert streamed["store"]["own_allocation"]
    rounding = pytest.approx(whole["perplexity"], rel=2e-3)
    assert streamed["perplexity"] == rounding
    assert row(store, divided, *NO_CACHE)["perplexity"] == streamed["perplexity"]
    without = row(store, f"{scored},allocation=none", *NO_CACHE)
    assert without["perplexity"] != streamed["perplexity"]
    assert without["density"]["sites"] != streamed["density"]["sites"]
    assert streamed["density"]["sites"] == whole["density"]["sites"] == before["density"]["sites"]
    unadapted = row(plain, scored, *NO_CACHE)
    assert streamed["store"]["bytes_per_token"] == unadapted["store"]["bytes_per_token"] > 0
    made = run("run", store, "--prompt", "The ship", "--method", scored, "--max-new-tokens", "3")
    assert made.code == 0
    assert "the store's allocation" in made.err
