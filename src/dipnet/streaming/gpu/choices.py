"""Which units of a site a token wants, decided on the device by the method's own rule."""

from __future__ import annotations

from torch import Tensor

from dipnet.kernels import gpu
from dipnet.methods.base import Method
from dipnet.models.decoding.sites import keeps_fixed_number, magnitudes
from dipnet.units import Site, kept_units


class SiteChoice:
    """What ``Method.select`` keeps of a token, in a launch where that is a top-k."""

    def __init__(self, site: Site, method: Method) -> None:
        self.site = site
        self.method = method
        self.fixed = kept_units(site.density, site.units) if keeps_fixed_number(method) else None
        self._plain = magnitudes(method, site)

    @property
    def gamma(self) -> float:
        """What the scores of units that are not in memory are multiplied with."""
        aware: float | None = getattr(self.method, "cache_aware", None)
        return 1.0 if aware is None else aware

    @property
    def most(self) -> int:
        """How many units a token may want."""
        return self.site.units if self.fixed is None else self.fixed

    def wanted(self, scored: Tensor, residency: Tensor | None) -> Tensor:
        """(1, n) activation -> (units,) bool.

        ``residency`` (units,) float32 is 1 for units in memory and gamma for others; None where all
        of them are there.
        """
        factor = residency if self.gamma != 1 else None
        if self.fixed is None:
            return self.method.select(self.site, self.method.score(self.site, scored))[0]
        plain = self._plain and self.method.factor(self.site, scored.device) is None
        scores = scored if plain else self.method.score(self.site, scored)
        return gpu.topk_mask(scores, self.fixed, magnitude=plain, factor=factor)[0]
