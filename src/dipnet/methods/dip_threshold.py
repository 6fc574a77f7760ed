"""DIP with a threshold for each site in the place of each token's top-k.

A token then reads as much as its activations ask for: more where they are spread over many units,
less where few of them matter, and in the mean over a text what DIP reads. DIP's paper compared both
for its hidden mask and kept top-k (https://arxiv.org/abs/2412.01380, section 3); TEAL
(https://arxiv.org/abs/2408.14690) thresholds every input. docs/recovery.md has measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor

from dipnet.errors import InputError
from dipnet.methods.allocation import Allocation
from dipnet.methods.base import Calibration, Scores, SiteKey, Threshold
from dipnet.methods.dip import DIP
from dipnet.methods.factors import Factors
from dipnet.methods.thresholds import Thresholds
from dipnet.units import ModelSpec, Site

ROUNDS = 2
"""Of fitting under the masks: what a site reads depends on the masks before it."""


@dataclass(frozen=True)
class DIPThreshold(Threshold):
    """DIP's two masks of each MLP, decided by thresholds.

    ``density``, ``split``, ``allocation``, ``scores`` and ``hidden_block`` mean what they mean for
    `DIP`. The thresholds come from a calibration text, or are ``fitted``: a file of `dipnet fit
    thresholds`, or a `Thresholds`, which has the sites' densities and the block, too.
    """

    name: ClassVar[str] = "dip-threshold"
    density: float
    split: float | None = field(default=None, kw_only=True)
    allocation: str | Path | Allocation | None = field(default=None, kw_only=True)
    scores: str | Path | Factors | None = field(default=None, kw_only=True)
    hidden_block: int | None = field(default=None, kw_only=True)
    fitted: str | Path | Thresholds | None = field(default=None, kw_only=True)
    plain: DIP = field(init=False, repr=False, compare=False)
    read: Thresholds | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for option in ("allocation", "scores", "fitted"):
            if isinstance(given := getattr(self, option), Path):
                object.__setattr__(self, option, str(given))  # told where settings are told
        allocation, block = self.allocation, self.hidden_block
        if (read := Thresholds.given(self.fitted)) is not None:
            if (allocation, self.split, block) != (None, None, None):
                raise InputError(
                    "fitted thresholds say how the density is divided and how large a block is: "
                    "leave out split, allocation and hidden_block"
                )
            allocation, block = read.allocation, read.hidden_block
            object.__setattr__(self, "thresholds", read.at(self.density))
        plain = DIP(
            self.density,
            split=self.split,
            allocation=allocation,
            scores=self.scores,
            hidden_block=block,
        )
        object.__setattr__(self, "plain", plain)
        object.__setattr__(self, "read", read)

    def sites(self, spec: ModelSpec) -> tuple[Site, ...]:
        return self.plain.sites(spec)

    def factor(self, site: Site, device: torch.device) -> Tensor | None:
        return self.plain.factor(site, device)

    def check_model(self, spec: ModelSpec) -> None:
        if self.read is not None:
            self.read.check(spec, self.plain.factors)
        self.plain.check_model(spec)

    def calibrated_for(self, spec: ModelSpec) -> bool:
        return self.read is not None or super().calibrated_for(spec)

    def calibrated(self, calibration: Calibration) -> Self:
        if self.read is not None:
            return self
        sites = self.sites(calibration.spec)
        found = calibration.scores(self)
        for _ in range(ROUNDS):
            found = calibration.scores(self._above(found, sites), masked=True)
        return self._above(found, sites)

    def _above(self, found: Mapping[SiteKey, Scores], sites: tuple[Site, ...]) -> Self:
        """The method with the thresholds that keep each site's share of some scores."""
        thresholds = {
            (site.layer, site.name): found[site.layer, site.name].threshold(site.density)
            for site in sites
        }
        return replace(self, thresholds=thresholds, calibrated_sites=sites)

    def added_weights(self, spec: ModelSpec) -> int:
        return self.plain.added_weights(spec) + len(self.sites(spec))
