"""Thresholds: the scores above which `dip-threshold` keeps a unit, by site.

A small JSON file that `dipnet fit thresholds` writes; docs/recovery.md says when it helps, and
nothing in it is trusted. It holds, for each density that was fitted, the sites' densities and the
thresholds that keep that share of a text's scores in the mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, JsonValue, model_validator

from dipnet.described import CLOSED, Described, Digest, Size
from dipnet.errors import InputError
from dipnet.files import write_file
from dipnet.methods.allocation import Allocation, Point, Shapes, by_name
from dipnet.methods.base import SiteKey
from dipnet.methods.factors import Factors
from dipnet.units import ModelSpec

FORMAT = "dipnet-thresholds"
VERSION = 1
REMEDY = "make one with `dipnet fit thresholds MODEL --out FILE`"

_Thresholds = list[Annotated[float, Field(ge=-1)]]


class Fitted(BaseModel):
    """The thresholds of one density: ``above`` has them as ``point`` has the sites' densities.

    -1 lets every unit pass.
    """

    model_config = CLOSED

    point: Point
    above: dict[str, _Thresholds]


class Thresholds(BaseModel):
    """What such a file holds; ``fit`` is what is known of how they were found, for people.

    ``scores_sha256`` is that of the factors with which magnitudes were multiplied, None without;
    ``hidden_block`` the neurons that the hidden mask keeps or drops together.
    """

    model_config = CLOSED

    format: Literal["dipnet-thresholds"] = "dipnet-thresholds"
    version: Literal[1] = 1
    model: Shapes
    scores_sha256: Digest | None
    hidden_block: Size = 1
    fitted: Annotated[list[Fitted], Field(min_length=1, max_length=100)]
    fit: dict[str, JsonValue]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.allocation  # noqa: B018 - it checks the sites and their densities
        for each in self.fitted:
            if {name: len(found) for name, found in each.above.items()} != {
                str(name): self.model.layers for name in each.point.sites
            }:
                raise ValueError(
                    f"density {each.point.density:g}: every site needs a threshold a layer"
                )
        return self

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def allocation(self) -> Allocation:
        """The densities of the sites."""
        points = [each.point for each in self.fitted]
        return Allocation(model=self.model, points=points, fit={})

    def at(self, density: float) -> dict[SiteKey, float]:
        """The thresholds by site; InputError, with all that there are, for another density."""
        for each in self.fitted:
            if each.point.density == density:
                return {
                    (layer, name): threshold
                    for name, found in each.above.items()
                    for layer, threshold in enumerate(found)
                }
        known = ", ".join(f"{each.point.density:g}" for each in self.fitted)
        raise InputError(
            f"these thresholds were fitted at a density of {known}, not of {density:g}: fit them "
            f"at that one, with dipnet fit thresholds --density {density:g}"
        )

    def check(self, spec: ModelSpec, factors: Factors | None) -> None:
        """Raise InputError when these are another model's, or those of other scores."""
        self.model.check(spec, "these thresholds are")
        if self.scores_sha256 != digest(factors):
            raise InputError(
                "these thresholds were fitted with other scores: give the same scores=FILE, or fit "
                "thresholds again"
            )

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all; InputError when that fails."""
        write_file(Path(path), self.model_dump_json(indent=1) + "\n")

    @classmethod
    def given(cls, value: str | Path | Thresholds | None) -> Thresholds | None:
        """What an argument stands for: itself, the thresholds in a file, or none at all.

        Raises InputError for anything else.
        """
        if isinstance(value, str | Path):
            return _FILES.read(Path(value))
        if value is None or isinstance(value, Thresholds):
            return value
        raise InputError(f"fitted is a file of dipnet fit thresholds, not {value!r}")

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        factors: Factors | None,
        hidden_block: int,
        found: Sequence[tuple[float, Mapping[SiteKey, float], Mapping[SiteKey, float]]],
        fit: Mapping[str, Any],
    ) -> Thresholds:
        """From each density, with the sites' densities and thresholds."""
        fitted = [
            Fitted(point=Point.of(density, shares), above=by_name(above))
            for density, shares, above in sorted(found, key=lambda each: each[0])
        ]
        return cls(
            model=Shapes.of(spec),
            scores_sha256=digest(factors),
            hidden_block=hidden_block,
            fitted=fitted,
            fit=dict(fit),
        )


def digest(factors: Factors | None) -> str | None:
    """The SHA-256 of all factors, by site."""
    if factors is None:
        return None
    made = hashlib.sha256()
    for key in sorted(factors.values):
        made.update(repr(key).encode())
        made.update(factors.values[key].detach().cpu().float().numpy().tobytes())
    return made.hexdigest()


_FILES = Described("thresholds", FORMAT, VERSION, Thresholds, REMEDY)
