"""Deja Vu: contextual sparsity, predicted (https://arxiv.org/abs/2310.17157)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar, Self

from torch import Tensor

from dipnet.errors import InputError
from dipnet.methods.base import Calibration, Scores, SiteKey
from dipnet.methods.heads import NeuronsAndHeads
from dipnet.methods.predictors import Kind, Predictors
from dipnet.units import LOOK_AHEADS, ModelSpec, ScoredOn, Site, check_density, residual_place

ALLOCATIONS = ("uniform", "scores")
STEEPEST = 80.0
"""Logits are compared within these bounds: their exponentials are ordinary float32 numbers."""
BISECTIONS = 50
"""Halvings of that interval until a threshold is found: far below a histogram's bin."""
KIND_OF: dict[str, Kind] = {"mlp.neuron": "mlp", "attn.head": "head"}
DENSITY_OF: dict[Kind, str] = {"mlp": "mlp_density", "head": "head_density"}


@dataclass(frozen=True)
class DejaVu(NeuronsAndHeads):
    """Keeps the neurons and the heads that trained predictors score highest.

    ``predictors`` is the file that `dipnet fit predictors` wrote, or what `Predictors.load` read.
    They see the residual stream ``look_ahead`` blocks before their own, which must be what they
    were fitted for; 0 is right in front of the block. What they read is counted in every density.

    ``allocation`` divides a density among the pruned layers: "uniform" gives each the same, and
    "scores" gives more to the layers where the predictors expect more, keeping the mean: over the
    calibration text, as many units as lie above one score that all layers share. Densities of
    one's own are ``layer_densities``, by (layer, site name), one for every site.
    """

    name: ClassVar[str] = "dejavu"
    neurons_scored_on: ClassVar[ScoredOn] = "residual"
    heads_scored_on: ClassVar[ScoredOn] = "residual"
    predictors: str | Path | Predictors | None = field(default=None, kw_only=True)
    look_ahead: int = field(default=1, kw_only=True)
    allocation: str = field(default="uniform", kw_only=True)
    layer_densities: Mapping[SiteKey, float] | None = field(
        default=None, kw_only=True, repr=False, compare=False
    )
    calibrated_at: tuple[float | None, float | None] | None = field(
        default=None, kw_only=True, repr=False, compare=False
    )
    fitted: Predictors | None = field(default=None, kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.look_ahead) is not int or self.look_ahead not in LOOK_AHEADS:
            known = ", ".join(map(str, LOOK_AHEADS))
            raise InputError(f"look_ahead is one of {known} blocks, not {self.look_ahead!r}")
        if self.allocation not in ALLOCATIONS:
            raise InputError(
                f"unknown allocation {self.allocation!r} for {self.name}; known: "
                f"{', '.join(ALLOCATIONS)}"
            )
        for (layer, site), density in (self.layer_densities or {}).items():
            check_density(density, f"the density of {site} in layer {layer}")
        if isinstance(self.predictors, Path):  # a file's name is told, where settings are told
            object.__setattr__(self, "predictors", str(self.predictors))
        object.__setattr__(self, "fitted", self._load())
        if self.fitted is not None:
            self._check_predictors(self.fitted)

    def _load(self) -> Predictors | None:
        """What ``predictors`` stands for; a file is read once, whatever is made of the method."""
        given, held = self.predictors, self.fitted
        if given is None or isinstance(given, Predictors):
            return given
        if not isinstance(given, str):
            raise InputError(f"predictors is a file of dipnet fit predictors, not {given!r}")
        return held if held is not None and held.source == given else Predictors.load(given)

    def _check_predictors(self, predictors: Predictors) -> None:
        if predictors.look_ahead != self.look_ahead:
            raise InputError(
                f"these predictors look {predictors.look_ahead} blocks ahead, and look_ahead is "
                f"{self.look_ahead}: take look_ahead={predictors.look_ahead}, or fit others"
            )
        for kind, density in DENSITY_OF.items():
            if getattr(self, density) is not None and kind not in predictors.kinds:
                raise InputError(
                    f"{density} needs predictors of kind {kind!r}, and these are of kind "
                    f"{' and '.join(map(repr, predictors.kinds))}: fit others, or leave it out"
                )

    def _ready(self) -> Predictors:
        """The predictors; InputError without any."""
        if self.fitted is None:
            raise InputError(
                f"{self.name} needs predictors fitted on the model: make them with dipnet fit "
                "predictors MODEL --out FILE, then give predictors=FILE"
            )
        return self.fitted

    def sites(self, spec: ModelSpec) -> tuple[Site, ...]:
        return tuple(self._placed(site) for site in super().sites(spec))

    def _placed(self, site: Site) -> Site:
        """A site with its own density and with the place that its predictor reads."""
        given = self.layer_densities or {}
        density = given.get((site.layer, site.name), site.density)
        place = residual_place(site.layer, site.name, self.look_ahead)
        return replace(site, density=density, place=place)

    def score(self, site: Site, x: Tensor) -> Tensor:
        return self._ready().scores(KIND_OF[site.name], site.layer, x)

    @property
    def needs_calibration(self) -> bool:
        return self.allocation == "scores" and self.layer_densities is None

    def calibrated_for(self, spec: ModelSpec) -> bool:
        if self.layer_densities is None:
            return True
        keys = {(site.layer, site.name) for site in self.sites(spec)}
        at = (self.mlp_density, self.head_density)
        return keys == set(self.layer_densities) and self.calibrated_at in (None, at)

    def calibrated(self, calibration: Calibration) -> Self:
        if self.allocation == "uniform":
            return self
        self._ready()
        settings = {each.name: getattr(self, each.name) for each in fields(self)}
        observed = _Odds(**{**settings, "layer_densities": None})
        scores = calibration.scores(observed)
        found: dict[SiteKey, float] = {}
        for name in KIND_OF:
            sites = [site for site in observed.sites(calibration.spec) if site.name == name]
            if sites:
                found |= _allocate(sites, [scores[site.layer, name] for site in sites])
        at = (self.mlp_density, self.head_density)
        return replace(self, layer_densities=found, calibrated_at=at)

    def check_model(self, spec: ModelSpec) -> None:
        super().check_model(spec)
        if self.fitted is not None:
            self.fitted.check_model(spec)

    def check(self, spec: ModelSpec) -> None:
        self._ready()
        super().check(spec)

    def added_weights(self, spec: ModelSpec) -> int:
        predictors = self._ready()
        return sum(predictors.numbers(KIND_OF[site.name], site.layer) for site in self.sites(spec))


@dataclass(frozen=True)
class _Odds(DejaVu):
    """Scores as their exponentials, positive numbers: odds, where the scores are log odds."""

    def score(self, site: Site, x: Tensor) -> Tensor:
        return super().score(site, x).clamp(-STEEPEST, STEEPEST).exp()


def _allocate(sites: Sequence[Site], scores: Sequence[Scores]) -> dict[SiteKey, float]:
    """The densities at which all sites have one threshold, and on average the density asked for.

    ``scores`` are the odds. Every site keeps at least one unit.
    """
    wanted = sum(site.density for site in sites)

    def shares(logit: float) -> list[float]:
        return [
            max(found.share(math.exp(logit)), 1 / site.units)
            for site, found in zip(sites, scores, strict=True)
        ]

    low, high = -STEEPEST, STEEPEST
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if sum(shares(middle)) > wanted:
            low = middle
        else:
            high = middle
    chosen = shares(high) if wanted < len(sites) else [1.0] * len(sites)
    return {(site.layer, site.name): share for site, share in zip(sites, chosen, strict=True)}
