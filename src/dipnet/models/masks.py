"""The masks of one site: scored, selected, counted. Evaluation and the engine run this."""

from __future__ import annotations

from torch import Tensor

from dipnet.methods.base import Method
from dipnet.models.caching import SiteCache
from dipnet.models.usage import Usage
from dipnet.units import Site


class SiteMasks:
    """Decides the masks of one site, with its cache where it has one."""

    def __init__(self, site: Site, method: Method, usage: Usage, cache: SiteCache | None) -> None:
        self.site = site
        self.method = method
        self.usage = usage
        self.cache = cache

    def decide(
        self, scored: Tensor, *, dense: Tensor | None, counted: Tensor | None, count: bool = True
    ) -> Tensor:
        """(..., channels) scored activations -> (..., units) bool.

        ``dense`` and ``counted`` are (...) bools, None for none and all: tokens that keep every
        unit, and tokens that are counted and use the cache. Without ``count`` no unit is counted,
        and nothing recorded.
        """
        scores = self.method.score(self.site, scored)
        if self.cache is None:
            mask = self.method.select(self.site, scores)
        else:
            mask, hits = self.cache.select(scores, counted)
            if count:
                self.usage.count_hits(self.site, hits)
        if count:
            self.usage.count_units(self.site, mask, counted)
            if self.usage.recorder is not None:
                self.usage.recorder.add(self.site, mask, scores, counted)
        return mask if dense is None else mask | dense.unsqueeze(-1)
