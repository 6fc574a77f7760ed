"""What decoding on a GPU keeps, counted there: nothing waits until the counts are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dipnet.methods.base import SiteKey
from dipnet.units import Site, kept_units


class StepCounts:
    """Tokens that were decoded, and units that they kept.

    A site with a fixed number of units needs no counting: it keeps them for every token.
    ``counted`` names the others. Each tensor keeps its address, so that graphs may hold it.
    ``alive`` (1,) is 0 while a token is computed that will not be used.
    """

    def __init__(
        self, sites: Sequence[Site], counted: Sequence[SiteKey], device: torch.device
    ) -> None:
        self.fixed = {
            (site.layer, site.name): kept_units(site.density, site.units)
            for site in sites
            if (site.layer, site.name) not in counted
        }
        self.tokens = _counter(device)
        self.alive = _counter(device).add_(1)
        self.units = {key: _counter(device) for key in counted}
        self.groups = {
            (site.layer, site.name): _counter(device) for site in sites if site.group > 1
        }

    def add(self, counter: Tensor, number: Tensor) -> None:
        """Count (1,) ``number`` of a token."""
        counter.addcmul_(number, self.alive)

    def reset(self) -> None:
        """Forget all counts."""
        for counter in (self.tokens, *self.units.values(), *self.groups.values()):
            counter.zero_()

    def kept(self, key: SiteKey) -> int:
        """Units of a site that were kept."""
        if key in self.units:
            return int(self.units[key])
        return int(self.tokens) * self.fixed[key]

    def kept_groups(self, key: SiteKey) -> int:
        """Groups of a site's units of which one was kept."""
        return int(self.groups[key]) if key in self.groups else 0


def _counter(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        made = torch.zeros(1, dtype=torch.int64, device=device)
    torch._dynamo.mark_static_address(made)
    return made
