"""`dipnet fit allocation`, `fit scores` and `rotate`, and what takes what they write."""

import json
from pathlib import Path

import pytest

from tests.checkpoints import WORDS
from tests.cli.conftest import Run

FAST = ["--window", "16", "--steps", "2", "--batch-size", "2"]


@pytest.fixture
def scores(run: Run, llama: str, tmp_path: Path) -> str:
    file = tmp_path / "norms.safetensors"
    result = run("fit", "scores", llama, "--kind", "norm", "--out", str(file))
    assert result.code == 0
    assert str(file) in result.out
    return str(file)


def test_fitted(run: Run, llama: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "half.json"
    said = run(
        *("fit", "allocation", llama, "--text", text, "--out", str(file), *FAST),
        *("--density", "0.5", "--density", "0.3", "--json"),
    ).json
    assert said["schema"] == "dipnet.fit-allocation/1"
    assert [point["density"] for point in said["points"]] == [0.3, 0.5]
    assert said["fit"]["source"] == llama
    assert said["fit"]["text"]["name"] == text
    assert {key: said[key] for key in ("format", "model", "points")} == {
        key: json.loads(file.read_text())[key] for key in ("format", "model", "points")
    }


def test_run_and_eval_take_both(
    run: Run, llama: str, text: str, allocation: str, scores: str
) -> None:
    method = f"dip:allocation={allocation},scores={scores}"
    said = run(
        *("eval", llama, "--text", text, "--method", method, "--window", "16", "--json"),
        *("--density", "0.5", "--density", "0.35"),
    ).json
    rows = [row for row in said["rows"] if row["method"] == method]
    assert [row["density_asked"] for row in rows] == [0.5, 0.35]
    for row in rows:
        assert row["density"]["mlp"] == pytest.approx(row["density_asked"], abs=0.03)
        assert row["parameters"]["allocation"] == allocation
    made = run(
        *("run", llama, "--prompt", "The", "--method", method, "--max-new-tokens", "3", "--json")
    ).json
    assert made["density"]["added"] > 0
    simulated = run(
        *("simulate", llama, "--text", text, "--windows", "1", "--memory", "80%", "--json"),
        *("--method", method, "--density", "0.5"),
    ).json
    row = next(row for row in simulated["rows"] if row["method"] != "dense")
    assert row["density"] == pytest.approx(0.5, abs=0.03)


def test_a_packed_model_takes_both(
    run: Run, llama: str, text: str, allocation: str, scores: str, tmp_path: Path
) -> None:
    """The engine's own masks: the densities of the checkpoint's evaluation, layer by layer."""
    store, trace = str(tmp_path / "store"), tmp_path / "t.trace"
    assert run("pack", llama, store, "--weights", "int8", "--block", "1").code == 0
    method = f"dip:allocation={allocation},scores={scores},density=0.4"
    asked = ["--text", text, "--method", method, "--window", "16", "--windows", "2", "--json"]
    packed = run("eval", store, *asked, "--cache", "8KiB", "--trace", str(trace)).json["rows"][1]
    whole = run("eval", llama, *asked).json["rows"][1]
    assert packed["density"]["sites"] == whole["density"]["sites"]
    refused = run("fit", "allocation", store, "--text", text, "--out", str(tmp_path / "x.json"))
    assert refused.code == 2
    assert "is a packed model: fit on the checkpoint" in refused.err
    made = run("simulate", str(trace), "--memory", "80%", "--device", "phone", "--json").json
    row = next(row for row in made["rows"] if row["method"] != "dense")
    assert row["density"] == pytest.approx(packed["density"]["mlp"], abs=1e-6)


def test_a_plan_with_both(
    run: Run, llama: str, text: str, allocation: str, scores: str, tmp_path: Path
) -> None:
    """Planned, written, and run; a plan is for what it was made with."""
    store, file = str(tmp_path / "store"), str(tmp_path / "plan.json")
    assert run("pack", llama, store, "--weights", "int8", "--block", "1").code == 0
    said = run(
        *("plan", store, "--text", text, "--allocation", allocation, "--scores", scores),
        *("--window", "16", "--windows", "3", "--device", "phone", "--max-ppl-increase", "50%"),
        *("--cache", "4KiB", "--out", file, "--json"),
    ).json
    assert f"allocation={allocation}" in said["method"]
    assert f"scores={scores}" in said["method"]
    made = run("run", store, "--plan", file, "--prompt", "The", "--max-new-tokens", "3", "--json")
    assert made.json["method"] == said["method"]
    other = run("plan", store, "--text", text, "--allocation", scores)
    assert other.code == 2
    assert "no allocation" in other.err


def test_a_store_with_its_own(
    run: Run, llama: str, text: str, allocation: str, tmp_path: Path
) -> None:
    """Methods that do not say how they are divided take it, and it is said."""
    store, file = tmp_path / "store", tmp_path / "plan.json"
    given = ("--weights", "int8", "--block", "1", "--allocation", allocation)
    assert run("pack", llama, str(store), *given).code == 0
    named = f"dip:allocation={allocation}"
    asked = ("--text", text, "--window", "16", "--density", "0.4")
    methods = [f"--method={each}" for each in ("dip", named, "dip:allocation=none", "dip:split=1")]
    rows = run("eval", str(store), *asked, *methods, "--json").json["rows"][1:]
    own, explicit, none, split = (row["density"]["sites"] for row in rows)
    assert own == explicit
    assert len({json.dumps(each) for each in (own, none, split)}) == 3
    assert [row["method"] for row in rows[:2]] == ["dip", named]
    assert [row["store"]["own_allocation"] for row in rows] == [True, False, False, False]
    assert rows[0]["parameters"]["allocation"] == str(store / "allocation.json")
    shown = run("eval", str(store), *asked, "--method", "dip")
    assert "dip, the store's" in shown.out  # the rest is in the cell's next line
    short = ("--prompt", "The", "--max-new-tokens", "3")
    assert "the store's allocation" in run("run", str(store), *short).err
    assert "the store's allocation" not in run("run", str(store), *short, "--method", named).err
    said = run("run", str(store), *short, "--json").json
    assert said["parameters"]["allocation"] == str(store / "allocation.json")
    cheap = ("--windows", "3", "--device", "phone", "--max-ppl-increase", "50%")
    found = run(*("plan", str(store), *asked[:4], *cheap, "--out", str(file)))
    assert "the store's allocation" in found.out
    assert "split" not in json.loads(file.read_text())["method"]
    made = run("run", str(store), "--plan", str(file), *short, "--json").json
    assert made["parameters"]["allocation"] == str(store / "allocation.json")
    plain = str(tmp_path / "plain")
    assert run("pack", llama, plain, *given[:4]).code == 0
    refused = run("run", plain, "--plan", str(file), *short)
    assert "the plan is for a store with another allocation" in refused.err


def test_learned_scores(run: Run, llama: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "learned.safetensors"
    said = run("fit", "scores", llama, "--text", text, "--out", str(file), *FAST, "--json").json
    assert said["kind"] == "learned"
    assert set(said["divergence"]) == {"magnitude", "norm", "learned"}


def test_a_rotated_checkpoint_is_one(run: Run, llama: str, text: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "rotated")
    said = run("rotate", llama, "--text", text, "--window", "16", "--out", folder, "--json").json
    assert said["held_by_half_the_channels"]["after"] > said["held_by_half_the_channels"]["before"]
    asked = ["--text", text, "--method", "dense", "--window", "16", "--json"]
    one, other = (run("eval", model, *asked).json["rows"][0] for model in (llama, folder))
    assert one["perplexity"] == pytest.approx(other["perplexity"], rel=1e-3)
    again = run("rotate", llama, "--text", text, "--window", "16", "--out", folder)
    assert again.code == 2
    assert "exists already" in again.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["fit", "allocation", "{model}"], "give --text"),
        (["fit", "allocation", "{model}", "--text", "{short}"], "2 windows of"),
        (["fit", "allocation", "{model}", "--text", "{text}", "--method", "cats"], "use dip or"),
        (["fit", "allocation", "{model}", "--text", "{text}", "--density", "1"], "nothing to"),
        (["fit", "scores", "{model}", "--text", "{text}", "--method", "wina"], "channel by"),
        (["fit", "scores", "{model}", "--text", "{text}", "--density", "2"], "density must be"),
        (["rotate", "{opt}", "--text", "{text}"], "cannot be rotated"),
    ],
)
def test_bad_input(
    run: Run,
    llama: str,
    opt: str,
    text: str,
    tmp_path: Path,
    arguments: list[str],
    complaint: str,
) -> None:
    short = tmp_path / "short.txt"
    short.write_text(WORDS[:30])
    out = tmp_path / "out"
    named = [each.format(model=llama, opt=opt, text=text, short=short) for each in arguments]
    result = run(*named, "--out", str(out))
    assert result.code == 2
    assert complaint in result.err
    assert result.err.count("\n") == 1
    assert not out.exists()


def test_an_allocation_of_another_model(run: Run, opt: str, text: str, allocation: str) -> None:
    asked = ["--text", text, "--method", f"dip:allocation={allocation}", "--density", "0.5"]
    result = run("eval", opt, *asked, "--window", "16")
    assert result.code == 2
    assert "this allocation is for a llama" in result.err
    assert result.err.count("\n") == 1


def test_a_damaged_allocation(run: Run, llama: str, text: str, allocation: str) -> None:
    said = json.loads(Path(allocation).read_text())
    said["points"][0]["sites"]["mlp.in"][0] = 2.0
    Path(allocation).write_text(json.dumps(said))
    result = run("run", llama, "--prompt", "x", "--method", f"dip:allocation={allocation}")
    assert result.code == 2
    assert "is no allocation" in result.err
    assert result.err.count("\n") == 1
