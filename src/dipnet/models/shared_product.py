"""Linear layers that read one input, computed together: by records that hold them side by side."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class SharedProduct(ABC):
    """Matrices that share an input: (..., inputs) -> (..., outputs) of all of them, side by side.

    The first of their linear layers that is called computes all, and the others take their rows.
    """

    def __init__(self) -> None:
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._takers = 0

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""

    def rows(self, x: Tensor, rows: slice, takers: int) -> Tensor:
        """Some rows of the product with ``x``; ``takers`` calls with one input share a product."""
        if self._input is not x or self._output is None:
            self._input, self._takers = x, takers
            self._output = self.product(x)
        made = self._output[..., rows]
        self._takers -= 1
        if self._takers == 0:
            self._input = self._output = None
        return made


class SharedLinear(nn.Module):
    """Stands for a linear layer with some ``rows`` of a product that ``takers`` layers share."""

    def __init__(
        self, shared: SharedProduct, inputs: int, rows: slice, takers: int, bias: Tensor | None
    ) -> None:
        super().__init__()
        self.shared = shared
        self.rows = rows
        self.takers = takers
        self.in_features = inputs
        self.out_features = rows.stop - rows.start
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        made = self.shared.rows(x, self.rows, self.takers)
        return made if self.bias is None else made + self.bias
