"""The plain data everything else speaks in: matrices, sites, model shapes, sizes in memory.

Knows no tensor library, no model and no method; imports nothing of ours but the errors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dipnet.errors import InputError

ScoredOn = Literal["input", "gate", "up", "hidden", "heads", "residual", "position"]
"""What a score reads: the site's input (``hidden`` and ``heads`` are names for that of ``down`` and
of ``o``), what ``gate`` (activated) or ``up`` put out, the residual stream at the site's ``place``,
or the token's position in its sequence."""
LOOK_AHEADS = (0, 1, 2)
"""How many blocks (attention or MLP) ahead of its own a predictor may read the residual stream."""
MLP_MATRICES = ("gate", "up", "down")
ATTENTION_MATRICES = ("q", "k", "v", "o")
_LETTERS = "kmgt"
_UNITS = {"": 1, "b": 1} | {
    letter + ending: (1000 if ending == "b" else 1024) ** power
    for power, letter in enumerate(_LETTERS, 1)
    for ending in ("", "b", "ib")
}


@dataclass(frozen=True)
class Operand:
    """One weight matrix that a mask thins: ``weights_per_unit`` weights stay or go with a unit.

    With ``shared_by`` > 1 they belong to so many neighbouring units together, and go when none of
    these is kept: a key or value head of grouped-query attention.
    """

    matrix: str
    weights_per_unit: int
    shared_by: int = 1


@dataclass(frozen=True)
class Site:
    """A place in a layer where one mask is decided.

    ``name`` is one of ``attn.in``, ``attn.out``, ``attn.head``, ``mlp.in``, ``mlp.hidden``,
    ``mlp.neuron``. A unit is what the mask keeps or drops: ``block`` neighbouring input channels or
    neurons, one by default, or a query head, whose channels are a block of the output projection's
    inputs. ``units`` is their number, ``density`` the share of them that the method aims to keep;
    ``scored_on`` names the activation that the method's score reads, and ``place`` (of
    `residual_place`) where it does when that is the residual stream.
    """

    layer: int
    name: str
    units: int
    density: float
    operands: tuple[Operand, ...]
    scored_on: ScoredOn = "input"
    block: int = 1
    place: int | None = None

    @property
    def channels(self) -> int:
        """Input channels or neurons, over all units."""
        return self.units * self.block

    @property
    def weights_per_unit(self) -> int:
        """Weights that one unit brings along, over the operands that it shares with no other."""
        return sum(op.weights_per_unit for op in self.operands if op.shared_by == 1)

    @property
    def group(self) -> int:
        """How many neighbouring units share some of their weights: 1 where none does."""
        return max((operand.shared_by for operand in self.operands), default=1)

    @property
    def weights_per_group(self) -> int:
        """Weights that such a group needs once, when any of its units is kept."""
        return sum(op.weights_per_unit for op in self.operands if op.shared_by > 1)


class DecoderMatrices:
    """What follows from the shapes of a decoder layer's ``matrices``, (outputs, inputs) by name."""

    matrices: Mapping[str, tuple[int, int]]

    @property
    def mlp_matrices(self) -> tuple[str, ...]:
        """The names of the MLP's matrices, in the order of computation."""
        return tuple(name for name in MLP_MATRICES if name in self.matrices)

    @property
    def input_matrices(self) -> tuple[str, ...]:
        """The MLP matrices that read the layer's input: all but ``down``."""
        return self.mlp_matrices[:-1]

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.matrices["down"][0]

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


@dataclass(frozen=True)
class ModelSpec(DecoderMatrices):
    """The shapes of a decoder, as far as sparsity is concerned.

    ``matrices`` maps a name (``gate``, ``up``, ``down``, ``q``, ``k``, ``v``, ``o``) to its
    (outputs, inputs); every layer has the same. A model without a gate has ``up`` and ``down``
    only. ``other_weights`` counts what a token reads beside those matrices: norms, biases, the
    output head, and one row of each embedding table. ``heads`` are the query heads of a layer.
    """

    family: str
    layers: int
    activation: str
    matrices: Mapping[str, tuple[int, int]]
    other_weights: int
    heads: int

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies an activated gate with an up projection."""
        return "gate" in self.matrices

    @property
    def neurons(self) -> int:
        """Neurons of one layer's MLP."""
        return self.matrices["down"][1]

    @property
    def head_size(self) -> int:
        """Channels of one attention head."""
        return self.matrices["q"][0] // self.heads

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

    def head_site(self, layer: int, density: float, scored_on: ScoredOn) -> Site:
        """The site ``attn.head``: its units are the layer's query heads.

        A head brings its rows of ``q`` and its columns of ``o``; the rows of ``k`` and ``v`` belong
        to the heads of a group together.
        """
        size, width = self.head_size, self.width
        group = self.matrices["q"][0] // self.matrices["k"][0]
        operands = (
            Operand("q", size * width),
            Operand("k", size * width, shared_by=group),
            Operand("v", size * width, shared_by=group),
            Operand("o", size * width),
        )
        return Site(layer, "attn.head", self.heads, density, operands, scored_on, block=size)


def residual_place(layer: int, name: str, look_ahead: int) -> int:
    """Where the residual stream is read for the site ``name`` of a layer, ``look_ahead`` blocks
    before.

    A decoder's residual stream is seen at two places a layer: 2l before the normalisation of layer
    l's attention, 2l + 1 before that of its MLP. One block ahead is one place before; nothing is
    before the first.
    """
    own = 2 * layer + (0 if name.startswith("attn") else 1)
    return max(0, own - look_ahead)


def check_density(value: float, name: str = "density") -> float:
    """Return ``value`` when it lies in (0, 1]; else raise InputError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise InputError(f"{name} must be in (0, 1], got {value!r}: 0.5 keeps half, 1 keeps all")
    return float(value)


def kept_units(density: float, units: int) -> int:
    """The k of a top-k that keeps ``density`` of ``units``: rounded, at least 1."""
    return max(1, min(units, round(density * units)))


def parse_size(text: str | int) -> int:
    """Bytes of a size such as ``4GiB``, ``1.5G``, ``800MB`` or a number; InputError otherwise.

    As in GNU tools, K, M, G, T and KiB, MiB, ... are powers of 1024; kB, MB, ... of 1000.
    """
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(text))
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or (unit == 1 and "." in match[1]):
        raise InputError(f"{text!r} is no size in memory: write 4GiB, 1.5G, 800MB or bytes")
    return int(float(match[1]) * unit)


def size_text(size: float) -> str:
    """A size for people: ``1.25 GiB``."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:.4g} {name}"
    return f"{size:.0f} B"
