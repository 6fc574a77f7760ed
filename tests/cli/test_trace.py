"""``--trace``: what `run` and `eval` record."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dipnet.pack.packing import pack
from dipnet.sim.trace import open_trace
from tests.checkpoints import WORDS
from tests.cli.conftest import Run

Error = Callable[..., str]
PROMPT = ("--prompt", WORDS)


@pytest.fixture(scope="module")
def store(llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("packed") / "llama.dipnet"
    pack(llama, folder, "int8", 4)
    return str(folder)


def test_eval(run: Run, llama: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "t"
    result = run(
        *("eval", llama, "--text", text, "--density", "0.4", "--windows", "2", "--window", "8"),
        *("--trace", str(file)),
    )
    assert result.code == 0
    assert f"dipnet: saved {file}" in result.err
    trace = open_trace(file)
    assert (trace.tokens, trace.starts.tolist()) == (16, [0, 8])
    assert trace.method == "dip:density=0.4"
    assert trace.shape.name == Path(llama).name
    assert not trace.has_scores
    assert [site.key for site in trace.sites] == [
        (layer, name) for layer in range(2) for name in ("mlp.in", "mlp.hidden")
    ]


def test_eval_of_a_store_with_its_cache(run: Run, store: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "t"
    result = run(
        *("eval", store, "--text", text, "--method", "dip:cache_aware=0.5", "--density", "0.4"),
        *("--windows", "2", "--window", "8", "--cache", "16KiB", "--trace", str(file), "--json"),
    )
    assert result.code == 0, result.err
    trace = open_trace(file)
    assert trace.tokens == 16
    assert trace.cache is not None
    assert trace.cache.policy == "lfu"
    assert trace.method == "dip:density=0.4,cache_aware=0.5,hidden_block=4"
    assert trace.sites[1].block == 4


@pytest.mark.parametrize("model", ["llama", "store"])
def test_run(run: Run, request: pytest.FixtureRequest, model: str, tmp_path: Path) -> None:
    name, file = request.getfixturevalue(model), tmp_path / "t"
    options = ("--max-new-tokens", "6", "--trace", str(file), "--json")
    found = run("run", name, *PROMPT, *options, "--trace-scores").json
    trace = open_trace(file)
    assert trace.tokens == found["density"]["tokens"] == 5
    assert trace.has_scores
    found = run("run", name, *PROMPT, *options, "--prefill", "sparse").json
    assert open_trace(file).tokens == 5 + found["prompt_tokens"]
    assert not open_trace(file).has_scores


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ((), 5),
        (("--method", "dense"), 0),
        (("--density", "0.5", "--density", "0.4"), 2),
        (("--method", "dip", "--method", "gate", "--density", "0.5"), 2),
        (("--method", "dip:density=0.5", "--method", "dip:density=0.4"), 2),
    ],
)
def test_one_method_at_one_density(
    error: Error, llama: str, tmp_path: Path, arguments: tuple[str, ...], count: int
) -> None:
    message = error("eval", llama, "--trace", str(tmp_path / "t"), *arguments)
    assert message == (
        f"--trace records one method at one density, and here are {count}: give one --method "
        "(other than dense) and one --density"
    )


@pytest.mark.parametrize("command", ["run", "eval"])
def test_what_is_wrong_is_said_before_the_model(
    error: Error, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    monkeypatch.delattr("dipnet.models.load.load_model")
    needs = (command, *(PROMPT if command == "run" else ("--density", "0.5")))
    assert "--trace-scores goes with --trace FILE" in error(*needs, "--trace-scores")
    assert "it is a folder" in error(*needs, "--trace", str(tmp_path))
    assert "does not exist; make it" in error(*needs, "--trace", str(tmp_path / "no" / "t"))


def test_a_method_without_masks(error: Error, llama: str, text: str, tmp_path: Path) -> None:
    trace = ("--trace", str(tmp_path / "t"))
    assert "dense decides no masks" in error("run", llama, *PROMPT, "--method", "dense", *trace)
    wanda = ("--method", "wanda", "--density", "0.5", "--calibration", text)
    message = error("eval", llama, "--text", text, *wanda, *trace)
    assert message.startswith("wanda:density=0.5 decides no masks, so there is nothing to trace")
    assert os.listdir(tmp_path) == [Path(text).name]


def test_a_text_whose_tokens_are_all_dense(run: Run, llama: str, tmp_path: Path) -> None:
    trace = ("--trace", str(tmp_path / "t"))
    result = run("run", llama, *PROMPT, "--max-new-tokens", "1", *trace)
    assert result.code == 2
    assert "there is nothing to trace, the masks of no token were decided" in result.err
    assert os.listdir(tmp_path) == []
