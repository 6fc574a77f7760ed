"""Linear layers that share an input share one product."""

from __future__ import annotations

import torch
from torch import Tensor

from dipnet.models.shared_product import SharedLinear, SharedProduct


class Doubled(SharedProduct):
    """Twice its input, and how often that was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def product(self, x: Tensor) -> Tensor:
        self.calls += 1
        return 2 * x


def test_one_product_for_all_that_take_from_it() -> None:
    shared, bias = Doubled(), torch.tensor([10.0])
    first = SharedLinear(shared, 3, slice(0, 2), 2, None)
    second = SharedLinear(shared, 3, slice(2, 3), 2, bias)
    for x in (torch.tensor([1.0, 2, 3]), torch.tensor([[4.0, 5, 6]])):
        shared.calls = 0
        assert torch.equal(first(x), 2 * x[..., :2])
        assert torch.equal(second(x), 2 * x[..., 2:] + bias)
        assert shared.calls == 1


def test_another_input_is_another_product() -> None:
    """Also where one of the takers never came, and for a tensor that was changed since."""
    shared, x = Doubled(), torch.ones(3)
    layer = SharedLinear(shared, 3, slice(0, 3), 2, None)
    layer(x)
    assert layer(x + 1).tolist() == [4, 4, 4]
    alone = SharedLinear(shared, 3, slice(0, 3), 1, None)
    for factor in (1, 2):
        x *= factor
        assert torch.equal(alone(x), 2 * x)
