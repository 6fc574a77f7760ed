"""WINA: weight-informed neuron activation (https://arxiv.org/abs/2505.19427, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from dipnet.errors import InputError
from dipnet.methods.base import SiteKey, Weights
from dipnet.methods.dip import DIP
from dipnet.units import ModelSpec, Site


@dataclass(frozen=True)
class WINA(DIP):
    """DIP's two masks with the score ``|x_i| * ||W[:, i]||``.

    The norm is over the columns of all matrices that share the input: a channel that its weights
    amplify is kept at a smaller magnitude. The norms are read for every token and are counted.
    """

    name: ClassVar[str] = "wina"
    norms: Mapping[SiteKey, Tensor] = field(
        default_factory=dict, kw_only=True, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scores is not None:
            raise InputError("wina has scores of its own: leave scores out, or take dip")

    def prepare(self, weights: Weights, spec: ModelSpec) -> Self:
        norms = {
            (site.layer, site.name): column_norms(
                weights, site.layer, *(operand.matrix for operand in site.operands)
            )
            for site in self.sites(spec)
        }
        return replace(self, norms=norms)

    def factor(self, site: Site, device: torch.device) -> Tensor | None:
        return self.norms[site.layer, site.name]

    def added_weights(self, spec: ModelSpec) -> int:
        return sum(site.channels for site in self.sites(spec))


def column_norms(weights: Weights, layer: int, *matrices: str) -> Tensor:
    """(channels,) L2 norms of the columns, over all of a layer's ``matrices``."""
    squares = [
        weights.matrix(layer, matrix).detach().float().square().sum(dim=0) for matrix in matrices
    ]
    return torch.stack(squares).sum(dim=0).sqrt()
