"""Guesses of the next site's mask, made without a predictor while the disk is read.

A guess only reads records ahead into frames. Masks, caches and results are the same without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dipnet.streaming.worth import Worth

if TYPE_CHECKING:
    from dipnet.streaming.linear import RecordGroup, Seconds


class LookAhead:
    """Reads ahead for ``group``: what its mask would be for an early guess of its input.

    A group without masks is used whole: then everything is wanted, for certain. ``early`` makes
    the guess, (1, channels), from what is known while another group's records arrive; None when
    there is nothing to make it from. ``worth`` says whether to guess at all.
    """

    def __init__(
        self,
        group: RecordGroup,
        early: Callable[[], Tensor] | None,
        seconds: Seconds,
        worth: Worth,
    ) -> None:
        self.group = group
        self.early = early
        self.seconds = seconds
        self.worth = worth
        self._all = torch.ones(group.group.units, dtype=torch.bool)
        self._scores = torch.ones(group.group.units)

    def with_input(self, make: Callable[[], Tensor]) -> None:
        """Read ahead for what ``make`` gives, a (1, channels) guess of the group's input."""
        if self.group.masks is None:
            self._certain()
            return
        if not self.worth.ask():
            return
        begun = time.perf_counter()
        mask, scores = self.group.masks.guess(make())
        self.seconds.guessing += time.perf_counter() - begun
        self.group.engine.prefetch(self.group.key, mask, scores)

    def during(self) -> None:
        """Read ahead while another group's records arrive."""
        if self.group.masks is None:
            self._certain()
        elif self.early is not None:
            self.with_input(self.early)

    def _certain(self) -> None:
        self.group.engine.prefetch(self.group.key, self._all, self._scores, certain=True)
