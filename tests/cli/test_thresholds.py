"""`dipnet fit thresholds`, and what takes what it writes."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run


@pytest.fixture
def above(run: Run, llama: str, text: str, tmp_path: Path) -> str:
    file = tmp_path / "above.json"
    said = run(
        *("fit", "thresholds", llama, "--text", text, "--out", str(file), "--window", "16"),
        *("--density", "0.5", "--density", "0.35", "--json"),
    ).json
    assert said["schema"] == "dipnet.fit-thresholds/1"
    assert [each["point"]["density"] for each in said["fitted"]] == [0.35, 0.5]
    assert said["fit"]["text"]["name"] == text
    assert said["fitted"] == json.loads(file.read_text())["fitted"]
    return str(file)


def test_everything_takes_them(run: Run, llama: str, text: str, above: str, tmp_path: Path) -> None:
    method, store = f"dip-threshold:fitted={above}", str(tmp_path / "store")
    run("pack", llama, store, "--weights", "int8", "--block", "1")
    asked = ("--text", text, "--method", method, "--density", "0.5", "--window", "16", "--json")
    torch, streamed = (run("eval", model, *asked).json["rows"][1] for model in (llama, store))
    assert torch["density"]["mlp"] == pytest.approx(0.5, abs=0.03)
    assert streamed["perplexity"] == pytest.approx(torch["perplexity"], rel=5e-3)
    prompt = ("--prompt", "The ship", "--max-new-tokens", "3", "--density", "0.35", "--json")
    for model in (llama, store):
        assert run("run", model, "--method", method, *prompt).json["density"]["mlp"] > 0
    simulated = run(
        *("simulate", llama, "--text", text, "--windows", "1", "--memory", "80%", "--json"),
        *("--method", method, "--density", "0.5"),
    ).json
    row = next(row for row in simulated["rows"] if row["method"] != "dense")
    assert row["density"] == pytest.approx(0.5, abs=0.05)


def test_a_store_of_blocks_takes_those_of_blocks(
    run: Run, llama: str, text: str, above: str, tmp_path: Path
) -> None:
    store, pairs = str(tmp_path / "store"), str(tmp_path / "pairs.json")
    run("pack", llama, store, "--weights", "int8", "--block", "2")
    fit = ("fit", "thresholds", llama, "--text", text, "--window", "16", "--out", pairs)
    assert run(*fit, "--method", "dip-threshold:hidden_block=2").code == 0
    asked = ("--text", text, "--window", "16", "--density", "0.5", "--json")
    method = f"dip-threshold:fitted={pairs}"
    rows = [run("eval", m, *asked, "--method", method).json["rows"][1] for m in (llama, store)]
    assert rows[1]["perplexity"] == pytest.approx(rows[0]["perplexity"], rel=5e-3)
    refused = run("eval", store, *asked, "--method", f"dip-threshold:fitted={above}")
    assert refused.code != 0
    assert "blocks of 2 channels and the method decides about 1" in refused.err
    other = str(tmp_path / "ordered")
    ordered = ("--weights", "int8", "--block", "2", "--calibration", text)
    assert run("pack", llama, other, *ordered).code == 0
    refused = run("eval", other, *asked, "--method", method)
    assert refused.code != 0
    assert "the store holds them in another order" in refused.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--method", "dip"], "dip has no thresholds to fit before: use dip-threshold"),
        (["--density", "2"], "density must be in (0, 1]"),
        (["--method", "dip-threshold:split=0"], "split must be a number above 0"),
        (["--text", "missing.txt"], "missing.txt"),
    ],
)
def test_bad_input(
    run: Run, llama: str, text: str, tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    file = tmp_path / "above.json"
    given = {"--text": text, **dict(zip(arguments[::2], arguments[1::2], strict=True))}
    options = [word for option in given.items() for word in option]
    result = run("fit", "thresholds", llama, "--out", str(file), "--window", "16", *options)
    assert result.code != 0
    assert complaint in result.err
    assert "Traceback" not in result.err
    assert not file.exists()


def test_another_density(run: Run, llama: str, text: str, above: str) -> None:
    method = f"dip-threshold:fitted={above}"
    result = run("eval", llama, "--text", text, "--method", method, "--density", "0.4")
    assert result.code != 0
    assert "fitted at a density of 0.35, 0.5, not of 0.4" in result.err
