"""Pruning by the intermediate activations of a gated linear unit.

The baselines of Dynamic Input Pruning (https://arxiv.org/abs/2412.01380, its table of pruning
schemes). All decide one top-k mask over the MLP's neurons; they differ in which activation decides
and therefore in which matrices must be read in full before the decision:

=========== ===================== ============================== =================
method      decided by            skipped                        lowest density
=========== ===================== ============================== =================
GLUPruning  ``|up * act(gate)|``  columns of down                2/3 (1/2 ungated)
GatePruning ``|act(gate)|``       rows of up, columns of down    1/3
UpPruning   ``|up|``              rows of gate, columns of down  1/3
GLUOracle   ``|up * act(gate)|``  all three, known for free      0
=========== ===================== ============================== =================

``density`` is the share of the MLP's weights that is read; the neurons' density follows from it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from dipnet.errors import InputError
from dipnet.methods.base import Method, TopK
from dipnet.units import ModelSpec, ScoredOn, Site, check_density


@dataclass(frozen=True)
class NeuronPruning(Method):
    """One mask over the neurons of each MLP; subclasses say what decides and what is skipped."""

    density: float
    scored_on: ClassVar[ScoredOn]

    def __post_init__(self) -> None:
        check_density(self.density)

    @abstractmethod
    def skipped_rows(self, spec: ModelSpec) -> tuple[str, ...]:
        """The matrices whose rows a dropped neuron skips, beside its column of ``down``."""

    def sites(self, spec: ModelSpec) -> tuple[Site, ...]:
        rows = self.skipped_rows(spec)
        density = self.neuron_density(spec, rows)
        return tuple(
            spec.neuron_site(layer, density, self.scored_on, *rows) for layer in range(spec.layers)
        )

    def neuron_density(self, spec: ModelSpec, rows: tuple[str, ...]) -> float:
        """The share of neurons to keep, so that the MLP's weights are read at ``density``."""
        skippable = spec.weights(*rows, "down") / spec.mlp_weights
        lowest = 1 - skippable
        if self.density <= lowest:
            raise InputError(
                f"{self.name} reads {lowest:.3f} of the MLP's weights before it can decide: "
                f"density must be above that, got {self.density:g}; dip has no such limit"
            )
        return (self.density - lowest) / skippable


@dataclass(frozen=True)
class GLUPruning(NeuronPruning, TopK):
    """Top-k of the full intermediate activation; skips columns of ``down`` only."""

    name: ClassVar[str] = "glu"
    scored_on: ClassVar[ScoredOn] = "hidden"

    def skipped_rows(self, spec: ModelSpec) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class GatePruning(NeuronPruning, TopK):
    """Top-k of the activated gate; skips rows of ``up`` and columns of ``down``."""

    name: ClassVar[str] = "gate"
    needs_gate: ClassVar[bool] = True
    scored_on: ClassVar[ScoredOn] = "gate"

    def skipped_rows(self, spec: ModelSpec) -> tuple[str, ...]:
        return ("up",)


@dataclass(frozen=True)
class UpPruning(NeuronPruning, TopK):
    """Top-k of the up projection; skips rows of ``gate`` and columns of ``down``."""

    name: ClassVar[str] = "up"
    needs_gate: ClassVar[bool] = True
    scored_on: ClassVar[ScoredOn] = "up"

    def skipped_rows(self, spec: ModelSpec) -> tuple[str, ...]:
        return ("gate",)


@dataclass(frozen=True)
class GLUOracle(NeuronPruning, TopK):
    """Top-k of the true intermediate activation, known for free: a bound, not a method."""

    name: ClassVar[str] = "glu-oracle"
    scored_on: ClassVar[ScoredOn] = "hidden"

    def skipped_rows(self, spec: ModelSpec) -> tuple[str, ...]:
        return spec.input_matrices
