"""What one more unit would be worth: gradients of the divergence from the dense model, by site.

Masks are what they are, and multiplied with activations: the gradient at a mask's place for unit
i is what the divergence would gain or lose if i came or went, to first order. Near the boundary,
where units are about to be kept or dropped, that says two things: in the mean over them, what a
site's density is worth; and channel by channel, whether its score should be higher or lower.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dipnet.adapt.distillation import LossWeights, token_loss
from dipnet.methods.base import Method, SiteKey
from dipnet.models.attach import Attachment
from dipnet.models.families import Decoder
from dipnet.units import ModelSpec, Site, kept_units

BAND = 0.05
"""Of a site's units, on either side of the boundary, those that count as near it."""


@dataclass(frozen=True)
class Marginals:
    """``divergence`` is KL(dense || sparse) in nats a token.

    By site: ``density`` is its derivative by the site's density (negative where more helps), and
    ``scores`` (channels,) by the logarithms of channels' factors, at the same densities.
    """

    divergence: float
    density: Mapping[SiteKey, float]
    scores: Mapping[SiteKey, Tensor]


def marginals(model: PreTrainedModel, method: Method, tokens: Tensor) -> Marginals:
    """The derivatives over a (batch, tokens) piece of text; costs a pass there and one back.

    Activations of one pass are held. The model is as it was afterwards.
    """
    dense = dense_logits(model, tokens)
    with _probed(model, method) as probe:
        loss = divergence(model(input_ids=tokens, use_cache=False).logits, dense, tokens)
        keys = list(probe.densities)
        wanted = [probe.densities[key] for key in keys] + [probe.factors[key] for key in keys]
        found = torch.autograd.grad(loss, wanted)
    by_site = dict(zip(keys, found[: len(keys)], strict=True))
    by_channel = dict(zip(keys, found[len(keys) :], strict=True))
    return Marginals(float(loss.detach()), {key: float(by_site[key]) for key in keys}, by_channel)


def dense_logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """(batch, tokens) -> (batch, tokens, vocabulary) of the model as it is, without gradients."""
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def divergence(logits: Tensor, dense: Tensor, tokens: Tensor) -> Tensor:
    """KL(dense || sparse) in nats, the mean over the tokens that a window foretells: ()."""
    return token_loss(logits, dense, tokens, LossWeights(kl=1.0, cross_entropy=0.0, hidden=0.0))


@contextmanager
def _probed(model: PreTrainedModel, method: Method) -> Iterator[_Probe]:
    """The model under the method's masks, with weights that take no gradient."""
    decoder = Decoder(model)
    ready = method.prepare(decoder, decoder.spec)
    probe = _Probe.of(ready, decoder.spec, model.device, model.dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    attachment = Attachment(decoder, probe)
    attachment.attach()
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield probe
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        attachment.detach()


@dataclass(frozen=True, eq=False)
class _Probe(Method):
    """A top-k method whose masks are numbers that pass gradients on to its densities and factors.

    ``densities`` () and ``factors`` (channels,) are the leaves that take them.
    """

    method: Method
    densities: dict[SiteKey, Tensor]
    factors: dict[SiteKey, Tensor]
    dtype: torch.dtype

    @classmethod
    def of(
        cls, method: Method, spec: ModelSpec, device: torch.device, dtype: torch.dtype
    ) -> _Probe:
        def leaves(*shapes: tuple[SiteKey, tuple[int, ...]]) -> dict[SiteKey, Tensor]:
            return {
                key: torch.zeros(shape, device=device, requires_grad=True) for key, shape in shapes
            }

        sites = method.sites(spec)
        return cls(
            method,
            leaves(*(((site.layer, site.name), ()) for site in sites)),
            leaves(*(((site.layer, site.name), (site.units,)) for site in sites)),
            dtype,
        )

    def sites(self, spec: ModelSpec) -> tuple[Site, ...]:
        return self.method.sites(spec)

    def score(self, site: Site, x: Tensor) -> Tensor:
        return self.method.score(site, x)

    def select(self, site: Site, scores: Tensor, resident: Tensor | None = None) -> Tensor:
        key = site.layer, site.name
        mask = self.method.select(site, scores).to(self.dtype)
        k = kept_units(site.density, site.units)
        made: Tensor = _Boundary.apply(mask, scores, self.densities[key], self.factors[key], k)
        return made


class _Boundary(torch.autograd.Function):
    """The mask itself; backwards, what happens at its boundary."""

    @staticmethod
    def forward(
        context: Any, mask: Tensor, scores: Tensor, _density: Tensor, _factor: Tensor, k: int
    ) -> Tensor:
        """(..., units) mask of the ``k`` highest (..., units) scores -> the mask."""
        context.k = k
        context.save_for_backward(scores)
        return mask.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        """The gradient at the mask -> those by the site's density and the channels' factors.

        A unit's gradient counts when its rank is within the band around k. Raising all scores of a
        site changes no mask: the mean over the band is taken off. How much a score must change to
        pass the boundary is the band's width in logarithms.
        """
        (scores,), k = context.saved_tensors, context.k
        at_mask = gradients[0].float()
        units = scores.shape[-1]
        reach = max(1, round(BAND * units))
        low, high = max(1, k - reach), min(units, k + reach)
        ranked = scores.topk(high, dim=-1).values
        top, bottom = ranked[..., low - 1, None], ranked[..., high - 1, None]
        near = (scores <= top) & (scores >= bottom) & (k < units)
        count = near.sum(dim=-1, keepdim=True).clamp_min(1)
        mean = (at_mask * near).sum(dim=-1, keepdim=True) / count
        width = (top.log() - bottom.clamp_min(torch.finfo(torch.float32).tiny).log()).clamp_min(
            1e-3
        )
        by_factor = ((at_mask - mean) * near / width).flatten(0, -2).sum(dim=0)
        return None, None, mean.sum() * units, by_factor, None
