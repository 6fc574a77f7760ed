"""Neurons that fire together become neighbours."""

from __future__ import annotations

import pytest
import torch

from dipnet.adapt import coactivation
from dipnet.adapt.coactivation import fit_orders, group_by_correlation
from dipnet.errors import InputError
from tests.families import every_family, random_tokens, shared


@pytest.mark.parametrize("seeds", [1, 5, 64])
def test_planted_groups_are_found(seeds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coactivation, "SEEDS", seeds)
    groups, block = 15, 4
    causes = torch.rand(400, groups)
    magnitudes = causes.repeat_interleave(block, dim=1) + 0.1 * torch.rand(400, groups * block)
    shuffled = torch.randperm(groups * block)
    order = group_by_correlation(magnitudes[:, shuffled], block)
    assert torch.equal(order.sort().values, torch.arange(groups * block))
    found = shuffled[order].view(groups, block) // block
    assert (found == found[:, :1]).all()


def test_silent_neurons_have_a_place() -> None:
    magnitudes = torch.zeros(50, 12)
    magnitudes[:, 5] = torch.rand(50)
    order = group_by_correlation(magnitudes, 3)
    assert torch.equal(order.sort().values, torch.arange(12))
    assert 5 in order[:3]


@every_family
def test_every_family(family: str) -> None:
    model = shared(family)
    orders = fit_orders(model, random_tokens(200), block=4)
    neurons = model.config.ffn_dim if family.startswith("opt") else 52
    assert set(orders) == {0, 1}
    for order in orders.values():
        assert torch.equal(order.sort().values, torch.arange(neurons))
    again = fit_orders(model, random_tokens(200), block=4)
    assert all(torch.equal(orders[layer], again[layer]) for layer in orders)


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(InputError, match="blocks of 3 do not divide the 52 neurons"):
        fit_orders(shared("llama"), random_tokens(200), block=3)
    with pytest.raises(InputError, match="text is empty"):
        fit_orders(shared("llama"), random_tokens(1), block=4)
