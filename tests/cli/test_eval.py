"""``dipnet eval``, ``info``, ``fit split`` and ``demo``."""

import json
from pathlib import Path

import pytest

from dipnet.cli import demo as cli_demo
from dipnet.cli import demo_streamed
from tests.cli.conftest import Run

PNG = b"\x89PNG\r\n\x1a\n"


def test_a_table_and_the_files(run: Run, llama: str, text: str, tmp_path: Path) -> None:
    folder, plot = tmp_path / "new" / "folder", tmp_path / "plot.png"
    result = run(
        *("eval", llama, "--text", text, "--method", "dip", "--method", "gate"),
        *("--density", "0.5", "--density", "0.3", "--out", str(folder), "--plot", str(plot)),
    )
    assert result.code == 0
    rows = [line.split()[:2] for line in result.out.splitlines()]
    for expected in (["dense", "–"], ["dip", "0.5"], ["dip", "0.3"], ["gate", "0.5"]):
        assert expected in rows
    assert "– gate at 0.3: gate reads 0.333 of the MLP's weights" in result.out
    assert json.loads((folder / "eval.json").read_text())["schema"] == "dipnet.eval/1"
    assert (folder / "perplexity.png").read_bytes() == plot.read_bytes()
    assert plot.read_bytes().startswith(PNG)
    assert sorted(path.name for path in folder.iterdir()) == ["eval.json", "perplexity.png"]


def test_json_is_alone_on_stdout_and_repeatable(run: Run, llama: str, text: str) -> None:
    arguments = (
        *("eval", llama, "--text", text, "--method", "dip", "--method", "dense"),
        *("--density", "0.5", "--window", "16", "--stride", "8", "--windows", "5", "--bos", "on"),
        *("--dense-prompt", "2", "--batch-size", "2", "--seed", "4", "--json"),
    )
    first, second = run(*arguments).json, run(*arguments).json
    assert (first["window"], first["stride"], first["windows"]) == (16, 8, 5)
    assert (first["bos"], first["dense_prompt"], first["seed"]) == (0, 2, 4)
    assert first["tokens_scored"] == 13 + 4 * 8
    assert first["text"]["name"] == text
    assert [row["method"] for row in first["rows"]] == ["dense", "dip"]
    for found in (first, second):
        for row in found["rows"]:
            row.pop("seconds")
            row.pop("fit_seconds")
    assert first == second


def test_repetitions_are_dropped(run: Run, llama: str, text: str) -> None:
    twice = ("--method", "dip", "--density", "0.5") * 2
    found = run("eval", llama, "--text", text, *twice, "--json").json
    assert [row["density_asked"] for row in found["rows"]] == [None, 0.5]


def test_the_window_is_the_context(run: Run, llama: str, text: str) -> None:
    found = run("eval", llama, "--text", text, "--density", "0.5", "--json").json
    assert (found["window"], found["stride"], found["bos"]) == (64, 64, None)


def test_calibration_and_splits(run: Run, llama: str, text: str) -> None:
    found = run(
        *("eval", llama, "--text", text, "--method", "cats", "--method", "wanda:pattern=2:4"),
        *("--method", "wina", "--density", "0.5", "--calibration", text, "--fit-split", text),
        "--json",
    ).json
    assert found["calibration"]["name"] == found["split_text"]["name"] == text
    _, cats, wanda, wina = found["rows"]
    assert cats["density"]["mlp"] == pytest.approx(0.5, abs=0.1)
    assert wanda["density"]["mlp"] == 0.5
    assert wina["parameters"]["split"] > 0


def test_a_method_with_its_own_densities_is_one_row(run: Run, llama: str, text: str) -> None:
    method = "dip:input_density=0.5,hidden_density=0.25"
    found = run("eval", llama, "--text", text, "--method", method, "--json").json
    assert [row["density_asked"] for row in found["rows"]] == [None, None]
    assert found["rows"][1]["density"]["sites"]["0.mlp.hidden"] == 0.25


def test_a_local_dataset(run: Run, llama: str, text: str, tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_dict({"body": [Path(text).read_text()]})
    datasets.DatasetDict({"valid": rows}).save_to_disk(str(tmp_path / "data"))
    found = run(
        *("eval", llama, "--dataset", str(tmp_path / "data"), "--split", "valid"),
        *("--column", "body", "--density", "0.5", "--json"),
    ).json
    assert found["text"]["name"] == f"{tmp_path / 'data'}:valid:body"


def test_info(run: Run, llama: str) -> None:
    found = run("info", llama, "--density", "1", "--density", "0.5", "--json").json
    weights = found["weights_per_token"]
    assert (found["family"], found["layers"]) == ("llama", 2)
    assert weights["mlp"] == 2 * 3 * 48 * 16
    assert weights["total"] == weights["mlp"] + weights["attention"] + weights["head_and_rest"]
    dense, half = found["bytes_per_token"]
    assert dense == {"density": 1, "bytes": weights["total"] * 4, "share": 1}
    assert half["bytes"] == pytest.approx(dense["bytes"] - weights["mlp"] * 4 / 2, rel=0.01)
    assert {"name": "cats", "works": True, "calibration": True} in found["methods"]
    assert [site["site"] for site in found["sites"]][2:] == ["mlp.in", "mlp.hidden"]


def test_info_for_people(run: Run, opt: str) -> None:
    result = run("info", opt)
    assert result.code == 0
    assert "opt, 2 layers, relu, context 64" in result.out
    assert "not on this family, which has no gate: gate, up, cats" in result.out


def test_info_reads_no_weights(run: Run, llama: str, tmp_path: Path) -> None:
    config = (Path(llama) / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    assert run("info", str(tmp_path)).code == 0


def test_info_on_a_quantised_checkpoint(run: Run, llama: str, tmp_path: Path) -> None:
    config = json.loads((Path(llama) / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("info", str(tmp_path))
    assert result.code == 0
    assert "quantised (gptq): bytes are as if in float32" in result.err


def test_a_density_of_its_own_is_fitted(run: Run, llama: str, text: str) -> None:
    method = ("--method", "dip:density=0.4")
    found = run("fit", "split", llama, "--text", text, *method, "--json").json
    assert [fit["density"] for fit in found["fits"]] == [0.4]


def test_fit_split(run: Run, llama: str, text: str) -> None:
    arguments = ("fit", "split", llama, "--text", text, "--density", "0.5", "--method", "wina")
    found = run(*arguments, "--json").json
    fit = found["fits"][0]
    best = min(fit["tried"], key=lambda row: row["perplexity"])
    assert fit["split"] == best["split"]
    assert (2 * best["input_density"] + best["hidden_density"]) / 3 == pytest.approx(0.5)
    shown = run(*arguments)
    assert f"split {best['split']:g} is best" in shown.out


def test_demo(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_demo, "NEW_TOKENS", 6)
    monkeypatch.setattr(cli_demo, "WINDOWS", 1)
    monkeypatch.setattr(demo_streamed, "NEW_TOKENS", 3)
    monkeypatch.setattr(demo_streamed, "WINDOWS", 1)
    monkeypatch.setattr(cli_demo, "DENSITIES", (0.5,))
    monkeypatch.setattr(cli_demo, "SWEEPS", dict.fromkeys(cli_demo.SWEEPS, ("dip",)))
    result = run("demo", "--out", str(tmp_path / "demo"))
    assert result.code == 0, result.err
    assert result.out.count(cli_demo.PROMPT) == 2 + 3
    assert "MiB read a token" in result.out
    assert "held-out perplexity" in result.out
    assert (tmp_path / "demo" / "perplexity.png").read_bytes().startswith(PNG)
    figures = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert [made["method"] for made in figures["generated"]] == ["dense", "dip"]
    assert all(made["new_tokens"] == 6 for made in figures["generated"])
    assert [each["method"] for each in figures["streamed"]] == [*demo_streamed.METHODS]
    assert all(each["decoding"]["bytes_per_token"] > 0 for each in figures["streamed"])
    assert [e["model"]["name"] for e in figures["evaluations"]] == ["demo-swiglu", "demo-relu"]


def test_a_cache(run: Run, llama: str, text: str) -> None:
    arguments = ("eval", llama, "--text", text, "--method", "dip:cache_aware=0.2")
    measured = ("--density", "0.5", "--windows", "1", "--cache", "0.5")
    found = run(*arguments, *measured, "--cache-policy", "lfu", "--json").json
    assert found["cache"] == {"share": 0.5, "policy": "lfu"}
    assert 0 < found["rows"][1]["cache"]["hit_rate"] < 1
    assert "hits" in run(*arguments, *measured).out


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--cache-policy", "lru"), "--cache-policy goes with --cache SHARE"),
        (("--cache", "1.5"), "a cache's share must be in 0..1"),
        (("--cache", "0.5", "--cache-policy", "fifo"), "unknown cache policy 'fifo'"),
        (("--method", "dip:cache_aware=0.2"), "cache_aware has no effect without --cache"),
    ],
)
def test_a_cache_that_makes_no_sense(
    run: Run, llama: str, text: str, options: tuple[str, ...], reason: str
) -> None:
    result = run("eval", llama, "--text", text, *options)
    assert result.code != 0
    assert reason in result.err
