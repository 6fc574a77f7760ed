"""A histogram of scores that costs the same memory however long the text is."""

from __future__ import annotations

import torch
from torch import Tensor

# A non-negative float32's upper bits: sign (always 0), 8 of exponent, 8 of mantissa. Neighbouring
# bins are 0.4 % apart in value at every magnitude, and the edges are floats themselves.
SHIFT = 15
BINS = 1 << (31 - SHIFT)


class ScoreHistogram:
    """Counts of non-negative scores in bins of equal relative width, on the scores' device."""

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    def add(self, scores: Tensor) -> None:
        """Count (...) non-negative scores."""
        bins = scores.detach().float().contiguous().view(torch.int32).flatten() >> SHIFT
        self.counts = self.counts.to(bins.device) + torch.bincount(bins, minlength=BINS)

    def threshold(self, density: float) -> float:
        """The score that a share ``density`` of all scores exceeds, linear within its bin.

        -1, which every score exceeds, for density 1; 0 where more scores than that are zero.
        """
        if density >= 1:
            return -1.0
        above = self.counts.flip(0).cumsum(0)
        wanted = density * int(above[-1])
        position = int(torch.searchsorted(above, wanted))
        bin_above = BINS - 1 - position
        inside = int(self.counts[bin_above])
        past = wanted - (int(above[position]) - inside)
        low, high = _edge(bin_above), _edge(bin_above + 1)
        return 0.0 if bin_above == 0 else high - (high - low) * past / inside

    def share(self, threshold: float) -> float:
        """The share of all scores that exceeds ``threshold``, linear within its bin."""
        value = max(0.0, threshold)
        number = int(torch.tensor(value, dtype=torch.float32).view(torch.int32)) >> SHIFT
        low, high = _edge(number), _edge(number + 1)
        inside = int(self.counts[number]) * (high - value) / (high - low)
        above = int(self.counts[number + 1 :].sum()) + inside
        return above / int(self.counts.sum())


def _edge(number: int) -> float:
    """The smallest float of a bin."""
    return float(torch.tensor(number << SHIFT, dtype=torch.int32).view(torch.float32))
