"""The plain data everything else speaks in: matrices, sites, model shapes.

Knows no tensor library, no model and no method; imports nothing of ours but the errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dipnet.errors import InputError

ScoredOn = Literal["input", "gate", "up", "hidden"]
MLP_MATRICES = ("gate", "up", "down")
ATTENTION_MATRICES = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Operand:
    """One weight matrix that a mask thins: ``weights_per_unit`` weights stay or go with a unit."""

    matrix: str
    weights_per_unit: int


@dataclass(frozen=True)
class Site:
    """A place in a layer where one mask is decided.

    ``name`` is one of ``attn.in``, ``attn.out``, ``mlp.in``, ``mlp.hidden``, ``mlp.neuron``. A
    unit is what the mask keeps or drops: ``block`` neighbouring input channels or neurons, one by
    default. ``units`` is their number, ``density`` the share of them that the method aims to keep;
    ``scored_on`` names the activation that the method's score reads.
    """

    layer: int
    name: str
    units: int
    density: float
    operands: tuple[Operand, ...]
    scored_on: ScoredOn = "input"
    block: int = 1

    @property
    def channels(self) -> int:
        """Input channels or neurons, over all units."""
        return self.units * self.block

    @property
    def weights_per_unit(self) -> int:
        """Weights that one unit brings along, over all operands."""
        return sum(operand.weights_per_unit for operand in self.operands)


@dataclass(frozen=True)
class ModelSpec:
    """The shapes of a decoder, as far as sparsity is concerned.

    ``matrices`` maps a name (``gate``, ``up``, ``down``, ``q``, ``k``, ``v``, ``o``) to its
    (outputs, inputs); every layer has the same. A model without a gate has ``up`` and ``down``
    only. ``other_weights`` counts what a token reads beside those matrices: norms, biases, the
    output head, and one row of each embedding table.
    """

    family: str
    layers: int
    activation: str
    matrices: Mapping[str, tuple[int, int]]
    other_weights: int

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies an activated gate with an up projection."""
        return "gate" in self.matrices

    @property
    def mlp_matrices(self) -> tuple[str, ...]:
        """The names of the MLP's matrices, in the order of computation."""
        return tuple(name for name in MLP_MATRICES if name in self.matrices)

    @property
    def input_matrices(self) -> tuple[str, ...]:
        """The MLP matrices that read the layer's input: all but ``down``."""
        return self.mlp_matrices[:-1]

    def weights(self, *matrices: str) -> int:
        """Weights of the named matrices in one layer."""
        return sum(self.matrices[name][0] * self.matrices[name][1] for name in matrices)

    @property
    def mlp_weights(self) -> int:
        """Weights of one layer's MLP matrices."""
        return self.weights(*self.mlp_matrices)

    @property
    def attention_weights(self) -> int:
        """Weights of one layer's attention projections."""
        return self.weights(*ATTENTION_MATRICES)

    @property
    def weights_per_token(self) -> int:
        """Weights that the dense model reads for one token."""
        return self.layers * (self.mlp_weights + self.attention_weights) + self.other_weights

    def input_site(self, layer: int, name: str, density: float, *matrices: str) -> Site:
        """A site whose units are the input channels of ``matrices``: their columns are skipped."""
        operands = tuple(Operand(matrix, self.matrices[matrix][0]) for matrix in matrices)
        return Site(layer, name, self.matrices[matrices[0]][1], density, operands)

    def neuron_site(
        self, layer: int, density: float, scored_on: ScoredOn, *rows: str, block: int = 1
    ) -> Site:
        """A site whose units are MLP neurons: columns of ``down`` and rows of ``rows``.

        It is called ``mlp.neuron`` when a neuron is skipped whole, else ``mlp.hidden``. A unit is
        ``block`` neighbouring neurons; InputError when that does not divide their number.
        """
        outputs, neurons = self.matrices["down"]
        if neurons % block:
            usable = ", ".join(str(size) for size in range(1, 65) if neurons % size == 0)
            raise InputError(
                f"a block of {block} does not divide the {neurons} neurons of a layer: take one of "
                f"{usable}"
            )
        name = "mlp.neuron" if rows == self.input_matrices else "mlp.hidden"
        operands = [Operand(matrix, self.matrices[matrix][1] * block) for matrix in rows]
        operands.append(Operand("down", outputs * block))
        return Site(layer, name, neurons // block, density, tuple(operands), scored_on, block)


def check_density(value: float, name: str = "density") -> float:
    """Return ``value`` when it lies in (0, 1]; else raise InputError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise InputError(f"{name} must be in (0, 1], got {value!r}: 0.5 keeps half, 1 keeps all")
    return float(value)


def kept_units(density: float, units: int) -> int:
    """The k of a top-k that keeps ``density`` of ``units``: rounded, at least 1."""
    return max(1, min(units, round(density * units)))
