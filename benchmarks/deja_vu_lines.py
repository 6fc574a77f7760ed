"""What deja_vu.py measures: lines of one method over its densities, and the fits behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dipnet
from dipnet.methods.base import Method
from dipnet.units import ModelSpec

CAUSES: dict[str, dict[str, Any]] = {
    **{f"look-ahead {ahead}": {"look_ahead": ahead} for ahead in (0, 1, 2)},
    "gradient": {"look_ahead": 1, "criterion": "gradient"},
    **{f"look-ahead 1, rank {rank}": {"look_ahead": 1, "rank": rank} for rank in (48, 24)},
}
"""The fits, by what they differ in."""
DEPLOYED = "look-ahead 1"
DENSITIES = {
    False: (0.95, 0.6, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1),
    True: (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.3),
}
"""Of MLPs without a gate (ReLU) and with one (SwiGLU)."""
WITH_HEADS = {
    False: (0.6, 0.4, 0.25, 0.15, 0.1),
    True: (0.95, 0.9, 0.8, 0.6, 0.4),
}
"""The same, where heads are pruned too."""
KEPT_HEADS = (13, 12, 11, 10, 9, 7, 4)
KEPT_WITH_MLP = (13, 12, 10)

Density = float | None
Make = Callable[[Density, Density], Method]


@dataclass(frozen=True)
class Line:
    """One method over (MLP, head) densities; ``part`` is "mlp", "heads" or "both"."""

    part: str
    name: str
    method: Make
    densities: Sequence[tuple[Density, Density]]


def lines(spec: ModelSpec, fitted: Mapping[str, dipnet.Predictors]) -> list[Line]:
    """Everything that is measured on a model of that shape, with its predictors."""
    predicted = {name: _predicted(each) for name, each in fitted.items()}
    even = _predicted(fitted[DEPLOYED], allocation="uniform")
    bounds: dict[str, Make] = {"oracle": dipnet.DejaVuOracle, "random": dipnet.RandomMasks}
    ours = {**predicted, f"{DEPLOYED}, even": even, **bounds}
    whole: dict[str, Make] = {
        "DIP": lambda mlp, _: dipnet.DIP(mlp),
        f"{DEPLOYED}, first layer dense": _first_dense(spec, fitted[DEPLOYED]),
        "CETT": lambda mlp, _: dipnet.CETT(mlp),
        "GLU": lambda mlp, _: dipnet.GLUPruning(mlp),
    }
    # heads are fewer than any of the ranks: their predictors would be the same
    whole_rank = {name: make for name, make in predicted.items() if "rank" not in CAUSES[name]}
    ours_of_heads = {**whole_rank, f"{DEPLOYED}, even": even, **bounds}
    together = {
        **whole_rank,
        **bounds,
        "DIP": lambda mlp, heads: dipnet.DIP(mlp, attention_density=heads),
    }
    mlps = [(density, None) for density in DENSITIES[spec.gated]]
    heads = [(None, kept / spec.heads) for kept in KEPT_HEADS]
    both = [
        (density, kept / spec.heads) for kept in KEPT_WITH_MLP for density in WITH_HEADS[spec.gated]
    ]
    return [
        *(Line("mlp", name, make, mlps) for name, make in {**ours, **whole}.items()),
        *(Line("heads", name, make, heads) for name, make in ours_of_heads.items()),
        *(Line("both", name, make, both) for name, make in together.items()),
    ]


def _predicted(predictors: dipnet.Predictors, allocation: str = "scores") -> Make:
    def make(mlp: Density, heads: Density) -> Method:
        return dipnet.DejaVu(
            mlp,
            heads,
            predictors=predictors,
            look_ahead=predictors.look_ahead,
            allocation=allocation,
        )

    return make


def _first_dense(spec: ModelSpec, predictors: dipnet.Predictors) -> Make:
    """The mean of all layers is what was asked for, the dense first one included."""

    def make(mlp: Density, _heads: Density) -> Method:
        assert mlp is not None
        others = (mlp * spec.layers - 1) / (spec.layers - 1)
        return dipnet.DejaVu(others, predictors=predictors, dense_first=1)

    return make
