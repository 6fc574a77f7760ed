"""Linear layers whose weights are a store's records, in the memory of a GPU as they are on disk.

Matrices that share an input share records. What is kept is read by the kernels; a prompt's product
unpacks a piece of the records at a time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dipnet.kernels import gpu
from dipnet.models.decoding.sharing import MOST_ROWS
from dipnet.models.decoding.stacked import Stacked
from dipnet.models.families import Decoder
from dipnet.models.shared_product import SharedLinear, SharedProduct

PIECE = 1 << 25
"""Weights that are unpacked at a time."""


class Packed(SharedProduct):
    """Matrices of one group: (..., inputs) -> (..., outputs) of all of them, side by side.

    ``weights`` are one with all matrices in its columns, or one for each; ``inputs`` are the
    channels that they read.
    """

    def __init__(self, weights: Sequence[gpu.Weight], inputs: int) -> None:
        super().__init__()
        self.weights = tuple(weights)
        self.inputs = inputs
        first = self.weights[0]
        self.everything = torch.arange(first.units, dtype=torch.int32, device=first.data.device)

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., inputs) -> (..., outputs): all weights are read."""
        flat = x.detach().reshape(-1, self.inputs)
        made = self._of_few(flat) if len(flat) <= MOST_ROWS else self._of_many(flat)
        made = made if bias is None else made + bias
        return made.view(*x.shape[:-1], -1)

    @abstractmethod
    def _of_few(self, x: Tensor) -> Tensor:
        """(rows, inputs) -> (rows, outputs), by the kernels."""

    @abstractmethod
    def _of_many(self, x: Tensor) -> Tensor:
        """The same, with weights that are unpacked."""

    def _pieces(self) -> Iterator[Tensor]:
        """All units, so many at a time that may be unpacked together."""
        yield from self.everything.split(max(1, PIECE // self.weights[0].width))


class PackedColumns(Packed):
    """A unit is an input channel: its column of all matrices."""

    def __init__(self, weight: gpu.Weight) -> None:
        super().__init__([weight], weight.units)

    def _of_few(self, x: Tensor) -> Tensor:
        return gpu.columns_product(x, self.everything, self.weights[0], compact=True)

    def _of_many(self, x: Tensor) -> Tensor:
        total = x.new_zeros(len(x), self.weights[0].width, dtype=torch.float32)
        pieces = list(self._pieces())
        parts = x.split([len(piece) for piece in pieces], dim=1)
        for piece, part in zip(pieces, parts, strict=True):
            total += part @ self.weights[0].rows(piece).to(x.dtype)
        return total.to(x.dtype)


class PackedRows(Packed):
    """A unit is a neuron: its row of each matrix."""

    def __init__(self, weights: Sequence[gpu.Weight]) -> None:
        super().__init__(weights, weights[0].width)

    def _of_few(self, x: Tensor) -> Tensor:
        made = [gpu.rows_product(x, self.everything, weight) for weight in self.weights]
        return torch.cat(made, dim=1)

    def _of_many(self, x: Tensor) -> Tensor:
        made = [
            x @ weight.rows(piece).to(x.dtype).t()
            for weight in self.weights
            for piece in self._pieces()
        ]
        return torch.cat(made, dim=1)


class PackedLinear(SharedLinear):
    """Stands for a linear layer that holds some of a group's outputs."""

    def __init__(self, packed: Packed, rows: slice, takers: int, bias: Tensor | None) -> None:
        super().__init__(packed, packed.inputs, rows, takers, bias)
        self.packed = packed

    @property
    def weight(self) -> Tensor:
        """The bytes: what wants numbers sees that there are none."""
        return self.packed.weights[0].data

    @property
    def packed_weights(self) -> int:
        """Weights that it stands for."""
        return self.in_features * self.out_features

    def extra_repr(self) -> str:
        """What ``print(model)`` says of it."""
        return f"{self.in_features}, {self.out_features}, packed as {self.packed.weights[0].kind}"


class PackedStack:
    """`Stacked`, of layers that share records: nothing moves, and there is nothing to undo."""

    separable = False
    """A column holds all matrices, with multipliers behind them."""

    def __init__(self, modules: Sequence[Any]) -> None:
        self.packed: Packed = modules[0].packed
        self.parts = [module.rows for module in modules]
        self.inputs = self.packed.inputs
        biases = [module.bias for module in modules]
        self.bias = None if biases[0] is None else torch.cat(biases).detach()

    @property
    def by_input(self) -> gpu.Weight:
        """Columns: the units of a product of kept input channels."""
        assert isinstance(self.packed, PackedColumns), "rows of neurons have no columns"
        return self.packed.weights[0]

    def part(self, number: int, _of: int) -> gpu.Weight:
        """Rows of neurons: the units of a product of kept outputs."""
        assert isinstance(self.packed, PackedRows), "columns of several matrices have no rows"
        return self.packed.weights[number]

    def product(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs): all weights are read."""
        return self.packed.product(x, self.bias)

    def undo(self) -> None:
        """Nothing was done."""


def stack(modules: Sequence[Any], turned: bool) -> Stacked | PackedStack:
    """Linear layers that read one input, as one matrix (`Stacked`)."""
    if isinstance(modules[0], PackedLinear):
        return PackedStack(modules)
    return Stacked(modules, turned)


def put_packed(
    decoder: Decoder, layer: int | None, rows: Mapping[str, slice], packed: Packed
) -> None:
    """Let linear layers of a decoder layer (None: the head) be records, of which ``rows`` says
    where each matrix's outputs are. Their weights are let go."""
    if layer is None:
        model = decoder.model
        old = model.get_output_embeddings()
        name = next(name for name, module in model.named_modules() if module is old)
        model.set_submodule(name, _linear(packed, rows["head"], 1, old))
        return
    modules = decoder.family.modules.items()
    holders = {path: held for path, held in modules if set(held) <= set(rows)}
    for path, held in holders.items():
        part = slice(rows[held[0]].start, rows[held[-1]].stop)
        made = _linear(packed, part, len(holders), decoder.module(layer, path))
        decoder.layers[layer].set_submodule(path, made)


def _linear(packed: Packed, rows: slice, takers: int, old: Any) -> PackedLinear:
    bias = getattr(old, "bias", None)
    return PackedLinear(packed, rows, takers, None if bias is None else bias.data)
