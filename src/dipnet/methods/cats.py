"""CATS: contextually-aware thresholding (https://arxiv.org/abs/2404.08763, section 3)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from dipnet.methods.base import Calibration, Threshold
from dipnet.methods.glu import NeuronPruning
from dipnet.units import ModelSpec, ScoredOn


@dataclass(frozen=True)
class CATS(NeuronPruning, Threshold):
    """Keeps the neurons whose activated gate exceeds a threshold calibrated for each layer.

    Skips rows of ``up`` and columns of ``down``. The threshold is the quantile of
    ``|act(gate)|`` over the calibration text in the dense model, so a token may keep more or fewer
    neurons than the average that ``density`` asks for.
    """

    name: ClassVar[str] = "cats"
    needs_gate: ClassVar[bool] = True
    scored_on: ClassVar[ScoredOn] = "gate"

    def skipped_rows(self, spec: ModelSpec) -> tuple[str, ...]:
        return ("up",)

    def calibrated(self, calibration: Calibration) -> Self:
        scores = calibration.scores(self)
        sites = self.sites(calibration.spec)
        return replace(
            self,
            calibrated_sites=sites,
            thresholds={
                (site.layer, site.name): scores[site.layer, site.name].threshold(site.density)
                for site in sites
            },
        )

    def added_weights(self, spec: ModelSpec) -> int:
        return spec.layers
