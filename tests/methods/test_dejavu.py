"""Deja Vu and its bounds: sites, densities by layer, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dipnet
from dipnet import DejaVu, DejaVuOracle, RandomMasks
from dipnet.errors import InputError
from dipnet.methods.base import Method
from dipnet.methods.predictors import Predictors
from dipnet.units import residual_place
from tests.families import random_tokens, shared
from tests.matrix import CALIBRATION, WINDOW, logits
from tests.predicted import predictors
from tests.test_units import GATED

PREDICTED = predictors("llama")  # 2 layers, 52 neurons, 3 heads
TOKENS = random_tokens(2, 6)


# --- sites ---


@pytest.mark.parametrize("method", [DejaVu, DejaVuOracle, RandomMasks])
def test_a_mask_of_heads_and_one_of_neurons(method: type[Method]) -> None:
    sites = method(0.25, 0.6).sites(GATED)
    assert [(site.layer, site.name) for site in sites] == [
        (layer, name) for layer in range(3) for name in ("attn.head", "mlp.neuron")
    ]
    heads, neurons = sites[:2]
    assert (heads.units, heads.block, heads.density) == (3, 4, 0.6)
    assert (neurons.units, neurons.block, neurons.density) == (20, 1, 0.25)
    assert [operand.matrix for operand in neurons.operands] == ["gate", "up", "down"]


def test_a_head_brings_its_rows_and_shares_those_of_its_group() -> None:
    site = GATED.head_site(0, 0.5, "heads")  # heads of 4 channels, width 8, one key head
    weights = {each.matrix: (each.weights_per_unit, each.shared_by) for each in site.operands}
    assert weights == {"q": (32, 1), "k": (32, 3), "v": (32, 3), "o": (32, 1)}
    assert (site.weights_per_unit, site.group, site.weights_per_group) == (64, 3, 64)


@pytest.mark.parametrize("method", [DejaVu, DejaVuOracle, RandomMasks])
def test_the_first_and_the_last_layers_stay_dense(method: type[Method]) -> None:
    layers = {site.layer for site in method(0.5, dense_first=1, dense_last=1).sites(GATED)}
    assert layers == {1}
    with pytest.raises(InputError, match="dense_first 2 and dense_last 1 leave none of the 3 lay"):
        method(0.5, dense_first=2, dense_last=1).check_model(GATED)


@pytest.mark.parametrize(
    ("look_ahead", "heads", "mlps"), [(0, [0, 2, 4], [1, 3, 5]), (1, [0, 1, 3], [0, 2, 4])]
)
def test_predictors_read_the_stream_before(
    look_ahead: int, heads: list[int], mlps: list[int]
) -> None:
    sites = DejaVu(0.5, 0.5, look_ahead=look_ahead).sites(GATED)
    assert [site.place for site in sites if site.name == "attn.head"] == heads
    assert [site.place for site in sites if site.name == "mlp.neuron"] == mlps


def test_two_blocks_are_a_layer() -> None:
    assert residual_place(3, "mlp.neuron", 2) == residual_place(2, "mlp.neuron", 0)
    assert residual_place(3, "attn.head", 2) == residual_place(2, "attn.head", 0)
    assert residual_place(0, "mlp.neuron", 2) == residual_place(0, "attn.head", 2) == 0


# --- what is refused ---


@pytest.mark.parametrize("method", [DejaVu, DejaVuOracle, RandomMasks])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "takes mlp_density, head_density or both"),
        ({"mlp_density": 0}, r"mlp_density must be in \(0, 1\]"),
        ({"head_density": 1.5}, r"head_density must be in \(0, 1\]"),
        ({"mlp_density": 0.5, "dense_first": -1}, "dense_first is a number of layers"),
        ({"mlp_density": 0.5, "dense_last": 0.5}, "dense_last is a number of layers"),
        ({"mlp_density": 0.5, "dense_last": True}, "dense_last is a number of layers"),
    ],
)
def test_arguments(method: type[Method], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        method(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"look_ahead": 3}, "look_ahead is one of 0, 1, 2 blocks, not 3"),
        ({"look_ahead": True}, "look_ahead is one of 0, 1, 2 blocks, not True"),
        ({"look_ahead": 1.0}, r"look_ahead is one of 0, 1, 2 blocks, not 1\.0"),
        ({"allocation": "best"}, "unknown allocation 'best' for dejavu; known: uniform, scores"),
        ({"predictors": 5}, "predictors is a file of dipnet fit predictors, not 5"),
        ({"predictors": "none/p"}, "the predictors none/p does not exist"),
        (
            {"look_ahead": 2, "predictors": PREDICTED},
            "these predictors look 1 blocks ahead, and look_ahead is 2: take look_ahead=1",
        ),
        (
            {"predictors": predictors("llama", kinds=("head",))},
            "mlp_density needs predictors of kind 'mlp', and these are of kind 'head'",
        ),
    ],
)
def test_arguments_of_dejavu(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DejaVu(0.5, **arguments)


@pytest.mark.parametrize("seed", [-1, 1 << 32, 0.5, True, "x"])
def test_a_seed_is_a_number(seed: Any) -> None:
    with pytest.raises(InputError, match="seed is a whole number"):
        RandomMasks(0.5, seed=seed)


def test_without_predictors() -> None:
    needs = "dejavu needs predictors fitted on the model: make them with dipnet fit predictors"
    with pytest.raises(InputError, match=needs):
        dipnet.sparsify(shared("llama"), DejaVu(0.5))
    with pytest.raises(InputError, match=needs):
        calibrated(DejaVu(0.5, allocation="scores"))


@pytest.mark.parametrize("family", ["mistral", "qwen3", "opt"])
def test_predictors_of_another_model(family: str) -> None:
    with pytest.raises(InputError) as caught:
        dipnet.sparsify(shared(family), DejaVu(0.5, predictors=PREDICTED))
    message = str(caught.value)
    assert "these predictors are for a llama (silu) of 2 layers, width 24, 52 neurons" in message
    assert f"this model is a {family} (" in message
    assert "\n" not in message


# --- the file ---


def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "p.safetensors"
    PREDICTED.save(path)
    method = DejaVu(0.5, predictors=path)
    assert method.predictors == str(path)
    path.unlink()
    assert replace(method, mlp_density=0.3).fitted is method.fitted
    with pytest.raises(InputError, match="does not exist"):
        replace(method, predictors=str(tmp_path / "q"))
    assert replace(method, predictors=PREDICTED).fitted is PREDICTED
    with dipnet.sparsify(shared("llama"), method) as model:
        found = logits(model, TOKENS)
    with dipnet.sparsify(shared("llama"), DejaVu(0.5, predictors=PREDICTED)) as model:
        assert torch.equal(found, logits(model, TOKENS))


# --- counts ---


def test_what_the_predictors_read_is_counted() -> None:
    def added(method: DejaVu) -> int:
        return method.added_weights(dipnet.describe(shared("llama")))

    mlp, head = PREDICTED.numbers("mlp"), PREDICTED.numbers("head")
    assert added(DejaVu(0.5, predictors=PREDICTED)) == mlp
    assert added(DejaVu(head_density=0.5, predictors=PREDICTED)) == head
    assert added(DejaVu(0.5, 0.5, predictors=PREDICTED)) == mlp + head
    assert added(DejaVu(0.5, predictors=PREDICTED, dense_last=1)) == mlp // 2


# --- densities by layer ---


def calibrated(method: DejaVu) -> DejaVu:
    return dipnet.calibrate(shared("llama"), method, CALIBRATION, window=WINDOW)


def eager(layer: int, by: float) -> Predictors:
    """The predictors, with all scores of one layer's neurons raised."""
    layers = {kind: list(of_kind) for kind, of_kind in PREDICTED.layers.items()}
    raised = layers["mlp"][layer]
    layers["mlp"][layer] = replace(raised, b2=raised.b2 + by)
    return replace(PREDICTED, layers=layers)


@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
def test_scores_divide_a_density(density: float) -> None:
    even = calibrated(DejaVu(density, 0.5, predictors=PREDICTED, allocation="scores"))
    assert even.layer_densities is not None
    shares = [even.layer_densities[layer, "mlp.neuron"] for layer in (0, 1)]
    assert sum(shares) / 2 == pytest.approx(density, abs=1e-3)
    heads = [even.layer_densities[layer, "attn.head"] for layer in (0, 1)]
    assert sum(heads) / 2 == pytest.approx(0.5, abs=1e-3)
    raised = calibrated(DejaVu(density, predictors=eager(0, 20.0), allocation="scores"))
    more = [raised.layer_densities[layer, "mlp.neuron"] for layer in (0, 1)]
    assert more[0] > shares[0] + 0.02
    assert more[1] < shares[1] - 0.02
    assert sum(more) / 2 == pytest.approx(density, abs=1e-3)


def test_the_shares_are_those_above_one_probability() -> None:
    method = calibrated(DejaVu(0.3, predictors=PREDICTED, allocation="scores"))
    observed = DejaVu(1.0, predictors=PREDICTED)
    scores: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    class Seeing(DejaVu):
        def score(self, site: Any, x: torch.Tensor) -> torch.Tensor:
            found = super().score(site, x)
            scores[site.layer].append(found.flatten())
            return found

    with dipnet.sparsify(shared("llama"), Seeing(1.0, predictors=observed.fitted)) as model:
        for window in CALIBRATION.view(-1, WINDOW):
            logits(model, window[None])
    cut = torch.cat(scores[0] + scores[1]).quantile(0.7)
    for layer, found in scores.items():
        share = (torch.cat(found) > cut).double().mean().item()
        assert method.layer_densities[layer, "mlp.neuron"] == pytest.approx(share, abs=0.01)


def test_every_layer_keeps_a_unit() -> None:
    method = calibrated(DejaVu(0.1, predictors=eager(1, 60.0), allocation="scores"))
    found = method.layer_densities
    assert found[0, "mlp.neuron"] == pytest.approx(1 / 52)
    assert found[1, "mlp.neuron"] == pytest.approx(0.2 - 1 / 52, abs=1e-3)


def test_everything_is_divided_evenly() -> None:
    method = calibrated(DejaVu(1.0, predictors=PREDICTED, allocation="scores"))
    assert set(method.layer_densities.values()) == {1.0}


def test_densities_of_ones_own() -> None:
    own = {(0, "mlp.neuron"): 0.75, (1, "mlp.neuron"): 0.25}
    method = DejaVu(0.5, predictors=PREDICTED, layer_densities=own)
    with dipnet.sparsify(shared("llama"), method) as model:
        logits(model, TOKENS)
        assert dipnet.usage(model).density().mlp_by_layer == (0.75, 0.25)
    with pytest.raises(InputError, match="another shape"):
        dipnet.sparsify(shared("llama"), replace(method, layer_densities={(0, "mlp.neuron"): 1.0}))
    with pytest.raises(InputError, match=r"the density of mlp.neuron in layer 0 must be in \(0, 1"):
        replace(method, layer_densities={(0, "mlp.neuron"): 0.0})


def test_a_uniform_density_needs_no_text() -> None:
    method = DejaVu(0.3, predictors=PREDICTED)
    assert not method.needs_calibration
    assert calibrated(method) is method


def test_divided_for_another_density() -> None:
    method = calibrated(DejaVu(0.3, predictors=PREDICTED, allocation="scores"))
    for changed in (replace(method, mlp_density=0.4), replace(method, dense_last=1)):
        with pytest.raises(InputError, match="calibrate it again"):
            dipnet.sparsify(shared("llama"), changed)
    with pytest.raises(InputError, match="has to be calibrated on text first"):
        dipnet.sparsify(shared("llama"), replace(method, layer_densities=None))


# --- random masks ---


def test_random_masks_are_as_many_as_asked_and_anywhere() -> None:
    method = RandomMasks(0.25)
    site = method.sites(GATED)[1]
    positions = torch.arange(4000).view(4, 1000, 1)
    mask = method.select(site, method.score(site, positions))
    assert mask.shape == (4, 1000, 20)
    assert (mask.sum(-1) == 5).all()
    assert mask.double().mean((0, 1)).sub(0.25).abs().max() < 0.03
    both = (mask[..., 1:] & mask[..., :-1]).double().mean()
    assert both == pytest.approx(5 / 20 * 4 / 19, abs=0.01)


def test_every_site_token_and_seed_has_its_own() -> None:
    def scores(method: RandomMasks, number: int, position: int) -> torch.Tensor:
        return method.score(method.sites(GATED)[number], torch.tensor([[position]]))

    method = RandomMasks(0.5, 0.5)
    first = scores(method, 1, 0)
    assert torch.equal(first, scores(RandomMasks(0.5, 0.5), 1, 0))
    others = [scores(method, 3, 0), scores(method, 1, 1), scores(replace(method, seed=1), 1, 0)]
    for other in others:
        assert (first - other).abs().mean() > 0.1
