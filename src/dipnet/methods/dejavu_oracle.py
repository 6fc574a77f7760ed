"""What Deja Vu's predictors try to know: the bound on them (https://arxiv.org/abs/2310.17157)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dipnet.methods.heads import NeuronsAndHeads
from dipnet.units import ScoredOn


@dataclass(frozen=True)
class DejaVuOracle(NeuronsAndHeads):
    """Top-k of the true magnitudes, known for free: a bound, not a method.

    A neuron's is that of its intermediate activation, a head's the L2 norm of what it puts out.
    """

    name: ClassVar[str] = "dejavu-oracle"
    neurons_scored_on: ClassVar[ScoredOn] = "hidden"
    heads_scored_on: ClassVar[ScoredOn] = "heads"
