"""Train the predictors of several layers at once: their matrices are stacked.

A step is a few batched products whatever the number of layers, and nothing in it waits for the
device: on a GPU the layers of a model train together, on a CPU one after another in its caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dipnet.adapt.collect import Sample, decoded
from dipnet.adapt.fit_settings import FitSettings
from dipnet.adapt.quality import MEASURED_AT_ONCE, Counts
from dipnet.methods.predictors import Kind, Predictor

STATISTICS = 4096
"""Tokens from which the mean and spread of each channel are taken."""


class Bank:
    """The predictors of one kind for some neighbouring layers, in training.

    ``read`` names for each layer the row of a sample's places that it reads. Inputs are
    standardised, each channel by the mean and spread that it has in ``sample``; `predictors` folds
    that into the first matrix, so that what is deployed reads the residual stream as it is.
    ``stale`` counts the measurements since any layer was better than before.
    """

    def __init__(
        self,
        kind: Kind,
        layers: range,
        read: Sequence[int],
        sample: Sample,
        rank: int,
        settings: FitSettings,
        generator: torch.Generator,
    ) -> None:
        self.kind = kind
        self.layers = layers
        self.activation = settings.activation
        self.stale = 0
        self.read = torch.tensor(read, device=sample.places.device)
        self._standardise(sample)
        self._initialise(sample, rank, generator)
        self._adamw = torch.optim.AdamW(self.parameters, weight_decay=settings.decay, fused=True)
        self.best = [parameter.detach().clone() for parameter in self.parameters]
        self.best_captured = torch.full((len(layers),), -1.0, device=self.read.device).double()

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained, stacked by layer."""
        return [self.w1, self.b1, self.w2, self.b2]

    def _standardise(self, sample: Sample) -> None:
        seen = sample.places[self.read, : min(sample.tokens, STATISTICS)].float()
        self.mean = seen.mean(dim=1, keepdim=True)
        spread = seen.std(dim=1, keepdim=True)
        # A channel that hardly moves is noise to the others, not something to blow up.
        self.scale = 1 / (spread + 1e-3 * spread.mean(dim=-1, keepdim=True) + 1e-12)

    def _initialise(self, sample: Sample, rank: int, generator: torch.Generator) -> None:
        codes = sample.codes[self.kind][self.layers.start : self.layers.stop]
        count, _, units = codes.shape
        width, device = sample.places.shape[-1], codes.device

        def normal(*shape: int) -> Tensor:
            made = torch.randn(count, *shape, generator=generator) / shape[-1] ** 0.5
            return made.to(device).requires_grad_()

        some = codes[:, : min(sample.tokens, STATISTICS)]
        shares = (some != 0).sum(dim=1, keepdim=True) / some.shape[1]
        self.w1, self.w2 = normal(rank, width), normal(units, rank)
        self.b1 = torch.zeros(count, 1, rank, device=device, requires_grad=True)
        self.b2 = shares.logit(eps=1e-4).requires_grad_()

    def scores(self, places: Tensor) -> Tensor:
        """(layers, tokens, width) residual streams -> (layers, tokens, units) logits."""
        x = (places.float() - self.mean) * self.scale
        inner = torch.baddbmm(self.b1, x, self.w1.transpose(1, 2))
        if self.activation == "relu":
            inner = inner.relu()
        return torch.baddbmm(self.b2, inner, self.w2.transpose(1, 2))

    def step(self, sample: Sample, tokens: Tensor, rate: float) -> None:
        """One step on (batch,) ``tokens`` of a sample, at a learning rate.

        The loss is binary cross-entropy, in which what was wanted counts as much as it was worth;
        its gradient is written out, since the loss itself is not needed.
        """
        for group in self._adamw.param_groups:
            group["lr"] = rate
        scores = self.scores(sample.places[self.read[:, None], tokens])
        codes = sample.codes[self.kind][self.layers.start : self.layers.stop]
        worth = decoded(codes.index_select(1, tokens))
        gradient = scores.detach().sigmoid()
        gradient.mul_(worth + (worth == 0)).sub_(worth)  # AdamW does not see its size
        self._adamw.zero_grad(set_to_none=True)
        scores.backward(gradient)
        self._adamw.step()

    @torch.no_grad()
    def measure(self, sample: Sample, k: int) -> list[float]:
        """The layers' mean losses on a sample; each layer's weights are kept if they are its best.

        The best top-k captures most of what was wanted, by worth.
        """
        counts, losses = [], []
        for places, codes in self._parts(sample):
            scores = self.scores(places)
            counts.append(Counts.of(scores, codes, k))
            losses.append(_loss(scores, decoded(codes)))
        better = self._keep_better(Counts.total(counts).captured)
        self.stale = 0 if better else self.stale + 1
        found: list[float] = (torch.stack(losses).sum(0) / sample.tokens).tolist()
        return found

    def _keep_better(self, captured: Tensor) -> bool:
        """Remember the weights of the layers whose (layers,) ``captured`` is their best so far."""
        better = captured > self.best_captured
        self.best_captured = torch.where(better, captured, self.best_captured)
        for best, parameter in zip(self.best, self.parameters, strict=True):
            best.copy_(torch.where(better[:, None, None], parameter.detach(), best))
        return bool(better.any())

    def _parts(self, sample: Sample) -> Iterator[tuple[Tensor, Tensor]]:
        """A sample's residual streams and bytes for these layers, some tokens at a time."""
        for start in range(0, sample.tokens, MEASURED_AT_ONCE):
            some = slice(start, min(start + MEASURED_AT_ONCE, sample.tokens))
            codes = sample.codes[self.kind][self.layers.start : self.layers.stop, some]
            yield sample.places[self.read, some], codes

    def predictors(self) -> list[Predictor]:
        """The best of each layer, which read the residual stream as it is; in float32."""
        w1, b1, w2, b2 = (best.double() for best in self.best)
        scaled = w1 * self.scale.double()
        shifted = b1 - self.mean.double() @ scaled.transpose(1, 2)
        return [
            Predictor(*(part.float().cpu() for part in parts))
            for parts in zip(scaled, shifted.squeeze(1), w2, b2.squeeze(1), strict=True)
        ]


def _loss(scores: Tensor, worth: Tensor) -> Tensor:
    """(layers, tokens, units) -> (layers,) the loss summed over tokens, mean over units."""
    softplus = torch.nn.functional.softplus
    loss = torch.where(worth != 0, worth * softplus(-scores), softplus(scores))
    return loss.mean(dim=-1).sum(dim=-1)
