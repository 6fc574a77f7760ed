"""Every bad input: one line with the remedy, exit code 2."""

import json
import shutil
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dipnet.models.load import load_model
from tests.checkpoints import save_llama

Error = Callable[..., str]
PROMPT = ("--prompt", "The ship")


@pytest.fixture
def copy(llama: str, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("density", ["0", "-0.1", "1.01", "nan"])
@pytest.mark.parametrize("command", ["run", "eval", "info", "fit split"])
def test_density(error: Error, llama: str, text: str, command: str, density: str) -> None:
    needs = {"run": PROMPT, "eval": ("--text", text), "fit split": ("--text", text)}
    message = error(*command.split(), llama, *needs.get(command, ()), "--density", density)
    assert message.startswith("density must be in (0, 1], got")
    assert "0.5 keeps half" in message


def test_unknown_method(error: Error) -> None:
    for arguments in (("run", *PROMPT), ("eval",)):
        message = error(*arguments, "--method", "wande")
        assert "unknown method 'wande'. Did you mean 'wanda'? Known: cats, cett" in message
        assert "docs/adding-a-method.md" in message


@pytest.mark.parametrize("command", ["run", "info"])
def test_unknown_family(error: Error, copy: Path, command: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    message = error(command, str(copy), *(PROMPT if command == "run" else ()))
    assert message.startswith("unknown model family 'gpt2'")
    assert "llama" in message
    assert "docs/adding-a-family.md" in message


@pytest.mark.parametrize("name", ["/tmp/of/nobody", "./nothing", "a/b/c", "../no/folder"])
def test_missing_checkpoint(error: Error, name: str) -> None:
    message = error("run", name, *PROMPT)
    assert message.startswith(f"there is no folder {name!r}")
    assert "give a local folder with config.json and safetensors weights" in message


def test_a_misspelt_demo_model(error: Error) -> None:
    for arguments in (("run", "demo-swigl", *PROMPT), ("eval", "demo-swigl")):
        message = error(*arguments)
        assert message.startswith("unknown model 'demo-swigl'. Did you mean 'demo-swiglu'?")


def test_a_folder_without_a_config(error: Error, tmp_path: Path) -> None:
    message = error("run", str(tmp_path), *PROMPT)
    assert "holds no config.json" in message
    assert "give a local folder with config.json" in message


def change_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("command", ["run", "info"])
@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"hidden_size": "abc"}, "Field 'hidden_size' expected int"),
        ({"num_attention_heads": 3}, "not a multiple of the number of attention heads"),
        ({"hidden_act": "foo"}, "'foo' is unknown"),
        ({"num_hidden_layers": 0}, "no layers"),
        ({"model_type": "t5", "architectures": None}, "unknown model family 't5'"),
    ],
)
def test_broken_configs(
    error: Error, copy: Path, command: str, values: dict[str, object], reason: str
) -> None:
    change_config(copy, **values)
    assert reason in error(command, str(copy), *(PROMPT if command == "run" else ()))


def test_quantised_without_the_library(error: Error, copy: Path) -> None:
    change_config(copy, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    message = error("run", str(copy), *PROMPT)
    assert message.startswith(f"cannot load {str(copy)!r}")
    assert "pip install" in message


def test_missing_tensors(error: Error, copy: Path) -> None:
    edit_weights(copy, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    message = error("run", str(copy), *PROMPT)
    assert message.startswith(f"the checkpoint {str(copy)!r} lacks the weights")
    assert "'model.layers.1.mlp.up_proj.weight'" in message


def test_tied_weights_are_stored_once(error: Error, copy: Path) -> None:
    change_config(copy, tie_word_embeddings=True)
    edit_weights(copy, lambda weights: weights.pop("lm_head.weight"))
    assert load_model(str(copy), device="cpu").name == str(copy)
    edit_weights(copy, lambda weights: weights.pop("model.embed_tokens.weight"))
    assert "'model.embed_tokens.weight'" in error("run", str(copy), *PROMPT)


def test_tensors_of_another_shape(error: Error, copy: Path) -> None:
    change_config(copy, intermediate_size=40)
    message = error("run", str(copy), *PROMPT)
    assert message.startswith("'model.layers.0.mlp.down_proj.weight' has the shape (16, 48)")
    assert "its config says (16, 40)" in message


@pytest.mark.parametrize("content", [None, "{", "no vocabulary"])
def test_tokenizers(error: Error, copy: Path, content: str | None) -> None:
    (copy / "tokenizer.json").unlink()
    if content == "no vocabulary":
        kind = json.dumps({"tokenizer_class": "LlamaTokenizer"})
        (copy / "tokenizer_config.json").write_text(kind)
    elif content:
        (copy / "tokenizer.json").write_text(content)
    message = error("run", str(copy), *PROMPT)
    assert message.startswith(f"cannot load the tokenizer of {str(copy)!r}")
    assert "tokenizer.json and tokenizer_config.json belong beside config.json" in message


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
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(copy, lambda weights: weights[name].fill_(torch.nan))
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
    for device in ("tpu", "meta", "cuda:x"):
        assert f"unknown device '{device}'" in error("run", llama, *PROMPT, "--device", device)
    beyond = error("run", llama, *PROMPT, "--device", "cuda:99")
    assert "device 'cuda:99' cannot be used here" in beyond
    assert beyond.endswith("use --device cpu")
    assert "unknown dtype 'int3'; known: auto" in error("run", llama, *PROMPT, "--dtype", "int3")


def test_only_dip_has_a_split(error: Error, llama: str, text: str) -> None:
    message = error("fit", "split", llama, "--text", text, "--method", "gate")
    assert message == "gate has no split to fit: use dip or wina"


@pytest.mark.parametrize("method", ["dip:split=1.2", "dip:input_density=0.5,hidden_density=0.5"])
def test_a_divided_density_has_no_split_to_fit(
    error: Error, llama: str, text: str, method: str
) -> None:
    message = error("fit", "split", llama, "--text", text, "--method", method)
    assert message.startswith(f"{method} says already how its density is divided")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "--colour"), "No such option: --colour"),
        (("eval", "--window", "1"), "Invalid value for '--window'"),
        (("info", "--density", "abc"), "Invalid value for '--density'"),
        (("fit", "split"), "Missing option '--text'"),
        (("eval", "--text"), "Option '--text' requires an argument"),
        (("run", "--seed", "-1"), "Invalid value for '--seed'"),
        (("run", "--seed", str(2**32)), "Invalid value for '--seed'"),
    ],
)
def test_usage(error: Error, arguments: tuple[str, ...], message: str) -> None:
    found = error(*arguments)
    assert message in found
    command = " ".join(takewhile(str.isalpha, arguments))
    assert found.endswith(f"(see dipnet {command} --help)")


def test_an_unknown_command(error: Error) -> None:
    assert error("evla") == "No such command 'evla'. Did you mean 'eval'? (see dipnet --help)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", *PROMPT, "--top-p", "0.9"), "--top-p has no effect at temperature 0"),
        (("run", *PROMPT, "--method", "dense", "--density", "0.5"), "leave out --density"),
        (("run", *PROMPT, "--temperature", "-1"), "temperature must be 0"),
        (("run", *PROMPT, "--calibration", "none.txt"), "there is no text file none.txt"),
        (("eval", "--calibration", "none.txt"), "there is no text file none.txt"),
        (("eval", "--method", "dense", "--density", "0.5"), "--density has no effect on dense"),
        (("eval", "--method", "dip:density=0.4", "--density", "0.5"), "--density has no effect"),
        (("eval", "--split", "test"), "--column go with --dataset"),
        (("eval", "--text", "a", "--column", "text"), "--column go with --dataset"),
        (("eval", "--method", "gate", "--fit-split", "a"), "--fit-split has no effect"),
        (("eval", "--fit-split", "none.txt"), "there is no text file none.txt"),
        (("fit", "split", "--text", "none.txt"), "there is no text file none.txt"),
    ],
)
def test_arguments_are_tested_before_the_model(
    error: Error, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.delattr("dipnet.models.load.load_model")
    assert message in error(*arguments)
