"""Allocations: how a budget of weights is divided among the sites of all layers.

A small JSON file that `dipnet fit allocation` writes and DIP takes; docs/allocation.md explains
every field, and nothing in it is trusted. It holds the sites' densities at one budget or more. What
a token reads is linear in the densities, so that between budgets they are interpolated, and every
budget is met.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, JsonValue, model_validator

from dipnet.described import CLOSED, Described, Size, Word
from dipnet.errors import InputError
from dipnet.files import write_file
from dipnet.methods.base import SiteKey
from dipnet.units import ModelSpec

FORMAT = "dipnet-allocation"
VERSION = 1
REMEDY = "make one with `dipnet fit allocation MODEL --out FILE`"
ATTENTION_SITES = {"attn.in": ("q", "k", "v"), "attn.out": ("o",)}
MLP_SITES = ("mlp.in", "mlp.hidden")
NO_ALLOCATION = "none"
"""In the place of a file: densities are divided as usual, on a store with an allocation too."""
BUDGET_ERROR = 1e-3
"""How far the sites' densities may be from the density that they stand for: they are rounded."""

_Share = Annotated[float, Field(gt=0, le=1)]
_Name = Literal["attn.in", "attn.out", "mlp.in", "mlp.hidden"]


class Shapes(BaseModel):
    """The shapes of the model that something was fitted on: its identity."""

    model_config = CLOSED

    family: Word
    activation: Word
    layers: Annotated[int, Field(ge=1, le=4096)]
    matrices: dict[Word, tuple[Size, Size]]

    @classmethod
    def of(cls, spec: ModelSpec) -> Self:
        """The identity of a model of shape ``spec``."""
        return cls(
            family=spec.family,
            activation=spec.activation,
            layers=spec.layers,
            matrices={name: (rows, columns) for name, (rows, columns) in spec.matrices.items()},
        )

    def check(self, spec: ModelSpec, what: str) -> None:
        """Raise InputError, naming both models, when ``spec`` is another's."""
        found = Shapes.of(spec)
        if found != self:
            raise InputError(
                f"{what} for {self}, and this model is {found}: fit on it, with dipnet fit"
            )

    def thinned(self, name: str) -> list[tuple[int, int]]:
        """The (outputs, inputs) of the matrices of one layer that a site thins; InputError when
        there is no such site.
        """
        inputs = tuple(matrix for matrix in ("gate", "up") if matrix in self.matrices)
        known = {**ATTENTION_SITES, "mlp.in": inputs, "mlp.hidden": ("down",)}
        if not known.get(name) or not set(known[name]) <= set(self.matrices):
            raise InputError(f"the model has no site {name!r}")
        return [self.matrices[matrix] for matrix in known[name]]

    def weights(self, name: str) -> int:
        """Weights of one layer that a site thins."""
        return sum(outputs * inputs for outputs, inputs in self.thinned(name))

    def channels(self, name: str) -> int:
        """Channels of a site."""
        return self.thinned(name)[0][1]

    def __str__(self) -> str:
        width, neurons = self.matrices.get("down", (0, 0))
        return f"a {self.family} ({self.activation}) of {self.layers} layers of {width} × {neurons}"


class Point(BaseModel):
    """One budget: ``density`` is the share of all the sites' weights that a token reads.

    ``sites`` gives each site's share of units, layer by layer.
    """

    model_config = CLOSED

    density: Annotated[float, Field(gt=0, lt=1)]
    sites: dict[_Name, list[_Share]]

    @classmethod
    def of(cls, density: float, sites: Mapping[SiteKey, float]) -> Self:
        """From the densities by site; they are rounded to six decimals."""
        return cls(density=density, sites=by_name({key: round(sites[key], 6) for key in sites}))


class Allocation(BaseModel):
    """What such a file holds; ``fit`` is what is known of how it was found, for people."""

    model_config = CLOSED

    format: Literal["dipnet-allocation"] = "dipnet-allocation"
    version: Literal[1] = 1
    model: Shapes
    points: Annotated[list[Point], Field(min_length=1, max_length=100)]
    fit: dict[str, JsonValue]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not set(MLP_SITES) <= set(self.names) or len(self.names) == 3:
            raise ValueError("sites are mlp.in and mlp.hidden, and both of attention or neither")
        densities = [point.density for point in self.points]
        if densities != sorted(set(densities)):
            raise ValueError("points must have ascending densities")
        for point in self.points:
            self._check_point(point)
        return self

    def _check_point(self, point: Point) -> None:
        if tuple(point.sites) != self.names:
            raise ValueError(f"points.{point.density:g}: every point must have the same sites")
        if any(len(shares) != self.model.layers for shares in point.sites.values()):
            raise ValueError(
                f"points.{point.density:g}: each site needs {self.model.layers} densities, one a "
                "layer"
            )
        weights = {name: self.model.weights(name) for name in self.names}
        read = sum(weights[name] * sum(shares) for name, shares in point.sites.items())
        found = read / (sum(weights.values()) * self.model.layers)
        if abs(found - point.density) > BUDGET_ERROR:
            raise ValueError(
                f"points.{point.density:g}: the sites read {found:.4f} of their weights"
            )

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sites, in the file's order."""
        return tuple(self.points[0].sites)

    @property
    def has_attention(self) -> bool:
        """Whether attention's inputs are pruned, and in the budget."""
        return len(self.names) > len(MLP_SITES)

    def densities(self, density: float) -> dict[SiteKey, float]:
        """The share of units that each site keeps when ``density`` of all their weights is read.

        Linear between the budgets of the file; nothing is read at 0, and everything at 1.
        """
        known = [0.0, *(point.density for point in self.points), 1.0]
        at = max(1, bisect_left(known, density))
        low, high = (self._at(i) for i in (at - 1, at))
        part = (density - known[at - 1]) / (known[at] - known[at - 1])
        return {key: low[key] + part * (high[key] - low[key]) for key in low}

    def _at(self, number: int) -> dict[SiteKey, float]:
        """The densities at one of the budgets, with 0 before them and 1 behind."""
        sites: Mapping[str, Sequence[float]]
        if 1 <= number <= len(self.points):
            sites = {str(name): shares for name, shares in self.points[number - 1].sites.items()}
        else:
            sites = {name: [float(number > 0)] * self.model.layers for name in self.names}
        return {
            (layer, name): density
            for name, densities in sites.items()
            for layer, density in enumerate(densities)
        }

    def check_model(self, spec: ModelSpec) -> None:
        """Raise InputError, naming both, when this is another model's."""
        self.model.check(spec, "this allocation is")

    @property
    def text(self) -> str:
        """What its file holds."""
        return self.model_dump_json(indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all; InputError when that fails."""
        write_file(Path(path), self.text)

    @classmethod
    def load(cls, path: str | Path) -> Allocation:
        """The allocation in a file; InputError, in one line, when it is none."""
        return _FILES.read(Path(path))

    @classmethod
    def given(cls, value: str | Path | Allocation | None) -> Allocation | None:
        """What an argument stands for: itself, the allocation in a file, or none at all.

        Raises InputError for anything else.
        """
        if value is None or value == NO_ALLOCATION:
            return None
        if isinstance(value, str | Path):
            return cls.load(value)
        if isinstance(value, Allocation):
            return value
        raise InputError(f"allocation is a file of dipnet fit allocation, not {value!r}")

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        points: Mapping[float, Mapping[SiteKey, float]],
        fit: Mapping[str, Any],
    ) -> Allocation:
        """From each budget's densities by site."""
        return cls(
            model=Shapes.of(spec),
            points=[Point.of(density, points[density]) for density in sorted(points)],
            fit=dict(fit),
        )


def by_name(numbers: Mapping[SiteKey, float]) -> dict[Any, list[float]]:
    """Numbers by site -> by the site's name, a list over the layers."""
    found: dict[Any, list[float]] = {}
    for (_layer, name), number in sorted(numbers.items()):
        found.setdefault(name, []).append(number)
    return found


_FILES = Described("allocation", FORMAT, VERSION, Allocation, REMEDY)
