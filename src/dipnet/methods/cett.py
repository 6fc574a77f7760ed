"""CETT's neuron output magnitude (https://arxiv.org/abs/2402.03804, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from dipnet.methods.base import SiteKey, Weights
from dipnet.methods.glu import GLUOracle
from dipnet.methods.wina import column_norms
from dipnet.units import ModelSpec, Site


@dataclass(frozen=True)
class CETT(GLUOracle):
    """Top-k of ``|h_i| * ||down[:, i]||``, known for free: a bound, not a method.

    The norm of what a neuron adds to the MLP's output, where `GLUOracle` looks at its activation
    alone. The paper cuts where the tail of all that is left out reaches a share of the output; here
    every token keeps the same k, as for every other method. Known for free, it reads nothing.
    """

    name: ClassVar[str] = "cett"
    norms: Mapping[SiteKey, Tensor] = field(
        default_factory=dict, kw_only=True, repr=False, compare=False
    )

    def prepare(self, weights: Weights, spec: ModelSpec) -> Self:
        norms = {
            (site.layer, site.name): column_norms(weights, site.layer, "down")
            for site in self.sites(spec)
        }
        return replace(self, norms=norms)

    def factor(self, site: Site, device: torch.device) -> Tensor | None:
        return self.norms[site.layer, site.name]
