"""Deja Vu and its relatives on the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dipnet.methods.predictors import Predictors
from dipnet.models.load import load_model
from dipnet.sim.trace import open_trace
from tests.checkpoints import WORDS
from tests.cli.conftest import Run
from tests.predicted import random_predictors

Error = Callable[..., str]
PROMPT = ("--prompt", WORDS)


def save_predictors(checkpoint: str, path: Path, look_ahead: int = 1) -> str:
    """A file of predictors that know nothing of a checkpoint; its name."""
    random_predictors(load_model(checkpoint, device="cpu").model, look_ahead).save(path)
    return str(path)


@pytest.fixture(scope="module")
def fitted(llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_predictors(llama, tmp_path_factory.mktemp("fitted") / "p.safetensors")


def test_eval(run: Run, llama: str, text: str, fitted: str) -> None:
    methods = (
        f"dejavu:mlp_density=0.25,head_density=0.5,predictors={fitted}",
        "dejavu-oracle:head_density=0.5",
        "random:mlp_density=0.25,seed=3",
    )
    asked = [part for method in methods for part in ("--method", method)]
    rows = run("eval", llama, "--text", text, *asked, "--json").json["rows"]
    assert [row["method"] for row in rows] == ["dense", *methods]
    dense, dejavu, oracle, random = (row["density"] for row in rows)
    assert dejavu["mlp"] == random["mlp"] == 0.25
    assert oracle["mlp"] == 1
    assert dejavu["attention"] < 1
    assert oracle["attention"] < 1
    assert dejavu["added"] > 0 == oracle["added"] == random["added"]
    assert rows[1]["parameters"]["predictors"] == fitted
    assert len({row["perplexity"] for row in rows}) == 4
    assert dense["total"] == 1


def test_density_is_the_mlps(run: Run, llama: str, text: str, fitted: str) -> None:
    asked = ("--method", f"dejavu:predictors={fitted}", "--method", "dejavu-oracle")
    found = run(
        *("eval", llama, "--text", text, *asked, "--method", "random", "--method", "cett"),
        *("--density", "0.5", "--density", "0.25", "--json"),
    ).json
    rows = found["rows"][1:]
    assert [row["density_asked"] for row in rows] == [0.5, 0.25] * 4
    assert [row["density"]["mlp"] for row in rows] == pytest.approx([0.5, 0.25] * 4)
    assert {row["density"]["attention"] for row in rows} == {1}


def test_densities_by_layer_are_calibrated(run: Run, llama: str, text: str, fitted: str) -> None:
    method = f"dejavu:mlp_density=0.25,allocation=scores,predictors={fitted}"
    found = run(
        *("eval", llama, "--text", text, "--method", method, "--calibration", text, "--json")
    ).json
    by_layer = found["rows"][1]["density"]["mlp_by_layer"]
    assert sum(by_layer) / 2 == pytest.approx(0.25, abs=0.02)
    assert by_layer[0] != by_layer[1]


def test_run(run: Run, llama: str, fitted: str, tmp_path: Path) -> None:
    method = f"dejavu:mlp_density=0.25,head_density=0.5,predictors={fitted}"
    tail = ("--max-new-tokens", "6", "--trace", str(tmp_path / "t"), "--json")
    found = run("run", llama, *PROMPT, "--method", method, *tail).json
    assert found["new_tokens"] == 6
    assert found["density"]["mlp"] == 0.25
    trace = open_trace(tmp_path / "t")
    assert trace.tokens == 5
    assert {site.name for site in trace.sites} == {"attn.head", "mlp.neuron"}


def test_backends_of_a_run_agree(run: Run, error: Error, llama: str, fitted: str) -> None:
    method = f"dejavu:mlp_density=0.25,head_density=0.5,predictors={fitted}"
    asked = ("run", llama, *PROMPT, "--method", method, "--max-new-tokens", "6", "--device", "cpu")
    found = [run(*asked, "--backend", each, "--json").json for each in ("skip", "reference")]
    assert found[0]["text"] == found[1]["text"]
    assert found[0]["density"] == found[1]["density"]
    assert "no backend 'fast'; there are: auto, reference" in error(*asked, "--backend", "fast")
    dip = ("run", llama, *PROMPT, "--backend", "skip", "--device", "cpu")
    assert "backend 'skip' needs neurons and heads that are chosen before" in error(*dip)


@pytest.mark.parametrize("source", ["checkpoint", "trace"])
def test_simulate(
    run: Run, llama: str, text: str, fitted: str, tmp_path: Path, source: str
) -> None:
    """The neurons are records; heads are in memory with the rest of attention."""
    method = f"dejavu:mlp_density=0.25,head_density=0.5,predictors={fitted}"
    asked = ("--text", text, "--windows", "1", "--method", method)
    if source == "trace":
        run("eval", llama, *asked, "--trace", str(tmp_path / "t"))
        asked, source = (), str(tmp_path / "t")
    else:
        source = llama
    tail = ("--memory", "80%,90%", "--policy", "lfu", "--json")
    rows = run("simulate", source, *asked, *tail).json["rows"]
    dense, sparse = rows[0], rows[-1]
    assert sparse["method"] == method
    assert sparse["density"] == pytest.approx(0.25)
    assert sparse["bytes_per_token"] < dense["bytes_per_token"]
    held = Predictors.load(fitted)
    added = 4 * (held.numbers("mlp") + held.numbers("head"))
    fixed = [row["memory_used"] - row["cached"] for row in (dense, sparse)]
    assert fixed[1] - fixed[0] == added
    large = ("--device", "laptop-nvme", "--memory", "6GiB", "--json")
    shaped = run("simulate", source, *asked, "--shape", "mistral-7b", *large).json
    assert shaped["rows"][-1]["density"] == pytest.approx(0.25, abs=0.01)


def test_errors(error: Error, llama: str, opt: str, text: str, fitted: str, tmp_path: Path) -> None:
    def asked(model: str, method: str) -> str:
        return error("eval", model, "--text", text, "--method", method)

    assert "dejavu needs predictors fitted on the model" in asked(llama, "dejavu:mlp_density=0.5")
    assert "predictors none does not exist" in asked(llama, "dejavu:predictors=none")
    assert "holds no predictors, or is damaged" in asked(llama, f"dejavu:predictors={text}")
    assert "'density=1' is no option of dejavu" in asked(llama, "dejavu:density=1")
    message = asked(opt, f"dejavu:mlp_density=0.5,predictors={fitted}")
    assert "are for a llama (silu)" in message
    assert "this model is a opt (relu)" in message
    other = save_predictors(llama, tmp_path / "q", look_ahead=2)
    assert "take look_ahead=2" in asked(llama, f"dejavu:mlp_density=0.5,predictors={other}")
    message = error(
        *("eval", llama, "--text", text, "--method", f"dejavu:mlp_density=0.5,predictors={fitted}"),
        *("--density", "0.5"),
    )
    assert "--density has no effect" in message


def test_from_disk(
    run: Run, error: Error, llama: str, text: str, fitted: str, tmp_path: Path
) -> None:
    """Packed by neurons: run, eval and simulate; by columns it says what to do."""
    store = str(tmp_path / "store")
    run("pack", llama, store, "--weights", "int8", "--unit", "neuron")
    method = ("--method", f"dejavu:mlp_density=0.25,head_density=0.5,predictors={fitted}")
    asked = (*PROMPT, "--max-new-tokens", "8", *method)
    traced = ("--trace", str(tmp_path / "trace"))
    made = [
        run("run", store, *asked, *options, "--json").json
        for options in ((), ("--cache", "8KiB", *traced), ("--cache", "8KiB", "--no-look-ahead"))
    ]
    assert made[0]["text"] == made[1]["text"] == made[2]["text"]
    held, ahead, late = (each["decoding"]["sites"]["mlp.neuron"] for each in made)
    assert held["misses"] == 0 < ahead["misses"] == late["misses"]
    assert ahead["guessed"] == ahead["useful"] >= ahead["early"]
    assert ahead["useful"] + ahead["read"] == late["read"] + late["useful"] == ahead["misses"]
    trace = open_trace(tmp_path / "trace")
    assert {site.name for site in trace.sites} == {"attn.head", "mlp.neuron"}
    rows = run("simulate", str(tmp_path / "trace"), "--memory", "100%", "--json").json["rows"]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    found = run("eval", store, "--text", text, *method, "--cache", "8KiB", "--json").json["rows"]
    assert found[1]["density"]["mlp"] == 0.25
    assert 0 < found[1]["store"]["hit_rate"] < 1
    assert "chooses columns of input channels" in error("run", store, *PROMPT, "--method", "dip")
    columns = str(tmp_path / "columns")
    run("pack", llama, columns)
    assert "pack the model with --unit neuron" in error("run", columns, *asked)
    assert "dipnet plan plans dip" in error("plan", store, "--text", text)


def test_weights_pack_what_the_method_needs(
    run: Run, llama: str, fitted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIPNET_CACHE", str(tmp_path))
    asked = ("run", llama, *PROMPT, "--max-new-tokens", "4", "--weights", "int8", "--method")
    run(*asked, f"dejavu:mlp_density=0.25,predictors={fitted}")
    run(*asked, "dip")
    assert sorted(store.name[-8:] for store in tmp_path.iterdir()) == ["-int8-v1", "-int8-v2"]
