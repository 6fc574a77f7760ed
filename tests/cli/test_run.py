"""``dipnet run``."""

from pathlib import Path

import pytest

from tests.checkpoints import CONTEXT, WORDS
from tests.cli.conftest import Run

PROMPT = ("--prompt", WORDS)


def test_text_on_stdout_and_figures_on_stderr(run: Run, llama: str) -> None:
    result = run("run", llama, *PROMPT, "--max-new-tokens", "8")
    figures = run("run", llama, *PROMPT, "--max-new-tokens", "8", "--json").json
    assert result.code == 0
    assert result.out == figures["text"] + "\n"
    for word in ("dip, density 0.5", "8 new", "tokens/s", "MLP density", "peak memory"):
        assert word in result.err


def test_json(run: Run, llama: str) -> None:
    found = run(
        *("run", llama, *PROMPT, "--method", "dip:split=1.2", "--density", "0.4", "--json"),
        *("--max-new-tokens", "8", "--temperature", "0.9", "--top-p", "0.8", "--seed", "3"),
    ).json
    assert found["schema"] == "dipnet.run/1"
    assert found["method"] == "dip:split=1.2"
    assert found["parameters"].items() >= {"density": 0.4, "split": 1.2}.items()
    assert (found["temperature"], found["top_p"], found["seed"]) == (0.9, 0.8, 3)
    assert found["new_tokens"] == 8
    assert found["stopped"] == "length"
    assert found["density"]["tokens"] == 7  # the first new token comes from the dense prompt
    assert found["density"]["mlp"] == pytest.approx(0.4, abs=0.03)
    assert found["tokens_per_second"] > 0
    assert found["peak_memory_bytes"] > 2**20


def test_a_sparse_prompt_is_counted(run: Run, llama: str) -> None:
    arguments = ("run", llama, *PROMPT, "--max-new-tokens", "4", "--json")
    found = run(*arguments, "--prefill", "sparse").json
    assert found["density"]["tokens"] == found["prompt_tokens"] + 3


def test_dense_is_a_method(run: Run, llama: str) -> None:
    found = run("run", llama, *PROMPT, "--method", "dense", "--max-new-tokens", "3", "--json").json
    assert found["density"]["total"] == 1


def test_density_one_writes_the_dense_text(run: Run, llama: str) -> None:
    tail = ("--max-new-tokens", "8", "--json")
    dense = run("run", llama, *PROMPT, "--method", "dense", *tail).json
    full = run("run", llama, *PROMPT, "--density", "1", "--prefill", "sparse", *tail).json
    assert full["text"] == dense["text"]


def test_a_calibrated_method(run: Run, llama: str, text: str) -> None:
    found = run(
        *("run", llama, *PROMPT, "--method", "cats", "--calibration", text),
        *("--max-new-tokens", "4", "--json"),
    ).json
    assert 0.34 < found["density"]["mlp"] < 0.7


def test_the_end_of_the_context_is_said(run: Run, llama: str) -> None:
    result = run("run", llama, *PROMPT, "--max-new-tokens", "500", "--json")
    assert result.json["prompt_tokens"] + result.json["new_tokens"] == CONTEXT
    assert f"the context of {CONTEXT} tokens has room for" in result.err


def test_a_prompt_from_a_file(run: Run, llama: str, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(WORDS)
    found = run("run", llama, "--prompt-file", str(file), "--max-new-tokens", "1", "--json").json
    assert found["prompt"] == WORDS
    assert found["tokens_per_second"] is None
