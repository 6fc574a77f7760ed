"""Units that predictors choose, while the block in front of theirs is still being computed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dipnet.kernels.steps import UsedHeads
from dipnet.models.decoding.sites import Kept, SiteStep
from dipnet.models.decoding.skipped import HeadLists


@dataclass(frozen=True, eq=False)
class Choice:
    """The units that are kept, or the heads that are used."""

    kept: Kept | None = None
    used: UsedHeads | None = None


class Forecast:
    """Runs the predictors of ``sites`` on a stream beside the model's own, on a GPU.

    A predictor may begin when the place of the residual stream is there that it reads, and must be
    done when its block needs the units.
    """

    def __init__(
        self, sites: Iterable[SiteStep], rows: int, ring: int, device: torch.device
    ) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.readers: dict[int, list[SiteStep]] = defaultdict(list)
        self.heads: dict[SiteStep, HeadLists] = {}
        for step in sites:
            if step.site.place is not None:
                self.readers[step.site.place].append(step)
            if step.site.name == "attn.head" and step.way(rows) != "whole":
                self.heads[step] = HeadLists(step.site, rows, ring, device)
        self._made: dict[SiteStep, tuple[Choice, torch.cuda.Event | None, Tensor]] = {}

    def see(self, place: int, hidden: Tensor, turn: Tensor) -> None:
        """The residual stream at a place is (rows, width) ``hidden``: what reads it may begin.

        ``turn`` (1,) says which groups of heads have theirs.
        """
        if place not in self.readers:
            return
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with self._beside():
            for step in self.readers[place]:
                choice = self._choose(step, hidden, turn)
                done = None if self.stream is None else self.stream.record_event()
                self._made[step] = choice, done, hidden  # which must not be overwritten before

    def take(self, step: SiteStep) -> Choice:
        """What was chosen for a site."""
        choice, done, _ = self._made.pop(step)
        if done is not None:
            torch.cuda.current_stream().wait_event(done)
        return choice

    def _beside(self) -> AbstractContextManager[object]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _choose(self, step: SiteStep, hidden: Tensor, turn: Tensor) -> Choice:
        heads = self.heads.get(step)
        if heads is None:
            return Choice(kept=step.decide(hidden))
        return Choice(used=heads(step.lists(hidden), turn))
