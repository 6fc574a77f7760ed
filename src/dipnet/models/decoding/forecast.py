"""Units that predictors choose, while the block in front of theirs is still being computed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dipnet.kernels import steps
from dipnet.kernels.steps import UsedHeads
from dipnet.models.decoding.sites import Kept, SiteStep

AHEAD, OWN, BEHIND = -2, -1, 0
"""Priorities of streams, of which the lowest number goes first: the model's ``OWN`` soon waits for
heads' predictors, which are small; those of neurons are large, and would hold it up meanwhile."""


@dataclass(frozen=True, eq=False)
class Choice:
    """The units that are kept, or the heads that are used."""

    kept: Kept | None = None
    used: UsedHeads | None = None


class Forecast:
    """Runs the predictors of ``sites`` on streams beside the model's own, on a GPU.

    A predictor may begin when the place of the residual stream is there that it reads, and must be
    done when its block needs the units.
    """

    def __init__(
        self, sites: Iterable[SiteStep], rows: int, ring: int, device: torch.device
    ) -> None:
        self.rows = rows
        self.ring = ring
        self.streams: dict[str, torch.cuda.Stream] = {}
        self.readers: dict[int, list[SiteStep]] = defaultdict(list)
        for step in sites:
            name, place = step.site.name, step.site.place
            if place is None:
                continue
            self.readers[place].append(step)
            if device.type == "cuda" and name not in self.streams:
                priority = AHEAD if name == "attn.head" else BEHIND
                self.streams[name] = torch.cuda.Stream(device, priority)
        self._made: dict[SiteStep, tuple[Choice, torch.cuda.Event | None, Tensor]] = {}

    def see(self, place: int, hidden: Tensor, turn: Tensor) -> None:
        """The residual stream at a place is (rows, width) ``hidden``: what reads it may begin.

        ``turn`` (1,) says which groups of heads have theirs.
        """
        for step in self.readers.get(place, ()):
            stream = self.streams.get(step.site.name)
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream())
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                choice = self._choose(step, hidden, turn)
            done = None if stream is None else stream.record_event()
            self._made[step] = choice, done, hidden  # which must not be overwritten before

    def take(self, step: SiteStep) -> Choice:
        """What was chosen for a site."""
        choice, done, _ = self._made.pop(step)
        if done is not None:
            torch.cuda.current_stream().wait_event(done)
        return choice

    def _choose(self, step: SiteStep, hidden: Tensor, turn: Tensor) -> Choice:
        site = step.site
        if site.name != "attn.head" or step.way(self.rows) == "whole":
            return Choice(kept=step.decide(hidden))
        kept = step.lists(hidden)
        assert kept.index is not None
        assert kept.count is None, "heads are kept in a fixed number"
        groups = site.units // site.group
        return Choice(used=steps.list_heads(kept.index, turn, site.units, groups, self.ring))
