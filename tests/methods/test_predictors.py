"""The file of predictors, and what it computes; every file that is none is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dipnet.errors import InputError
from dipnet.methods.predictors import PredictedModel, Predictor, Predictors
from tests.test_units import GATED, UNGATED

MODEL = PredictedModel.of(GATED)  # 3 layers, width 8, 20 neurons, 3 heads
CARD = {"text": "books", "recall": [0.9, 0.8, 0.7], "settings": {"rank": 2, "early": None}}
X = torch.tensor([[1.0, -2.0, 0, 0, 0, 0, 0, 0], [0.0, 0, 0, 0, 0, 0, 0, 3]])


def predictor(units: int, rank: int = 2, **changes: torch.Tensor) -> Predictor:
    made = torch.Generator().manual_seed(units)
    shapes = {"w1": (rank, 8), "b1": (rank,), "w2": (units, rank), "b2": (units,)}
    parts = {name: torch.randn(shape, generator=made) for name, shape in shapes.items()}
    return Predictor(**{**parts, **changes})


def predictors(**changes: Any) -> Predictors:
    layers = {"mlp": [predictor(20)] * 3, "head": [predictor(3, rank=4)] * 3}
    return Predictors(**{"model": MODEL, "look_ahead": 1, "layers": layers, "card": CARD} | changes)


# --- what they compute ---


def test_a_bottleneck_of_two_matrices() -> None:
    two = Predictor(
        w1=torch.tensor([[1.0] + [0.0] * 7, [0.0, 1.0] + [0.0] * 6]),
        b1=torch.tensor([0.0, 1.0]),
        w2=torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
        b2=torch.tensor([0.0, 0.0, 5.0]),
    )
    made = predictors(layers={"head": [two] * 3})
    assert made.scores("head", 0, X).tolist() == [[1.0, -1.0, 5.0], [0.0, 1.0, 6.0]]
    bent = replace(made, activation="relu")
    assert bent.scores("head", 0, X).tolist() == [[1.0, 0.0, 6.0], [0.0, 1.0, 6.0]]


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_in_float32_or_better(given: torch.dtype, computed: torch.dtype) -> None:
    made = predictors()
    for _ in range(2):  # the second time from what was kept
        scores = made.scores("mlp", 2, X.to(given).expand(4, 2, 8))
        assert (scores.dtype, scores.shape) == (computed, (4, 2, 20))
        assert torch.allclose(scores[0].float(), made.scores("mlp", 2, X), atol=1e-5)


def test_they_take_no_gradient() -> None:
    assert not predictors().scores("mlp", 0, X.clone().requires_grad_()).requires_grad


def test_numbers_that_a_token_reads() -> None:
    of_mlp, of_heads = 2 * 8 + 2 + 20 * 2 + 20, 4 * 8 + 4 + 3 * 4 + 3
    made = predictors()
    assert made.numbers("mlp") == 3 * of_mlp
    assert made.numbers("head") == 3 * of_heads
    assert made.numbers("head", 1) == of_heads


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": {"mlp": [predictor(20)] * 2}}, "mlp predictors for 2 layers of 3"),
        (
            {"layers": {"mlp": [predictor(20)] * 2 + [predictor(19)]}},
            r"layer 2 has w2 of shape \(19, 2\), for .* it must be \(20, 2\)",
        ),
        (
            {"layers": {"head": [predictor(3, w1=torch.ones(2, 7))] * 3}},
            r"has w1 of shape \(2, 7\)",
        ),
        ({"layers": {"head": [predictor(3, b1=torch.ones(1))] * 3}}, r"has b1 of shape \(1,\)"),
        ({"layers": {"head": [predictor(3, w1=torch.ones(8))] * 3}}, r"has w1 of shape \(8,\)"),
        ({"layers": {"head": [predictor(3, rank=0)] * 3}}, r"has w1 of shape \(0, 8\)"),
    ],
)
def test_matrices_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        predictors(**changes)


# --- the file ---


@pytest.fixture
def file(tmp_path: Path) -> Path:
    predictors().save(tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


def test_what_is_saved_is_loaded(file: Path) -> None:
    made, found = predictors(), Predictors.load(file)
    assert (found.model, found.look_ahead, found.card) == (MODEL, 1, CARD)
    assert found.activation == "none"
    assert found.kinds == ("mlp", "head")
    assert found.source == str(file)
    for kind in found.kinds:
        assert torch.equal(found.scores(kind, 1, X), made.scores(kind, 1, X))


def test_settings_and_half_precision(tmp_path: Path) -> None:
    half = predictor(3).to(device=torch.device("cpu"), dtype=torch.bfloat16)
    made = predictors(look_ahead=2, activation="relu", layers={"head": [half] * 3})
    made.save(tmp_path / "p")
    found = Predictors.load(tmp_path / "p")
    assert (found.look_ahead, found.activation) == (2, "relu")
    assert found.kinds == ("head",)
    assert torch.equal(found.scores("head", 0, X), made.scores("head", 0, X))


def test_saved_whole_or_not_at_all(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(InputError, match=r"cannot write .*No space left"):
        predictors(look_ahead=2).save(file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot write"):
        predictors().save(tmp_path / "none" / "p")


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        Predictors.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_no_file(tmp_path: Path) -> None:
    assert "does not exist: fit some with `dipnet fit predictors" in refused(tmp_path / "p")
    assert "is no file" in refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x10" + b"\0" * 30, b"x" * 1000])
def test_not_safetensors(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p"
    path.write_bytes(content)
    assert "holds no predictors, or is damaged" in refused(path)


def test_cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])
    assert "damaged" in refused(file)


@pytest.mark.parametrize("said", [None, "", "[]", "{}", "nonsense", '{"format": "dipnet-trace"}'])
def test_the_file_of_something_else(tmp_path: Path, said: str | None) -> None:
    path = tmp_path / "p"
    save_file({"x": torch.ones(2)}, path, metadata=None if said is None else {"dipnet": said})
    assert "is no file of predictors" in refused(path)


def rewrite(file: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    """Write the file again with its header and its tensors changed."""
    tensors = load_file(file)
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(json.loads(file.read_bytes()[8 : 8 + size])["__metadata__"]["dipnet"])
    change(header, tensors)
    save_file(tensors, file, metadata={"dipnet": json.dumps(header)})


def test_another_version(file: Path) -> None:
    rewrite(file, lambda header, _: header.update(version=2))
    assert "is a file of predictors of version 2 and this dipnet reads 1" in refused(file)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("look_ahead", 7),
        ("look_ahead", "1"),
        ("activation", "gelu"),
        ("kinds", []),
        ("kinds", ["mlp", "expert"]),
        ("model", {}),
        ("card", None),
    ],
)
def test_a_header_that_makes_no_sense(file: Path, name: str, value: Any) -> None:
    rewrite(file, lambda header, _: header.update({name: value}))
    assert f"is no file of predictors: {name}" in refused(file)


@pytest.mark.parametrize("name", ["model", "look_ahead", "kinds", "card"])
def test_a_header_that_lacks_something(file: Path, name: str) -> None:
    rewrite(file, lambda header, _: header.pop(name))
    assert f"is no file of predictors: {name}" in refused(file)


def test_keys_of_a_later_dipnet_are_ignored(file: Path) -> None:
    rewrite(file, lambda header, _: header.update(colour="red"))
    assert Predictors.load(file).model == MODEL


def test_a_tensor_is_missing(file: Path) -> None:
    rewrite(file, lambda _, tensors: tensors.pop("head.2.w1"))
    assert "is damaged: it has no tensor head.2.w1" in refused(file)


def test_a_tensor_of_another_shape(file: Path) -> None:
    rewrite(file, lambda _, tensors: tensors.update({"head.1.b2": torch.ones(4)}))
    assert "is damaged: the head predictor of layer 1 has b2 of shape (4,)" in refused(file)


@pytest.mark.parametrize(
    "bad", [torch.tensor([1.0, torch.nan]), torch.tensor([torch.inf, 1]), torch.tensor([1, 2])]
)
def test_numbers_that_are_none(file: Path, bad: torch.Tensor) -> None:
    rewrite(file, lambda _, tensors: tensors.update({"mlp.0.b1": bad}))
    assert "mlp.0.b1 does not hold finite numbers" in refused(file)


def test_of_another_model() -> None:
    with pytest.raises(InputError) as caught:
        predictors().check_model(UNGATED)
    message = str(caught.value)
    assert "are for a toy (silu) of 3 layers, width 8, 20 neurons and 3 heads" in message
    assert "this model is a toy (relu) of 3 layers" in message
    predictors().check_model(GATED)
