"""The units that a site keeps of one token, by the method's own rule in one launch or a few."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dipnet.kernels import gpu
from dipnet.methods.base import Method, Threshold, TopK
from dipnet.methods.dejavu import DejaVu
from dipnet.methods.dip import DIP
from dipnet.models.decoding.counts import StepCounts
from dipnet.models.decoding.predicting import PredictedScores
from dipnet.units import Site, kept_units


@dataclass(frozen=True, eq=False)
class Kept:
    """(1, k) int32 places of kept units, ascending; the first ``count`` (1,) are valid, or all."""

    index: Tensor
    count: Tensor | None = None


def keeps_fixed_number(method: Method) -> bool:
    """Whether ``select`` is the top-k of the scores."""
    return type(method).select in (TopK.select, DIP.select)


def keeps_above_threshold(method: Method) -> bool:
    """Whether ``select`` compares the scores with thresholds."""
    return type(method).select is Threshold.select


def magnitudes(method: Method, site: Site) -> bool:
    """Whether the scores are the absolute values of what is scored."""
    return type(method).score is Method.score and site.block == 1


class SiteStep:
    """Decides which of one site's units a token keeps: a fixed number, or all above a threshold."""

    def __init__(
        self, site: Site, method: Method, counts: StepCounts, device: torch.device
    ) -> None:
        self.site = site
        self.method = method
        self.counts = counts
        self.key = site.layer, site.name
        self.magnitudes = magnitudes(method, site)
        self.group = site.group
        self.score: Callable[[Tensor], Tensor] = partial(method.score, site)
        if isinstance(method, DejaVu) and type(method).score is DejaVu.score:
            self.score = PredictedScores(method, site, device)
        self.threshold: Tensor | None = None
        self.fixed: int | None = None
        self.counter: Tensor | None = None
        if isinstance(method, Threshold) and keeps_above_threshold(method):
            assert method.thresholds is not None, "check() comes first"
            self.threshold = torch.tensor([method.thresholds[self.key]], device=device)
            self.counter = counts.units[self.key]
        else:
            self.fixed = kept_units(site.density, site.units)

    def decide(self, scored: Tensor) -> Kept:
        """What is kept of one token, from the (1, n) activation that the score reads."""
        scores = scored if self.magnitudes else self.score(scored)
        if self.fixed is not None:
            kept = Kept(gpu.topk_indices(scores, self.fixed, magnitude=self.magnitudes))
            self._count_groups(kept.index)
            return kept
        assert self.threshold is not None
        assert self.counter is not None
        index, count = gpu.threshold_indices(scores, self.threshold, magnitude=self.magnitudes)
        self.counts.add(self.counter, count)
        return Kept(index, count)

    def _count_groups(self, index: Tensor) -> None:
        """Count groups of units of which one is kept, where units share weights in groups."""
        if self.key not in self.counts.groups:
            return
        used = index.new_zeros(self.site.units // self.group)
        used.index_fill_(0, (index[0] // self.group).long(), 1)
        self.counts.add(self.counts.groups[self.key], used.sum(dim=0, keepdim=True))
