"""The residual stream of the running forward call, at the places where predictors read it.

One definition for training, evaluation and decoding: a decoder layer's input is place 2l, what
enters the normalisation of its MLP is place 2l + 1 (`units.residual_place`). A model that
normalises after each block instead of before (OPT-350M) has no such stream; there the places are
what attention and the MLP read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dipnet.models.families import Decoder
from dipnet.models.tokens import TokenState
from dipnet.units import Site


class Residual:
    """Holds the residual stream at some places of a model from when it is seen to its last reader.

    ``places`` names a place once for each reader in a forward call. Calls whose tokens all stay
    dense are not watched.
    """

    def __init__(self, decoder: Decoder, places: Iterable[int], tokens: TokenState) -> None:
        self.decoder = decoder
        self.readers = Counter(places)
        self.tokens = tokens
        self._seen: dict[int, Tensor] = {}
        self._waiting: Counter[int] = Counter()

    @classmethod
    def of_sites(cls, decoder: Decoder, sites: Iterable[Site], tokens: TokenState) -> Residual:
        """The places that the scores of ``sites`` read."""
        places = (site.place for site in sites if site.scored_on == "residual")
        return cls(decoder, (place for place in places if place is not None), tokens)

    def watch(self) -> list[Callable[[], None]]:
        """Hook the modules that see the places; returns what undoes it."""
        undo = []
        for place in self.readers:
            module = self.decoder.residual_module(place)
            seeing = _Seeing(self, place)
            undo.append(module.register_forward_pre_hook(seeing, with_kwargs=True).remove)
        return undo

    def see(self, place: int, x: Tensor) -> None:
        """Keep what is seen at a place, without its gradient."""
        if not self.tokens.all_dense:
            self._seen[place] = x.detach()
            self._waiting[place] = self.readers[place]

    def at(self, place: int) -> Tensor:
        """(..., width) the residual stream of the running call at a place that was watched.

        Its last reader lets it go, so that an evaluation holds a few places and not all. Where
        gradients are wanted they are all kept until the next call: activation checkpointing runs
        the layers again, the last one first.
        """
        assert place in self._seen, "a place comes before the sites that read it"
        self._waiting[place] -= 1
        if self._waiting[place] > 0 or torch.is_grad_enabled() or self.decoder.model.training:
            return self._seen[place]
        return self._seen.pop(place)

    def known(self, site: Site) -> Tensor | None:
        """What the score of a site reads that is known before the site's block begins.

        (batch, tokens, n); None where it reads what the block itself computes.
        """
        match site.scored_on:
            case "residual":
                assert site.place is not None, "such a site has a place"
                return self.at(site.place)
            case "position":
                assert self.tokens.position is not None, "positions are counted where they are read"
                return self.tokens.position
        return None


class _Seeing:
    """The hook of one place: no closure, so that a copy of the model has its own."""

    def __init__(self, residual: Residual, place: int) -> None:
        self.residual = residual
        self.place = place

    def __call__(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Torch's forward pre-hook."""
        self.residual.see(self.place, args[0] if args else kwargs["hidden_states"])
