"""Training: layers together as alone, what is folded as what was trained, and it does learn."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from dipnet.adapt.bank import Bank
from dipnet.adapt.collect import CODE, Sample, Seen
from dipnet.adapt.fit_settings import FitSettings
from dipnet.adapt.quality import Counts
from dipnet.methods.predictors import Activation, PredictedModel, Predictors

WIDTH, UNITS, TOKENS, LAYERS = 12, 20, 900, 3
MODEL = PredictedModel(
    family="llama", activation="silu", layers=LAYERS, width=WIDTH, neurons=UNITS, heads=2
)


def planted(rank: int = 4, device: str = "cpu") -> Sample:
    """Units that are wanted where a product of low rank is high; channels of many sizes."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(LAYERS, TOKENS, WIDTH, generator=generator)
    low = torch.randn(LAYERS, WIDTH, rank, generator=generator) / WIDTH**0.5
    high = torch.randn(LAYERS, rank, UNITS, generator=generator) / rank**0.5
    z = x @ low @ high
    worth = torch.where(z > 0.5, z + 0.5, 0)
    sizes = torch.logspace(-2, 2, WIDTH)
    codes = worth.to(CODE).view(torch.uint8)
    sample = Sample(TOKENS)
    sample.add(Seen((x * sizes + 3 * sizes).half().to(device), {"mlp": codes.to(device)}))
    return sample


def bank(sample: Sample, layers: range, activation: Activation = "none", rank: int = 6) -> Bank:
    settings = FitSettings(activation=activation)
    generator = torch.Generator().manual_seed(0)
    return Bank("mlp", layers, list(layers), sample, rank, settings, generator)


def train(trained: Bank, sample: Sample, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        tokens = torch.randint(TOKENS, (128,), generator=generator)
        trained.step(sample, tokens.to(sample.places.device), 1e-2)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_a_planted_problem_is_learned(activation: Activation) -> None:
    sample = planted()
    trained = bank(sample, range(LAYERS), activation, rank=24 if activation == "relu" else 6)
    before = trained.measure(sample, 10)
    start = trained.best_captured
    train(trained, sample, 400)
    after = trained.measure(sample, 10)
    assert all(later < 0.6 * sooner for later, sooner in zip(after, before, strict=True))
    assert (trained.best_captured > 0.95).all()
    assert (start < 0.85).all()


def test_layers_train_together_as_alone() -> None:
    sample = planted()
    together = bank(sample, range(LAYERS))
    alone = [bank(sample, range(layer, layer + 1)) for layer in range(LAYERS)]
    for layer, one in enumerate(alone):
        for mine, its in zip(one.parameters, together.parameters, strict=True):
            mine.data.copy_(its.data[layer : layer + 1])
    for each in (together, *alone):
        train(each, sample, 20)
    for layer, one in enumerate(alone):
        for mine, its in zip(one.parameters, together.parameters, strict=True):
            torch.testing.assert_close(mine[0], its[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_what_is_deployed_scores_as_what_was_trained(activation: Activation) -> None:
    sample = planted()
    trained = bank(sample, range(LAYERS), activation)
    train(trained, sample, 30)
    trained.measure(sample, 6)
    made = Predictors(MODEL, 1, {"mlp": trained.predictors()}, activation)
    scores = trained.scores(sample.places).detach()
    for layer in range(LAYERS):
        deployed = made.scores("mlp", layer, sample.places[layer])
        torch.testing.assert_close(deployed, scores[layer], rtol=1e-3, atol=1e-3)


def test_each_layer_keeps_its_best_weights() -> None:
    sample = planted()
    trained = bank(sample, range(LAYERS))
    trained.measure(sample, 6)
    kept = copy.deepcopy(trained.best)
    with torch.no_grad():
        trained.w2[1] *= -1  # now layer 1 prefers what is not wanted
    trained.measure(sample, 6)
    assert trained.stale == 1
    for best, earlier in zip(trained.best, kept, strict=True):
        assert torch.equal(best, earlier)
    train(trained, sample, 100)
    trained.measure(sample, 6)
    assert trained.stale == 0
    assert not torch.equal(trained.best[2], kept[2])


def test_the_gradient_is_that_of_the_weighted_loss() -> None:
    sample = planted()
    trained = bank(sample, range(1))
    tokens = torch.arange(50)
    worth = sample.codes["mlp"][:1, tokens].view(CODE).float()
    scores = trained.scores(sample.places[:1, tokens])
    loss = torch.nn.functional.binary_cross_entropy_with_logits(
        scores, (worth > 0).float(), torch.where(worth > 0, worth, 1), reduction="sum"
    )
    expected = torch.autograd.grad(loss, trained.parameters)
    trained.step(sample, tokens, 0.0)
    for parameter, gradient in zip(trained.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)


def test_counts_by_hand() -> None:
    scores = torch.tensor([[[3.0, 2.0, 1.0, 0.0], [0.0, 1.0, 2.0, 3.0]]])
    worth = torch.tensor([[[1.0, 0.0, 2.0, 4.0], [0.0, 0.0, 0.0, 8.0]]])
    counts = Counts.of(scores, worth.to(CODE).view(torch.uint8), 2)
    quality = counts.qualities([2], 4)[0]
    # Of 4 wanted units the two top-2 hold the first token's first and the second token's last.
    assert (quality.wanted, quality.density) == (4 / 8, 0.5)
    assert (quality.recall, quality.precision) == (2 / 4, 2 / 4)
    assert quality.bound == (2 + 1) / 4
    assert quality.captured == (1 + 8) / 15


@pytest.mark.cuda
def test_a_step_does_not_wait_for_the_gpu() -> None:
    sample = planted(device="cuda")
    trained = bank(sample, range(LAYERS))
    tokens: Tensor = torch.arange(128, device="cuda")
    trained.step(sample, tokens, 1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trained.step(sample, tokens, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_a_gpu_learns_what_a_cpu_learns() -> None:
    here, there = planted(), planted(device="cuda")
    first, second = bank(here, range(LAYERS)), bank(there, range(LAYERS))
    train(first, here, 30)
    train(second, there, 30)
    torch.testing.assert_close(second.w2.cpu(), first.w2, rtol=1e-2, atol=1e-3)
