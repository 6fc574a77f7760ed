"""What decoding on a GPU keeps, counted there: nothing waits until the counts are read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dipnet.methods.base import SiteKey
from dipnet.models.decoding.sharing import MOST_ROWS
from dipnet.units import Site, kept_units


class StepCounts:
    """Tokens that were decoded, and units that they kept, by the row of the batch.

    A site with a fixed number of units needs no counting: it keeps them for every token.
    ``counted`` names the others. Each tensor keeps its address, so that graphs may hold it.
    ``alive`` is 0 for the rows whose token is padding, and for all while a token is computed that
    will not be used.
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

    def begin(self, rows: int, counted: Tensor | None = None) -> None:
        """A token for each of ``rows`` sequences; those in (rows,) bool ``counted``, None for all,
        are counted."""
        if counted is None:
            self.alive[:rows].fill_(1)
        else:
            self.alive[:rows].copy_(counted)
        self.count_tokens(rows)

    def count_tokens(self, rows: int) -> None:
        """Count a token for each of the first rows that are alive."""
        self.tokens[:rows].add_(self.alive[:rows])

    def add(self, counter: Tensor, number: Tensor) -> None:
        """Count (rows,) ``number`` of their tokens."""
        rows = len(number)
        counter[:rows].addcmul_(number, self.alive[:rows])

    def reset(self) -> None:
        """Forget all counts."""
        for counter in (self.tokens, *self.units.values(), *self.groups.values()):
            counter.zero_()

    def decoded(self) -> int:
        """Tokens that were decoded."""
        return int(self.tokens.sum())

    def kept(self, key: SiteKey) -> int:
        """Units of a site that were kept."""
        if key in self.units:
            return int(self.units[key].sum())
        return self.decoded() * self.fixed[key]

    def kept_groups(self, key: SiteKey) -> int:
        """Groups of a site's units of which one was kept."""
        return int(self.groups[key].sum()) if key in self.groups else 0


def _counter(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        made = torch.zeros(MOST_ROWS, dtype=torch.int64, device=device)
    torch._dynamo.mark_static_address(made)
    return made
