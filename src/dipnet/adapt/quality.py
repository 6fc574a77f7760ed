"""How good predictors are at the k that is deployed: recall, precision and what bounds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from dipnet.adapt.collect import Sample, Seen, decoded
from dipnet.kernels import topk_mask
from dipnet.methods.predictors import Kind, Predictors

MEASURED_AT_ONCE = 2048
"""Tokens whose scores are held at a time."""


@dataclass(frozen=True)
class Quality:
    """One layer's predictor, and the top-k of its scores, against what tokens wanted.

    ``wanted`` is the share of units that a token wants, ``density`` the share that is kept.
    ``recall`` is the share of wanted units that the top-k holds, ``bound`` the highest recall that
    any choice of so many could have; ``precision`` is the share of the top-k that was wanted.
    ``captured`` is the recall by worth: a unit counts as much as in the loss.
    """

    layer: int
    wanted: float
    density: float
    recall: float
    bound: float
    precision: float
    captured: float

    def as_json(self) -> dict[str, float]:
        """Its figures, rounded to what they mean."""
        return {name: round(value, 5) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Counts:
    """Of some tokens, for each layer, (layers,) float64: what the top-k was made of.

    ``wanted`` units, those of them that were ``found``, how many were ``kept`` in all, and what the
    first two were worth in the loss. ``most`` is the largest number that a top-k could have found.
    """

    wanted: Tensor
    found: Tensor
    kept: Tensor
    most: Tensor
    worth: Tensor
    found_worth: Tensor

    @classmethod
    def of(cls, scores: Tensor, codes: Tensor, k: int) -> Counts:
        """(layers, tokens, units) scores and bytes; the top-k is the one that is deployed."""
        worth = decoded(codes)
        wanted = codes != 0
        top = topk_mask(scores, k)
        number = wanted.sum(dim=-1)
        kept = torch.full((len(scores),), float(k * scores.shape[1]), device=scores.device)
        return cls(
            wanted=number.sum(dim=-1).double(),
            found=(wanted & top).sum(dim=(1, 2)).double(),
            kept=kept.double(),
            most=number.clamp_max(k).sum(dim=-1).double(),
            worth=worth.sum(dim=(1, 2), dtype=torch.float64),
            found_worth=(worth * top).sum(dim=(1, 2), dtype=torch.float64),
        )

    @classmethod
    def total(cls, counts: Sequence[Counts]) -> Counts:
        """The counts of all the tokens of ``counts`` together."""
        return cls(
            *(
                torch.stack(parts).sum(0)
                for parts in zip(*(each.parts for each in counts), strict=True)
            )
        )

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The counts, in order."""
        return (self.wanted, self.found, self.kept, self.most, self.worth, self.found_worth)

    @property
    def captured(self) -> Tensor:
        """(layers,) the share of what was wanted that the top-k held, by worth."""
        return self.found_worth / self.worth

    def qualities(self, kept: Sequence[int], units: int) -> list[Quality]:
        """The layers' figures, for top-k of ``kept`` units each."""
        shares = zip(
            kept,
            (self.wanted / self.kept).tolist(),
            (self.found / self.wanted).tolist(),
            (self.most / self.wanted).tolist(),
            (self.found / self.kept).tolist(),
            self.captured.tolist(),
            strict=True,
        )
        return [
            Quality(layer, wanted * k / units, k / units, recall, bound, precision, captured)
            for layer, (k, wanted, recall, bound, precision, captured) in enumerate(shares)
        ]


class Measured:
    """Adds up, over the tokens of a text, what predictors' top-k are made of.

    ``kept`` is the k of each layer by kind, and ``rows`` says for each kind where in `Seen.places`
    its layers read. What is measured is `Predictors.scores`: what is saved, as it is deployed.
    """

    def __init__(
        self,
        predictors: Predictors,
        kept: Mapping[Kind, Sequence[int]],
        rows: Mapping[Kind, Sequence[int]],
    ) -> None:
        self.predictors = predictors
        self.kept = kept
        self.rows = rows
        self._counts: dict[tuple[Kind, int], list[Counts]] = {}

    def add(self, seen: Seen | Sample) -> None:
        """Count some tokens: all of a `Seen`, or those that a sample holds."""
        tokens = seen.tokens
        for start in range(0, tokens, MEASURED_AT_ONCE):
            some = slice(start, min(start + MEASURED_AT_ONCE, tokens))
            for kind, kept in self.kept.items():
                for layer, (k, row) in enumerate(zip(kept, self.rows[kind], strict=True)):
                    scores = self.predictors.scores(kind, layer, seen.places[row, some])
                    found = Counts.of(scores[None], seen.codes[kind][layer, some][None], k)
                    self._counts.setdefault((kind, layer), []).append(found)

    def qualities(self) -> dict[Kind, list[Quality]]:
        """Each kind's figures, by layer."""
        found: dict[Kind, list[Quality]] = {}
        for kind, kept in self.kept.items():
            layers = [Counts.total(self._counts[kind, i]) for i in range(len(self.rows[kind]))]
            parts = zip(*(each.parts for each in layers), strict=True)
            whole = Counts(*(torch.cat(part) for part in parts))
            found[kind] = whole.qualities(kept, self.predictors.model.units(kind))
        return found
