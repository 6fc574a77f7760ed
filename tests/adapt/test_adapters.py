"""Adapters, from a text to PEFT's folder and a merged checkpoint."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import dipnet
from dipnet.adapt import adapters, adapting
from dipnet.adapt.adapter_state import STATE_NAME
from dipnet.cache import CacheSettings
from dipnet.errors import InputError
from dipnet.models.caching import SiteCache
from tests.families import random_tokens, tiny

WINDOW = 16
TEXT = random_tokens(WINDOW * 24)
TOKENS = random_tokens(2, WINDOW, seed=5)
DIP = dipnet.DIP(0.5)
QUICK: dict[str, Any] = {"window": WINDOW, "rank": 4, "steps": 6, "batch": 4, "rate": 0.01}


def model_of(family: str = "llama") -> PreTrainedModel:
    return tiny(family).float()


def fit(model: PreTrainedModel, out: Path, method: Any = DIP, **settings: Any) -> Any:
    return dipnet.fit_adapters(model, method, TEXT, out=out, **(QUICK | settings))


def masked_logits(model: PreTrainedModel, method: Any = DIP) -> Tensor:
    with dipnet.sparsify(model, method) as sparse, torch.no_grad():
        return sparse(TOKENS).logits


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same(left: Path, right: Path) -> None:
    first, second = weights_of(left), weights_of(right)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("family", ["llama", "llama-tied", "phi3", "opt", "gemma3"])
def test_plain_libraries_load_both(family: str, tmp_path: Path) -> None:
    model = model_of(family)
    before = masked_logits(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = fit(model, tmp_path / "out", kl=0.0, cross_entropy=1.0)
    for name, tensor in model.state_dict().items():  # the model is what it was
        assert torch.equal(tensor, state[name]), name
    assert all(parameter.requires_grad for parameter in model.parameters())
    merged = AutoModelForCausalLM.from_pretrained(made.merged)
    wrapped = PeftModel.from_pretrained(model_of(family), made.adapter)
    after = masked_logits(merged)
    torch.testing.assert_close(masked_logits(wrapped.get_base_model()), after)
    assert (after - before).abs().max() > 1e-3
    wrapped.merge_and_unload()
    torch.testing.assert_close(
        dict(wrapped.get_base_model().state_dict()), dict(merged.state_dict())
    )


def test_it_learns_what_the_dense_model_does(tmp_path: Path) -> None:
    made = fit(model_of(), tmp_path / "out", steps=40, rate=0.02, batch=8)
    card = json.loads((tmp_path / "out" / "adapters.json").read_text())
    assert card == json.loads(json.dumps(made.card))
    losses = [loss for _, loss, _ in card["history"] if loss is not None]
    assert losses[-1] < 0.8 * losses[0]
    assert card["perplexity"]["adapted"] <= card["perplexity"]["masked"]
    assert card["tokens"] == {"trained": 40 * 8 * WINDOW, "held_out": WINDOW * 1}
    names = {each.name for each in (tmp_path / "out").iterdir()}
    assert names == {"adapter", "merged", "adapters.json"}


def test_the_merged_model_has_the_perplexity_of_the_last_measurement(tmp_path: Path) -> None:
    """Held-out perplexity is that of evaluation, masks included, also where norms are read."""
    for method in (DIP, dipnet.WINA(0.5)):
        made = fit(model_of(), tmp_path / method.name, method)
        merged = AutoModelForCausalLM.from_pretrained(made.merged)
        held = TEXT.view(-1, WINDOW)[10::20].flatten()
        with dipnet.sparsify(merged, method) as sparse:
            found = dipnet.perplexity(sparse, held, window=WINDOW).perplexity
        assert found == pytest.approx(made.perplexity["adapted"], rel=1e-4)


def selections(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> list[Tensor]:
    """The masks that DIP selects while something runs, with gradients on or off alike."""
    plain, seen = dipnet.DIP.select, []

    def select(self: Any, site: Any, scores: Tensor, resident: Any = None) -> Tensor:
        seen.append(plain(self, site, scores, resident))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(dipnet.DIP, "select", select)
        run()
    return seen


def test_masks_are_those_of_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first step is masked with is what `sparsify` decides for the same windows."""
    model, rows = model_of(), []
    plain = adapting.Adapting._loss

    def loss(self: Any, part: Tensor) -> Tensor:
        rows.append(part)
        return plain(self, part)

    monkeypatch.setattr(adapting.Adapting, "_loss", loss)
    settings = {"steps": 1, "precision": "float32"}
    seen = selections(monkeypatch, lambda: fit(model, tmp_path / "out", **settings))
    with dipnet.sparsify(model, DIP) as sparse, torch.no_grad():
        expected = selections(monkeypatch, lambda: sparse(rows[0]))
    sites = len(expected)
    trained = seen[sites : 2 * sites]  # the held-out text is measured before and after
    assert len(seen) == 3 * sites
    for mask, other in zip(trained, expected, strict=True):
        assert torch.equal(mask, other)


def interrupted_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a step is computed."""
    plain, sent = adapting.Adapting._loss, []

    def loss(self: Any, rows: Tensor) -> Tensor:
        if self.course.step == step and not sent:
            sent.append(step)
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, rows)

    monkeypatch.setattr(adapting.Adapting, "_loss", loss)


@pytest.mark.parametrize("method", [DIP, dipnet.WINA(0.5), dipnet.DIP(0.5, cache_aware=0.2)])
def test_interrupted_and_resumed_equals_uninterrupted(
    method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"steps": 12, "cross_entropy": 0.5, "hidden": 1.0, "accumulate": 2}
    if getattr(method, "cache_aware", None):
        settings["cache"] = CacheSettings(0.6)
    monkeypatch.setattr(adapting, "EVALUATIONS", 4)
    whole = fit(model_of(), tmp_path / "whole", method, **settings)
    for step in (4, 7):
        with monkeypatch.context() as patch:
            interrupted_at(step, patch)
            with pytest.raises(KeyboardInterrupt):
                fit(model_of(), tmp_path / "parts", method, **settings)
        assert [each.name for each in (tmp_path / "parts").iterdir()] == [STATE_NAME]
    resumed = fit(model_of(), tmp_path / "parts", method, **settings)
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert resumed.card["history"] == whole.card["history"]


def test_the_state_is_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_at(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        fit(model_of(), tmp_path)
    with safe_open(tmp_path / STATE_NAME, framework="pt") as file:
        groups = {name.partition("/")[0] for name in file.keys()}  # noqa: SIM118
    assert groups == {"weights", "best", "exp_avg", "exp_avg_sq"}


def test_parts_and_checkpointing_change_nothing_but_rounding(tmp_path: Path) -> None:
    made = [
        fit(model_of("opt"), tmp_path / str(number), **settings)
        for number, settings in enumerate(
            [{}, {"accumulate": 3}, {"accumulate": 4, "checkpointing": True}]
        )
    ]
    plain, *others = (each.card["history"] for each in made)
    for other in others:
        for row, expected in zip(other[1:], plain[1:], strict=True):
            assert row[1] == pytest.approx(expected[1], rel=1e-3)


def test_the_true_cache_agrees_with_what_was_trained_for(tmp_path: Path) -> None:
    """Held-out perplexity with the stand-in is near that with the cache itself."""
    method, cache = dipnet.DIP(0.5, cache_aware=0.2), CacheSettings(0.6)
    made = fit(model_of(), tmp_path / "out", method, cache=cache)
    merged = AutoModelForCausalLM.from_pretrained(made.merged)
    held = TEXT.view(-1, WINDOW)[10::20].flatten()
    with dipnet.sparsify(merged, method, cache=cache) as sparse:
        found = dipnet.perplexity(sparse, held, window=WINDOW).perplexity
    assert found == pytest.approx(made.perplexity["adapted"], rel=0.2)


def test_masks_never_come_from_a_cache_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SiteCache, "select", None)
    fit(model_of(), tmp_path / "out", steps=1)


def test_a_divergent_loss_keeps_the_last_good_state(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not finite after .* was good, is kept") as one:
        fit(model_of(), tmp_path, steps=4, rate=1e6)
    assert "at a lower rate than 1e+06" in str(one.value)
    assert [each.name for each in tmp_path.iterdir()] == [STATE_NAME]
    made = fit(model_of(), tmp_path, steps=4, rate=1e-3)
    assert made.card["history"][0][0] == 0
    assert made.card["history"][-1][0] == 4


def test_a_loss_that_is_not_finite_keeps_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = adapting.token_loss
    monkeypatch.setattr(adapting, "token_loss", lambda *args: plain(*args) * float("nan"))
    with pytest.raises(InputError, match="the loss is not finite after 1 steps"):
        fit(model_of(), tmp_path)
    monkeypatch.undo()
    fit(model_of(), tmp_path)
    assert (tmp_path / "adapters.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank is a whole number from 1 on, not 0"),
        ({"steps": 1.5}, "steps is a whole number from 1 on"),
        ({"rate": float("nan")}, "rate is a number above 0"),
        ({"kl": 0.0}, "one of them above 0"),
        ({"hidden": -1.0}, "numbers from 0 on"),
        ({"accumulate": 5}, "4 windows of a step cannot be computed in 5 parts"),
        ({"precision": "half"}, "precision is one of auto, float32, bfloat16"),
        ({"cache": 0.5}, "cache is a dipnet.CacheSettings"),
        ({"cache": CacheSettings(0.5)}, "a cache changes no mask of dip as it is"),
        ({"window": 200}, "window must be from 2 to the context of 64"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        fit(model_of(), tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_text_shorter_than_its_windows(tmp_path: Path) -> None:
    for count in (0, WINDOW - 1, 2 * WINDOW - 1):
        with pytest.raises(InputError, match=f"the text has {count} tokens, and two windows of 16"):
            dipnet.fit_adapters(model_of(), DIP, TEXT[:count], out=tmp_path / "out", **QUICK)
    made = dipnet.fit_adapters(model_of(), DIP, TEXT[: 2 * WINDOW], out=tmp_path / "out", **QUICK)
    assert made.card["tokens"]["held_out"] == WINDOW


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        free = type("Usage", (), {"free": 1000})
        patch.setattr("shutil.disk_usage", lambda _: free)
        with pytest.raises(InputError, match="and 1000 B are free: make room"):
            fit(model_of(), tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dipnet.adapt.adapter_state.save", full)
    with pytest.raises(InputError, match=r"no room is left for .*: make room and repeat"):
        fit(model_of(), tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(adapters.Lora, "save_merged", full)
    with pytest.raises(InputError, match=r"no room is left for .*: make room and repeat"):
        fit(model_of(), tmp_path)
    monkeypatch.undo()
    fit(model_of(), tmp_path)
    assert {each.name for each in tmp_path.iterdir()} == {"adapter", "merged", "adapters.json"}


def test_what_is_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="it is a file; give a folder"):
        fit(model_of(), tmp_path / "file")
    with monkeypatch.context() as patch:
        interrupted_at(2, patch)
        with pytest.raises(KeyboardInterrupt):
            fit(model_of(), tmp_path / "out")
    with pytest.raises(InputError, match="is of a training with another rank"):
        fit(model_of(), tmp_path / "out", rank=3)
    with pytest.raises(InputError, match="is of a training with another method"):
        fit(model_of(), tmp_path / "out", dipnet.DIP(0.4))
    state = tmp_path / "out" / STATE_NAME
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="is damaged or no state of a training"):
        fit(model_of(), tmp_path / "out")
    state.write_bytes(whole)
    fit(model_of(), tmp_path / "out")
    with pytest.raises(InputError, match="holds finished adapters: remove it"):
        fit(model_of(), tmp_path / "out")


def test_a_sparsified_model_and_no_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        dipnet.sparsify(model_of(), DIP) as model,
        pytest.raises(InputError, match="runs dip already"),
    ):
        fit(model, tmp_path)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install 'dipnet\[adapt\]'"):
        fit(model_of(), tmp_path)


def train_in_one_of_several(out: Path) -> None:
    """What each process of a launch runs."""
    torch.set_num_threads(1)
    fit(model_of(), out, accumulate=2)


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """Each takes half of a step's windows; they agree on the sum of their gradients."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = (
        "import pathlib, sys; from tests.adapt.test_adapters import train_in_one_of_several;"
        "train_in_one_of_several(pathlib.Path(sys.argv[1]))"
    )
    launched = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "two")],
            env=os.environ | launched | {"RANK": rank, "LOCAL_RANK": rank},
            cwd=Path(__file__).parents[2],
        )
        for rank in ("0", "1")
    ]
    fit(model_of(), tmp_path / "one", accumulate=2)
    assert [each.wait(timeout=240) for each in processes] == [0, 0]
    first, second = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "two" / "adapters.json").read_text())["processes"] == 2


def test_a_checkpoint_in_bfloat16(tmp_path: Path) -> None:
    """Adapters are trained and kept in float32, the merged weights rounded once."""
    model = tiny("llama").bfloat16()
    made = fit(model, tmp_path, kl=0.0, cross_entropy=1.0)
    merged = AutoModelForCausalLM.from_pretrained(made.merged)
    assert merged.dtype == torch.bfloat16
    adapter = weights_of(tmp_path)
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    name = "model.layers.0.mlp.up_proj"
    low = f"base_model.model.{name}.lora_{{}}.weight"
    delta = 2.0 * adapter[low.format("B")] @ adapter[low.format("A")]
    expected = model.get_submodule(name).weight.float() + delta
    assert torch.equal(merged.get_submodule(name).weight, expected.bfloat16())
