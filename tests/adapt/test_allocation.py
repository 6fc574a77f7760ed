"""The search of an allocation and the learning of scores: gradients by loops, what is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import dipnet
from dipnet import DIP, WINA
from dipnet.adapt.allocation import Pieces, mean_divergence
from dipnet.adapt.allocation_marginals import BAND, _Boundary, marginals
from dipnet.errors import InputError
from dipnet.methods.base import SiteKey
from tests.families import random_tokens, shared, tiny

WINDOW = 16
TEXT = random_tokens(12 * WINDOW, seed=3)
SETTINGS: dict[str, Any] = {"window": WINDOW, "batch_size": 3, "steps": 6}


def kl(model: PreTrainedModel, method: DIP, tokens: Tensor) -> float:
    """KL(dense || sparse) of the tokens that a window foretells, token by token."""
    with torch.no_grad():
        dense = model(tokens).logits.float().log_softmax(-1)
        with dipnet.sparsify(model, method, backend="reference"):
            ours = model(tokens).logits.float().log_softmax(-1)
    rows = (dense.exp() * (dense - ours)).sum(-1)[:, :-1]
    return float(rows.mean())


def test_the_divergence_is_that_of_the_masks() -> None:
    model, tokens = shared("llama"), TEXT.view(-1, WINDOW)[:3]
    found = marginals(model, DIP(0.5), tokens)
    assert found.divergence == pytest.approx(kl(model, DIP(0.5), tokens), rel=1e-5)
    sites = {(site.layer, site.name): site for site in DIP(0.5).sites(dipnet.describe(model))}
    assert found.density.keys() == sites.keys() == found.scores.keys()
    assert all(len(found.scores[key]) == site.units for key, site in sites.items())


def test_gradients_at_the_boundary_by_loops() -> None:
    draws = torch.Generator().manual_seed(1)
    units, k = 40, 17
    scores, gradient = torch.rand(2, 3, units, generator=draws), torch.randn(2, 3, units)
    density, factor = torch.zeros((), requires_grad=True), torch.zeros(units, requires_grad=True)
    mask = torch.zeros_like(scores).scatter_(-1, scores.topk(k).indices, 1.0)
    made = _Boundary.apply(mask, scores, density, factor, k)
    assert torch.equal(made, mask)
    made.backward(gradient)
    by_density, by_factor = 0.0, [0.0] * units
    for row, values in zip(scores.view(-1, units), gradient.view(-1, units), strict=True):
        ranks = row.argsort(descending=True).tolist()
        near = ranks[k - 1 - round(BAND * units) : k + round(BAND * units)]
        mean = sum(float(values[i]) for i in near) / len(near)
        width = float(row[near[0]].log() - row[near[-1]].log())
        by_density += mean * units
        for i in near:
            by_factor[i] += (float(values[i]) - mean) / max(width, 1e-3)
    assert density.grad is not None
    assert factor.grad is not None
    assert float(density.grad) == pytest.approx(by_density, rel=1e-4)
    assert factor.grad.tolist() == pytest.approx(by_factor, rel=1e-3, abs=1e-4)
    assert float(factor.grad.sum()) == pytest.approx(0, abs=1e-2)  # densities stay


def unequal() -> PreTrainedModel:
    """A model whose second layer's MLP hardly matters."""
    model = tiny("llama")
    with torch.no_grad():
        for layer, factor in enumerate((30.0, 0.01)):
            model.get_decoder().layers[layer].mlp.down_proj.weight.mul_(factor)
    return model


def means(densities: dict[SiteKey, float]) -> list[float]:
    """The mean density of each layer."""
    layers = {layer for layer, _ in densities}
    of = [[d for (at, _), d in densities.items() if at == layer] for layer in sorted(layers)]
    return [sum(each) / len(each) for each in of]


def test_weights_go_where_they_matter() -> None:
    model = unequal()
    found = dipnet.fit_allocation(model, DIP(0.5), [0.5], TEXT, **SETTINGS | {"steps": 12})
    first, second = means(found.densities(0.5))
    assert first > second + 0.2
    method = DIP(0.5, allocation=found)
    said: Any = found.fit["points"]
    assert said[0]["allocated"] < 0.9 * said[0]["uniform"]
    pieces = Pieces.of(model, TEXT, WINDOW, None, 3)
    assert mean_divergence(model, method, pieces) == pytest.approx(said[0]["allocated"], rel=1e-5)
    with dipnet.sparsify(model, method, backend="reference"), torch.no_grad():
        model(TEXT[None, :WINDOW])
        assert dipnet.usage(model).density().mlp == pytest.approx(0.5, abs=0.05)


def test_several_budgets_and_attention() -> None:
    model = unequal()
    found = dipnet.fit_allocation(model, DIP(0.5), [0.4, 0.6], TEXT, attention=True, **SETTINGS)
    assert [point.density for point in found.points] == [0.4, 0.6]
    assert found.has_attention
    assert len(DIP(0.5, allocation=found).sites(dipnet.describe(model))) == 8


def test_a_search_that_finds_nothing_keeps_the_usual_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dipnet.adapt.allocation.mean_divergence", lambda *_: 1.0)
    model = shared("llama")
    found = dipnet.fit_allocation(model, DIP(0.5), [0.5], TEXT, **SETTINGS)
    usual = {(s.layer, s.name): s.density for s in DIP(0.5).sites(dipnet.describe(model))}
    assert found.densities(0.5) == pytest.approx(usual, abs=1e-6)


def test_seeds_repeat_and_the_model_stays_as_it_was() -> None:
    model, seen = tiny("llama").requires_grad_(True), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fits = [
        dipnet.fit_allocation(
            model,
            DIP(0.5),
            [0.5],
            TEXT,
            seed=seed,
            progress=lambda *all_: seen.append(all_),
            **SETTINGS,
        )
        for seed in (1, 1, 2)
    ]
    assert fits[0] == fits[1] != fits[2]
    assert [done for done, _, _ in seen[:6]] == [1, 2, 3, 4, 5, 6]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "mlp" not in model._forward_pre_hooks
    dipnet.sparsify(model, DIP(0.5))  # nothing is attached any more


@pytest.mark.parametrize(
    ("method", "densities", "text", "complaint"),
    [
        (DIP(0.5), [0.5], TEXT[: WINDOW + 3], "2 windows of 16 are the least"),
        (DIP(0.5), [0.5], TEXT[:9], "2 windows of 16 are the least"),
        (DIP(0.5), [1.0], TEXT, "nothing to divide"),
        (DIP(0.5), [1.5], TEXT, "density must be in"),
        (DIP(0.5), [], TEXT, "give a density"),
        (DIP(0.5, split=1.2), [0.5], TEXT, "says already how its density is divided"),
        (DIP(0.5, attention_density=0.5), [0.5], TEXT, "says already"),
    ],
)
def test_bad_input(method: DIP, densities: list[float], text: Tensor, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        dipnet.fit_allocation(shared("llama"), method, densities, text, **SETTINGS)
    assert "\n" not in str(caught.value)


# --- scores ---


def misleading() -> PreTrainedModel:
    """A model with channels that are large and not read, and small ones that are."""
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            layer.post_attention_layernorm.weight[::2] *= 20
            for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj):
                matrix.weight[:, ::2] /= 400
            layer.mlp.down_proj.weight.mul_(10)
    return model


def test_norms_know_which_channels_are_read() -> None:
    model, tokens = misleading(), TEXT.view(-1, WINDOW)
    norms = dipnet.norm_scores(model, DIP(0.5))
    for values in norms.values.values():
        assert float(values.log().mean()) == pytest.approx(0, abs=1e-5)
    assert kl(model, DIP(0.5, scores=norms), tokens) < 0.5 * kl(model, DIP(0.5), tokens)


def test_scores_are_learned_where_norms_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """From ones instead of norms, learning must find what norms know."""
    ones = torch.ones_like
    norms = dipnet.norm_scores

    def flat(model: PreTrainedModel, method: DIP) -> dipnet.Factors:
        made = norms(model, method)
        return dipnet.Factors(made.model, {key: ones(each) for key, each in made.values.items()})

    monkeypatch.setattr("dipnet.adapt.scores.norm_scores", flat)
    monkeypatch.setattr("dipnet.adapt.scores.RATE", 0.3)
    found = dipnet.fit_scores(misleading(), DIP(0.5), TEXT, **SETTINGS | {"steps": 15})
    said = found.fit["divergence"]
    assert said["norm"] == pytest.approx(said["magnitude"])
    assert said["learned"] < 0.9 * said["norm"]
    read = found.values[0, "mlp.in"]
    assert float(read[1::2].log().mean()) > float(read[::2].log().mean()) + 0.2


def test_learning_that_helps_nothing_returns_the_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dipnet.adapt.scores.mean_divergence", lambda *_: 1.0)
    model = shared("llama")
    found = dipnet.fit_scores(model, DIP(0.5), TEXT, **SETTINGS)
    begun = dipnet.norm_scores(model, DIP(0.5))
    assert all(torch.equal(found.values[key], each) for key, each in begun.values.items())


@pytest.mark.parametrize("method", [WINA(0.5), DIP(0.5, hidden_block=4)])
def test_methods_that_have_no_scores_to_learn(method: DIP) -> None:
    with pytest.raises(InputError, match="channel by channel"):
        dipnet.fit_scores(shared("llama"), method, TEXT, **SETTINGS)
