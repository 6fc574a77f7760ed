"""The units that a site keeps of one token, by the method's own rule in one launch or a few."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dipnet.kernels import gpu, steps
from dipnet.kernels.steps import Norm
from dipnet.methods.base import Method, Threshold, TopK
from dipnet.methods.dejavu import DejaVu
from dipnet.methods.dip import DIP
from dipnet.models.decoding.counts import StepCounts
from dipnet.models.decoding.predicting import PredictedScores
from dipnet.models.decoding.sharing import MOST_ROWS, OF_HEADS, WAYS, Way, way
from dipnet.units import Site, kept_units


@dataclass(frozen=True, eq=False)
class Kept:
    """Places of kept units, int32, ascending: (batch, k), each row its own; or (n,) of all rows
    together, or None where all weights are read, and then ``mask`` (batch, units) bool says which
    row keeps what. The first ``count`` are valid, (batch,) or (1,); all, where it is None.
    ``scored`` is there in the place of a mask where what was scored is what is to be masked: that.
    """

    index: Tensor | None
    count: Tensor | None = None
    mask: Tensor | None = None
    scored: Tensor | None = None

    @property
    def own(self) -> bool:
        """Whether each row has a list of its own."""
        return self.index is not None and self.mask is None

    def masked(self, x: Tensor, block: int = 1) -> Tensor:
        """(batch, channels) -> the same, 0 where a row drops a unit of ``block`` channels."""
        if self.scored is not None:
            return self.scored
        assert self.mask is not None, "lists of the rows' own need no mask"
        return (x.unflatten(1, (-1, block)) * self.mask[..., None]).flatten(1)

    def gathered(self, x: Tensor, block: int = 1) -> Tensor:
        """`masked`, of the listed units alone: (batch, n * block)."""
        assert self.index is not None
        made = self.masked(x, block)
        if block == 1:
            return made.index_select(1, self.index)
        return made.unflatten(1, (-1, block)).index_select(1, self.index).flatten(1)

    def listed(self, x: Tensor) -> Tensor:
        """(batch, n) values of the listed units -> the same, 0 where a row drops one."""
        assert self.index is not None
        return x if self.mask is None else x * self.mask.index_select(1, self.index)


def keeps_fixed_number(method: Method) -> bool:
    """Whether ``select`` is the top-k of the scores."""
    return type(method).select in (TopK.select, DIP.select)


def keeps_above_threshold(method: Method) -> bool:
    """Whether ``select`` compares the scores with thresholds."""
    return type(method).select is Threshold.select


def magnitudes(method: Method, site: Site) -> bool:
    """Whether the scores are the absolute values of what is scored, times a factor if any."""
    return type(method).score is Method.score and site.block == 1


class SiteStep:
    """Decides which of one site's units a token keeps: a fixed number, or all above a threshold.

    ``weight_bytes`` are the bytes of one weight, by which a batch's way is chosen; None where only
    lists of the rows' own are served.
    """

    def __init__(
        self,
        site: Site,
        method: Method,
        counts: StepCounts,
        device: torch.device,
        weight_bytes: float | None,
    ) -> None:
        self.site = site
        self.method = method
        self.counts = counts
        self.key = site.layer, site.name
        self.magnitudes = magnitudes(method, site)
        self.factor = method.factor(site, device) if self.magnitudes else None
        if self.factor is not None and isinstance(method, Threshold):
            self.magnitudes, self.factor = False, None  # those kernels take none: `score` does
        self.group = site.group
        self.ways = _ways(site, weight_bytes)
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

    def way(self, rows: int) -> Way:
        """How a batch of so many rows reads the weights."""
        return self.ways[rows - 1]

    def decide(self, scored: Tensor) -> Kept:
        """What is kept of a token of each row, from the (batch, n) activation that the score
        reads, the way that suits the batch."""
        taken = self.way(len(scored))
        if taken == "own":
            return self.lists(scored)
        if taken == "whole" and self.magnitudes:
            return Kept(None, scored=self._thinned(scored))
        mask = self._mask(self._scores(scored))
        if taken == "whole":
            return Kept(None, mask=mask)
        return Kept(*gpu.union_indices(mask), mask)

    def lists(self, scored: Tensor) -> Kept:
        """What is kept, a list for each row."""
        scores, magnitude = self._scores(scored), self.magnitudes
        if self.fixed is not None:
            index = gpu.topk_indices(scores, self.fixed, magnitude=magnitude, factor=self.factor)
            return self._listed(index)
        assert self.threshold is not None
        return self._listed(*gpu.threshold_indices(scores, self.threshold, magnitude=magnitude))

    def normed(
        self, hidden: Tensor, delta: Tensor | None, norm: Norm
    ) -> tuple[Tensor, Tensor, Kept]:
        """`steps.add_norm` of (batch, n) activations, and `decide` of what that makes."""
        if self.way(len(hidden)) != "own" or not self.magnitudes:
            hidden, x = steps.add_norm(hidden, delta, norm)
            return hidden, x, self.decide(x)
        if self.fixed is not None:
            hidden, x, *lists = steps.add_norm_topk(hidden, delta, norm, self.fixed, self.factor)
        else:
            assert self.threshold is not None
            hidden, x, *lists = steps.add_norm_above(hidden, delta, norm, self.threshold)
        return hidden, x, self._listed(*lists)

    def _scores(self, scored: Tensor) -> Tensor:
        return scored if self.magnitudes else self.score(scored)

    def _thinned(self, x: Tensor) -> Tensor:
        """(batch, units), of which magnitudes are compared -> the same, 0 where a row drops one."""
        if self.fixed is not None:
            return gpu.keep_topk(x, self.fixed, factor=self.factor)
        assert self.threshold is not None
        assert self.counter is not None
        kept, count = gpu.keep_above(x, self.threshold)
        self.counts.add(self.counter, count)
        return kept

    def _mask(self, scores: Tensor) -> Tensor:
        """(batch, n) scores -> (batch, units) bool, counted."""
        if self.fixed is not None:
            mask = gpu.topk_mask(scores, self.fixed, magnitude=self.magnitudes, factor=self.factor)
            if self.key in self.counts.groups:
                used = mask.unflatten(1, (-1, self.group)).any(dim=2)
                self.counts.add(self.counts.groups[self.key], used.sum(dim=1))
            return mask
        assert self.threshold is not None
        assert self.counter is not None
        mask = (scores.abs() if self.magnitudes else scores) > self.threshold
        self.counts.add(self.counter, mask.sum(dim=1))
        return mask

    def _listed(self, index: Tensor, count: Tensor | None = None) -> Kept:
        """A list for each row, counted."""
        if count is None:
            self._count_groups(index)
        else:
            assert self.counter is not None
            self.counts.add(self.counter, count)
        return Kept(index, count)

    def _count_groups(self, index: Tensor) -> None:
        """Count groups of units of which one is kept, where units share weights in groups."""
        if self.key not in self.counts.groups:
            return
        used = index.new_zeros(len(index), self.site.units // self.group)
        used.scatter_(1, (index // self.group).long(), 1)
        self.counts.add(self.counts.groups[self.key], used.sum(dim=1))


def _ways(site: Site, weight_bytes: float | None) -> tuple[Way, ...]:
    """The way of a batch of one row, of two, ..."""
    if weight_bytes is None:
        own: Way = "own"
        return (own,) * MOST_ROWS
    shared = site.weights_per_group * (site.units // site.group)
    size = (site.weights_per_unit * site.units + shared) * weight_bytes
    among = OF_HEADS if site.name == "attn.head" else WAYS
    choice = site.density, site.units, size, among
    return tuple(way(rows, *choice) for rows in range(1, MOST_ROWS + 1))
