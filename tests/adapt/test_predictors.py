"""`dipnet.fit_predictors`: what is saved is what was measured; bad input is one line."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import dipnet
from dipnet.adapt import fitting
from dipnet.adapt.collect import Sample
from dipnet.adapt.fit_settings import FitSettings
from dipnet.errors import InputError
from dipnet.methods.predictors import Predictors
from dipnet.models.families import describe
from tests.families import every_family, random_tokens, shared, tiny
from tests.reference import linear_layers

WINDOW = 32
TEXT = random_tokens(1, 60 * WINDOW, seed=7)[0]
OTHER = random_tokens(1, 10 * WINDOW, seed=8)[0]
QUICK: dict[str, Any] = {"window": WINDOW, "rank": 8, "epochs": 4, "batch": 64, "rate": 1e-2}


@cache
def fitted(family: str) -> Predictors:
    return dipnet.fit_predictors(shared(family), TEXT, **QUICK)


@torch.no_grad()
def hidden(model: PreTrainedModel, tokens: Tensor, matrix: str, layer: int) -> Tensor:
    """(tokens, channels) the input of one layer's matrix over a text, in windows."""
    seen: list[Tensor] = []
    of_layer = linear_layers(model.get_decoder().layers[layer], model.config)
    module = next(m for m, held in of_layer.items() if matrix in [name for name, _ in held])
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    for window in tokens.view(-1, WINDOW):
        model(window[None])
    handle.remove()
    return torch.cat(seen)


@every_family
def test_every_family(family: str) -> None:
    model, made = shared(family), fitted(family)
    spec = describe(model)
    made.check_model(spec)
    assert made.kinds == ("mlp", "head")
    assert made.look_ahead == 1
    assert [p.w1.shape[0] for p in made.layers["mlp"]] == [8, 8]
    assert made.numbers("head") == 2 * (spec.heads * (24 + 1) + spec.heads * (spec.heads + 1))
    for rows in made.card["held_out"].values():
        assert [row["layer"] for row in rows] == [0, 1]
    # Random weights, but what a neuron does is still a function of what it reads.
    rows = made.card["held_out"]["mlp"]
    assert all(row["captured"] > 1.3 * row["density"] for row in rows)


@every_family
def test_recall_is_that_of_the_top_k_by_hand(family: str) -> None:
    model, made = shared(family), fitted(family)
    found = dipnet.measure_predictors(model, made, OTHER, window=WINDOW)
    settings = FitSettings()
    for layer in range(2):
        down = hidden(model, OTHER, "down", layer).abs()
        k = settings.kept(describe(model))["mlp"]
        if settings.rules(describe(model))["mlp"].target == "active":
            wanted = down > 0
        else:
            wanted = torch.zeros(down.shape).scatter(1, down.topk(k).indices, 1) > 0
        x = _place(model, OTHER, max(0, 2 * layer + 1 - 1))
        kept = made.scores("mlp", layer, x.half()).topk(k).indices
        hits = wanted.gather(1, kept).sum().item()
        quality = found["mlp"][layer]
        assert quality.recall == pytest.approx(hits / wanted.sum().item(), abs=2e-3)
        assert quality.precision == pytest.approx(hits / kept.numel(), abs=2e-3)


def test_recall_where_every_layer_keeps_its_own_share() -> None:
    model, made = shared("llama"), fitted("llama")
    own = {(0, "mlp.neuron"): 0.5, (1, "attn.head"): 1 / 3}
    found = dipnet.measure_predictors(model, made, OTHER, window=WINDOW, layer_densities=own)
    for kind, layer, density in (("mlp", 0, 0.5), ("head", 1, 1 / 3)):
        alone = {f"{kind}_density": density, "target": 0.2, "head_share": 0.5}
        whole = dipnet.measure_predictors(model, made, OTHER, window=WINDOW, **alone)
        assert found[kind][layer] == whole[kind][layer]
    assert found["mlp"][1].density == pytest.approx(0.2, abs=0.01)


@torch.no_grad()
def _place(model: PreTrainedModel, tokens: Tensor, place: int) -> Tensor:
    """(tokens, width) a decoder layer's input: places of a look-ahead of one are such."""
    assert place % 2 == 0
    seen: list[Tensor] = []
    layer = model.get_decoder().layers[place // 2]
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    for window in tokens.view(-1, WINDOW):
        model(window[None])
    handle.remove()
    return torch.cat(seen)


def test_the_card_is_what_was_fitted() -> None:
    about = {"name": "a text", "sha256": "0"}
    model = shared("opt")
    made = dipnet.fit_predictors(model, TEXT, text=about, **QUICK)
    card = made.card
    assert card["text"] == about
    assert card["tokens"] == {"trained": 57 * WINDOW, "held_out": 3 * WINDOW, "window": WINDOW}
    assert card["settings"]["targets"] == {"mlp": "active", "head": 0.5}
    assert card["settings"]["ranks"] == {"mlp": 8, "head": 3}
    assert card["steps"] == {"made": 114, "planned": 114}
    assert card["peak_memory_bytes"]["process"] > 0
    assert set(card["seconds"]) == {"collecting", "training", "total"}


def test_the_seed_decides() -> None:
    def weights(seed: int) -> Tensor:
        made = dipnet.fit_predictors(shared("llama"), TEXT, seed=seed, **QUICK)
        return made.layers["mlp"][1].w2

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_what_is_saved_is_what_is_returned(tmp_path: Path) -> None:
    file = tmp_path / "a.predictors"
    made = dipnet.fit_predictors(shared("llama"), TEXT, out=file, mlp_density=None, **QUICK)
    read = Predictors.load(file)
    assert read.kinds == ("head",)
    assert read.card == made.card
    x = torch.randn(5, 24)
    for layer in range(2):
        assert torch.equal(read.scores("head", layer, x), made.scores("head", layer, x))


def test_the_model_stays_as_it_was() -> None:
    model = tiny("llama")

    def hooks() -> list[list[int]]:  # transformers leaves some where hidden states were asked for
        return [[*m._forward_pre_hooks, *m._forward_hooks] for m in model.modules()]

    before = {name: each.clone() for name, each in model.state_dict().items()}
    hooked = hooks()
    dipnet.fit_predictors(model, TEXT, **QUICK)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert hooks() == hooked


# --- the stream ---


def test_memory_is_bounded_whatever_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[int] = []
    original = Sample.__init__

    def watched(self: Sample, room: int) -> None:
        rooms.append(room)
        original(self, room)

    monkeypatch.setattr(Sample, "__init__", watched)
    per_token = 2 * 3 * 24 + 2 * (52 + 3)  # three places are read with a look-ahead of one
    for length in (1, 3):
        text = TEXT.repeat(length)
        dipnet.fit_predictors(
            shared("llama"), text, **{**QUICK, "epochs": 1}, buffer=per_token * 16 * WINDOW
        )
    held, sample = 2 * WINDOW, 16 * WINDOW
    assert rooms == [held, sample, held, sample]


def test_every_token_is_collected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    added: list[int] = []
    original = Sample.add
    monkeypatch.setattr(
        Sample, "add", lambda s, seen: (added.append(seen.tokens), original(s, seen))
    )
    made = dipnet.fit_predictors(shared("llama"), TEXT, **QUICK, buffer=250_000)
    assert sum(added) == made.card["tokens"]["trained"] + made.card["tokens"]["held_out"]
    assert len(added) > 3
    assert sum(added) == 60 * WINDOW - WINDOW * (3 - made.card["tokens"]["held_out"] // WINDOW)


def test_progress_reaches_the_end() -> None:
    told: list[tuple[str, int, int]] = []
    dipnet.fit_predictors(shared("llama"), TEXT, **QUICK, progress=lambda *said: told.append(said))
    assert [said for said in told if said[0] == "training"][-1] == ("training", 114, 114)
    assert ("collecting", 57 * WINDOW, 57 * WINDOW) in told


def test_training_stops_when_nothing_gets_better() -> None:
    settings = {**QUICK, "rate": 1e-30, "patience": 2}
    made = dipnet.fit_predictors(shared("llama"), TEXT, **settings)
    assert made.card["steps"] == {"made": 33, "planned": 114}


def test_a_bank_of_all_layers_learns_as_banks_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = fitted("llama").card["held_out"]["mlp"]
    monkeypatch.setattr(fitting, "SCORES_AT_ONCE", {"cpu": 2**30})
    together = dipnet.fit_predictors(shared("llama"), TEXT, **QUICK).card["held_out"]["mlp"]
    for mine, its in zip(alone, together, strict=True):
        assert mine["captured"] == pytest.approx(its["captured"], abs=0.05)


# --- bad input ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mlp_density": None, "head_density": None}, "there is nothing to fit"),
        ({"mlp_density": 0.0}, "mlp_density must be in (0, 1], got 0.0"),
        ({"head_share": 2.0}, "head_share must be in (0, 1], got 2.0"),
        ({"target": 7.0}, "target must be in (0, 1], got 7.0"),
        ({"look_ahead": 3}, "look_ahead is one of 0, 1, 2 blocks, not 3"),
        ({"activation": "gelu"}, "activation is none or relu, not 'gelu'"),
        ({"criterion": "hessian"}, "criterion is magnitude or gradient, not 'hessian'"),
        ({"rank": 0}, "rank is a whole number from 1 on, not 0"),
        ({"epochs": 1.5}, "epochs is a whole number from 1 on, not 1.5"),
        ({"rate": 0.0}, "rate is a number above 0, not 0.0"),
        ({"rate": float("nan")}, "rate is a number above 0, not nan"),
        ({"decay": -1.0}, "decay is a number from 0 on, not -1.0"),
        ({"buffer": 1000}, "a buffer of 1000 bytes holds no batch of 64 tokens of this model"),
        ({"mlp_density": 1.0}, "the top share 1 of 52 neurons is all of them"),
        ({"target": "active"}, "every neuron of layer 0 is wanted by every token"),
        ({"rate": 1e38}, "predictor is nan after"),
        ({"window": 500}, "window must be from 2 to the context of 64, got 500"),
        ({"window": 1}, "window must be from 2 to the context of 64, got 1"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"device": "meta"}, "unknown device 'meta'"),
        ({"window": 64, "device": "cpu"}, None),
    ],
)
def test_settings(settings: dict[str, Any], message: str | None) -> None:
    if message is None:
        dipnet.fit_predictors(shared("llama"), TEXT, **{**QUICK, **settings})
        return
    with pytest.raises(InputError) as raised:
        dipnet.fit_predictors(shared("llama"), TEXT, **{**QUICK, **settings})
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_too_little_text() -> None:
    with pytest.raises(InputError, match="it has 19 windows of 32 tokens, and 20 are needed"):
        dipnet.fit_predictors(shared("llama"), TEXT[: 20 * WINDOW - 1], **QUICK)
    with pytest.raises(InputError, match="the calibration text is empty"):
        dipnet.fit_predictors(shared("llama"), TEXT[:1], **QUICK)


def test_a_layer_without_active_neurons() -> None:
    model = tiny("opt")
    with torch.no_grad():
        model.get_decoder().layers[1].fc1.bias.fill_(-1e4)
    with pytest.raises(InputError, match="no neuron of layer 1 is ever active in this text"):
        dipnet.fit_predictors(model, TEXT, **QUICK)


def test_activations_that_are_not_finite() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.get_decoder().layers[1].self_attn.o_proj.weight.fill_(1e9)
    with pytest.raises(InputError, match="before the MLP of layer 1 is not finite in 16 bits"):
        dipnet.fit_predictors(model, TEXT, look_ahead=0, **QUICK)


def test_a_model_that_is_sparsified() -> None:
    with (
        dipnet.sparsify(tiny("llama"), dipnet.DIP(0.5)) as model,
        pytest.raises(InputError, match="the model runs dip already"),
    ):
        dipnet.fit_predictors(model, TEXT, **QUICK)


def test_predictors_of_another_model() -> None:
    with pytest.raises(InputError, match=r"predictors are for a llama .* is a opt"):
        dipnet.measure_predictors(shared("opt"), fitted("llama"), OTHER, window=WINDOW)


def test_an_interrupted_fit_leaves_nothing_and_starts_anew(tmp_path: Path) -> None:
    file, model = tmp_path / "a.predictors", tiny("llama")

    def interrupt(what: str, done: int, _total: int) -> None:
        if what == "training" and done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dipnet.fit_predictors(model, TEXT, out=file, progress=interrupt, **QUICK)
    assert list(tmp_path.iterdir()) == []
    dipnet.fit_predictors(model, TEXT, out=file, **QUICK)
    expected = fitted("llama").layers["mlp"][0].w1
    assert torch.equal(Predictors.load(file).layers["mlp"][0].w1, expected)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the folder .* does not exist"):
        dipnet.fit_predictors(shared("llama"), TEXT, out=tmp_path / "no" / "file", **QUICK)


def test_what_is_predicted_can_be_deployed() -> None:
    method = dipnet.DejaVu(mlp_density=0.2, head_density=0.5, predictors=fitted("opt"))
    with dipnet.sparsify(tiny("opt"), method) as model:
        assert model(OTHER[None, :WINDOW]).logits.isfinite().all()


@pytest.mark.cuda
def test_on_a_gpu() -> None:
    model = shared("llama", torch.float32).to("cuda")
    made = dipnet.fit_predictors(model, TEXT, **QUICK)
    assert made.card["peak_memory_bytes"]["gpu"] > 0
    expected = fitted("llama").card["held_out"]["mlp"]
    for mine, its in zip(made.card["held_out"]["mlp"], expected, strict=True):
        assert mine["captured"] == pytest.approx(its["captured"], abs=0.05)
