"""The loss, against torch's own functions and finite differences."""

import pytest
import torch
from torch.nn import functional

from dipnet.adapt import distillation
from dipnet.adapt.distillation import LossWeights, hidden_loss, token_loss

VOCABULARY = 11


@pytest.fixture(params=[2**24, 2 * VOCABULARY])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows at once, and two at a time."""
    monkeypatch.setattr(distillation, "CHUNK", request.param)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize(("kl", "cross_entropy"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.3)])
def test_value_and_gradient(kl: float, cross_entropy: float) -> None:
    student = torch.randn(2, 5, VOCABULARY, requires_grad=True)
    teacher = torch.randn(2, 5, VOCABULARY)
    tokens = torch.randint(0, VOCABULARY, (2, 5))
    logs = torch.log_softmax(student[:, :-1], -1).flatten(0, 1)
    dense = torch.softmax(teacher[:, :-1], -1).flatten(0, 1)
    divergence = functional.kl_div(logs, dense, reduction="batchmean")
    expected = kl * divergence + cross_entropy * functional.nll_loss(logs, tokens[:, 1:].flatten())
    (slope,) = torch.autograd.grad(expected, student)
    found = token_loss(student, teacher if kl else None, tokens, LossWeights(kl, cross_entropy, 0))
    (gradient,) = torch.autograd.grad(3 * found, student)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, 3 * slope)


def test_no_loss_where_both_agree() -> None:
    logits = torch.randn(1, 4, VOCABULARY)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    assert token_loss(logits, logits, tokens, LossWeights(1, 0, 0)).abs() < 1e-6


def test_a_large_stream_counts_no_more_than_a_small_one() -> None:
    dense = [torch.randn(2, 3, 8), 1000 * torch.randn(2, 3, 8)]
    masked = [1.1 * each for each in dense]
    assert float(hidden_loss(masked, dense)) == pytest.approx(0.01, rel=1e-4)
    assert float(hidden_loss(dense, dense)) == 0
