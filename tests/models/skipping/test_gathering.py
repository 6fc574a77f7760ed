"""Rows and columns, gathered: against products with masks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dipnet.models.skipping import gathering
from dipnet.models.skipping.gathering import Columns, kept_indices, rows_product
from tests.matrix import CLOSE

UNITS, INPUTS, OUTPUTS = 30, 7, 5


def kept(*units: int) -> torch.Tensor:
    return torch.zeros(UNITS, dtype=torch.bool).index_fill(0, torch.tensor(units), True)


def test_indices() -> None:
    assert kept_indices(kept(3, 17, 29), 30).tolist() == [3, 17, 29]


@pytest.mark.parametrize("most", [3, 5, 29])
def test_as_many_indices_as_were_asked_for(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "AT_ONCE", ())
    found = kept_indices(kept(3, 17, 29), most).tolist()
    assert found[:3] == [3, 17, 29]
    assert len(found) == len(set(found)) == most


@pytest.mark.parametrize("most", [30, 90])
def test_all_indices_are_in_order(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "AT_ONCE", ())
    assert kept_indices(kept(3, 17), most).tolist() == list(range(30))


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("piece", [1, 4 * INPUTS * 8, 1 << 20])
@pytest.mark.parametrize("tokens", [(1,), (2,), (4, 1), (2, 3)])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_products(
    block: int, piece: int, tokens: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "PIECE_BYTES", piece)
    mask = kept(1, 2, 8, 9, 20).unflatten(0, (-1, block)).any(dim=1)
    channels = mask.repeat_interleave(block)
    index = mask.nonzero().squeeze(-1)
    first, last = nn.Linear(INPUTS, UNITS, bias).double(), nn.Linear(UNITS, OUTPUTS, bias).double()
    x = torch.randn(*tokens, INPUTS, dtype=torch.float64)
    made = rows_product(x, first.weight, first.bias, index, block)
    torch.testing.assert_close(made, first(x)[..., channels], **CLOSE)
    columns, hidden = Columns(last), first(x)
    product = columns.product(hidden[..., channels], index, block)
    torch.testing.assert_close(product, last(hidden * channels), **CLOSE)


def test_columns_are_runs_until_undone() -> None:
    linear = nn.Linear(UNITS, OUTPUTS)
    parameter, values = linear.weight, linear.weight.detach().clone()
    columns = Columns(linear)
    columns.undo()
    assert linear.weight.is_contiguous()
    with torch.no_grad():
        columns.product(torch.randn(1, 2), torch.tensor([4, 7]), 1)
    assert linear.weight is parameter
    assert linear.weight.t().is_contiguous()
    assert torch.equal(linear.weight, values)
    columns.undo()
    assert linear.weight.is_contiguous()
    assert torch.equal(linear.weight, values)
