"""Every bad input: one line with the remedy, exit code 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints import save_llama

Error = Callable[..., str]
PROMPT = ("--prompt", "The ship")


@pytest.fixture
def copy(llama: str, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


@pytest.mark.parametrize("density", ["0", "-0.1", "1.01", "nan"])
@pytest.mark.parametrize("command", ["run", "eval", "info", "fit-split"])
def test_density(error: Error, llama: str, text: str, command: str, density: str) -> None:
    needs = {"run": PROMPT, "eval": ("--text", text), "fit-split": ("--text", text)}
    message = error(command, llama, *needs.get(command, ()), "--density", density)
    assert message.startswith("density must be in (0, 1], got")
    assert "0.5 keeps half" in message


def test_unknown_method(error: Error) -> None:
    for arguments in (("run", *PROMPT), ("eval",)):
        message = error(*arguments, "--method", "wande")
        assert "unknown method 'wande'. Did you mean 'wanda'? Known: cats, dense" in message
        assert "docs/adding-a-method.md" in message


@pytest.mark.parametrize("command", ["run", "info"])
def test_unknown_family(error: Error, copy: Path, command: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    message = error(command, str(copy), *(PROMPT if command == "run" else ()))
    assert message.startswith("unknown model family 'gpt2'")
    assert "llama" in message
    assert "docs/adding-a-family.md" in message


def test_missing_checkpoint(error: Error, tmp_path: Path) -> None:
    message = error("run", str(tmp_path / "nothing"), *PROMPT)
    assert message.startswith(f"cannot load '{tmp_path / 'nothing'}'")
    assert "give a local folder with config.json and safetensors weights" in message


def test_a_folder_without_a_config(error: Error, tmp_path: Path) -> None:
    assert "holds no config.json" in error("run", str(tmp_path), *PROMPT)


def test_missing_weights(error: Error, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    message = error("run", str(copy), *PROMPT)
    assert "model.safetensors is missing" in message
    assert "download the checkpoint again" in message


def test_truncated_checkpoint(error: Error, copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    message = error("run", str(copy), *PROMPT)
    assert "model.safetensors is truncated or damaged" in message
    assert "download it again" in message


def test_missing_shard(error: Error, tmp_path: Path) -> None:
    folder = save_llama(tmp_path / "shards", max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    assert f"{shards[-1]} is missing" in error("run", str(folder), *PROMPT)


@pytest.mark.parametrize("content", ["", " \n"])
def test_empty_text(error: Error, llama: str, tmp_path: Path, content: str) -> None:
    file = tmp_path / "empty.txt"
    file.write_text(content)
    message = error("eval", llama, "--text", str(file))
    assert message == f"the text of {file} is empty: give one with some words in it"


def test_missing_text(error: Error, llama: str, tmp_path: Path) -> None:
    assert "there is no text file" in error("eval", llama, "--text", str(tmp_path / "none"))
    assert "give --text or --dataset" in error("eval", llama)
    both = error("eval", llama, "--text", "a", "--dataset", "b")
    assert both == "give either --text or --dataset, not both"


def test_prompts(error: Error, llama: str) -> None:
    assert "the prompt is empty" in error("run", llama, "--prompt", "")
    assert "either --prompt or --prompt-file" in error("run", llama)
    long = error("run", llama, "--prompt", "ship " * 100)
    assert "shorten the prompt to 63 tokens or fewer" in long
    assert "has no chat template" in error("run", llama, *PROMPT, "--chat")


@pytest.mark.parametrize("method", ["dense", "dip"])
def test_nan_activations(error: Error, copy: Path, text: str, method: str) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    generate = ("run", str(copy), *PROMPT, "--max-new-tokens", "4")
    for arguments in (generate, ("eval", str(copy), "--text", text)):
        message = error(*arguments, "--method", method)
        assert "logits are not finite" in message
        assert "--dtype float32" in message


def test_no_calibration_text(error: Error, llama: str, text: str) -> None:
    assert "--calibration" in error("run", llama, *PROMPT, "--method", "cats")
    message = error("eval", llama, "--text", text, "--method", "teal", "--method", "cats")
    assert message == ("cats, teal must be calibrated on text first: give --calibration FILE")


def test_nothing_can_run(error: Error, opt: str, text: str) -> None:
    message = error("eval", opt, "--text", text, "--method", "gate", "--method", "up")
    assert message.startswith("gate needs a gated MLP")
    assert "methods that work there: dense, dip" in message


def test_a_window_beyond_the_context(error: Error, llama: str, text: str) -> None:
    message = error("eval", llama, "--text", text, "--window", "65")
    assert "--window 65 is longer than the context" in message


def test_outputs_are_tested_before_the_work(error: Error, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "name the file" in error("eval", "--plot", str(tmp_path / "plot.pdf"))
    assert "does not exist" in error("eval", "--plot", str(tmp_path / "no" / "plot.png"))
    assert "cannot make the folder" in error("eval", "--out", str(tmp_path / "file"))
    assert "cannot make the folder" in error("demo", "--out", str(tmp_path / "file"))


def test_devices_and_dtypes(error: Error, llama: str) -> None:
    assert "device 'tpu' cannot be used here" in error("run", llama, *PROMPT, "--device", "tpu")
    assert "unknown dtype 'int3'; known: auto" in error("run", llama, *PROMPT, "--dtype", "int3")


def test_only_dip_has_a_split(error: Error, llama: str, text: str) -> None:
    message = error("fit-split", llama, "--text", text, "--method", "gate")
    assert message == "gate has no split to fit: use dip or wina"
