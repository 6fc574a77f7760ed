"""DIP: Dynamic Input Pruning (https://arxiv.org/abs/2412.01380).

Two per-token top-k masks in each MLP and no predictor: the largest ``|x|`` decide which columns of
``gate`` and ``up`` are read, then the largest magnitudes of the intermediate activation *computed
from the pruned input* decide which columns of ``down`` are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from dipnet.errors import InputError
from dipnet.kernels import cache_aware_topk
from dipnet.methods.allocation import Allocation
from dipnet.methods.base import SiteKey, TopK
from dipnet.methods.factors import Factors
from dipnet.units import ModelSpec, Site, check_density, kept_units

# What is used when nothing was fitted on one's own model: on the demo models, the best split at
# density 0.5 on validation text (docs/results.md, "How DIP's split was fitted").
RELU_SPLIT = 2.0
SMOOTH_SPLIT = 1.4


@dataclass(frozen=True)
class DIP(TopK):
    """Prunes the MLP's input channels, then its neurons.

    ``density`` is the share of the MLP's weights that is read. How it is divided between the two
    masks is a curve with one parameter: ``hidden_density = density ** split``, and the input
    density is what remains of the budget; ``split`` 1 prunes both alike, a larger one spends more
    on the input. ``dipnet.fit_split`` finds it for a model. Instead of ``density``, both
    ``input_density`` and ``hidden_density`` can be given. ``attention_density`` prunes the inputs
    of the attention projections by the same rule; without it, attention stays dense.

    ``allocation`` is the file of `dipnet fit allocation`, or what `Allocation.load` read: each
    site of each layer then has a density of its own, and ``density`` is the share of the weights of
    all its sites, attention's among them if it has any. A store may bring an allocation for
    methods that do not say how their density is divided: "none" is without it. ``scores`` is the
    file of `dipnet fit scores`, or what `Factors.load` read: what magnitudes are multiplied with
    before they are compared. They are read for every token and are counted.

    ``cache_aware`` is the paper's γ in (0, 1] (DIP-CA): where a cache says which units are in
    memory, the scores of the others are multiplied with it before the top-k, so a lower value
    prefers what need not be loaded; 1 and None are plain DIP. ``hidden_block`` lets the second
    mask keep or drop so many neighbouring neurons as one unit, by the L2 norm of their
    activations; it must divide the number of neurons.
    """

    name: ClassVar[str] = "dip"
    density: float | None = None
    input_density: float | None = field(default=None, kw_only=True)
    hidden_density: float | None = field(default=None, kw_only=True)
    split: float | None = field(default=None, kw_only=True)
    attention_density: float | None = field(default=None, kw_only=True)
    cache_aware: float | None = field(default=None, kw_only=True)
    hidden_block: int | None = field(default=None, kw_only=True)
    allocation: str | Path | Allocation | None = field(default=None, kw_only=True)
    scores: str | Path | Factors | None = field(default=None, kw_only=True)
    allocated: Allocation | None = field(default=None, init=False, repr=False, compare=False)
    factors: Factors | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("density", "input_density", "hidden_density", "attention_density"):
            if getattr(self, name) is not None:
                check_density(getattr(self, name), name)
        both = (self.input_density, self.hidden_density)
        if (self.density is None) == (None in both) or (both.count(None) == 1):
            raise InputError(
                f"{self.name} takes either density, or input_density and hidden_density together"
            )
        if self.split is not None:
            self._check_split(self.split)
        if self.cache_aware is not None:
            self._check_cache_aware(self.cache_aware)
        block = self.hidden_block
        if block is not None and (type(block) is not int or block < 1):
            raise InputError(f"hidden_block must be a whole number from 1 up, got {block!r}")
        self._read_files()

    def _read_files(self) -> None:
        """Put what ``allocation`` and ``scores`` stand for in place, and check it."""
        for option in ("allocation", "scores"):
            if isinstance(given := getattr(self, option), Path):
                object.__setattr__(self, option, str(given))  # told where settings are told
        allocation, scores = Allocation.given(self.allocation), self.scores
        if isinstance(scores, str):
            scores = Factors.load(scores)
        if not isinstance(scores, Factors | None):
            raise InputError(f"scores is a file of dipnet fit scores, not {scores!r}")
        object.__setattr__(self, "allocated", allocation)
        object.__setattr__(self, "factors", scores)
        if allocation is not None:
            self._check_allocation(allocation)

    def _check_allocation(self, allocation: Allocation) -> None:
        if self.density is None or self.split is not None:
            raise InputError(
                "an allocation divides one density: give density with it, and no split, "
                "input_density or hidden_density"
            )
        if allocation.has_attention and self.attention_density is not None:
            raise InputError(
                "this allocation divides attention's density too: leave out attention_density"
            )

    def _check_cache_aware(self, gamma: float) -> None:
        number = isinstance(gamma, int | float) and not isinstance(gamma, bool)
        if not number or not 0 < gamma <= 1:
            raise InputError(
                f"cache_aware must be in (0, 1], got {gamma!r}: 0.2 prefers what is in memory, 1 "
                f"is plain {self.name}"
            )

    def _check_split(self, split: float) -> None:
        number = isinstance(split, int | float) and not isinstance(split, bool)
        if not number or not 0 < split < math.inf:
            raise InputError(f"split must be a number above 0, got {split!r}")
        if self.density is None:
            raise InputError("split goes with density, not with input_density and hidden_density")

    @property
    def has_own_division(self) -> bool:
        """Whether it says how its density is divided: by both masks' densities, by a split, by an
        allocation or by none.
        """
        return self.density is None or self.split is not None or self.allocation is not None

    def densities(self, spec: ModelSpec) -> tuple[float, float]:
        """The input mask's and the hidden mask's density on a model of shape ``spec``: the same in
        all layers, without an allocation.
        """
        if self.density is None:
            assert self.input_density is not None
            assert self.hidden_density is not None
            return self.input_density, self.hidden_density
        split = self.split or (RELU_SPLIT if spec.activation == "relu" else SMOOTH_SPLIT)
        return split_density(self.density, split, len(spec.input_matrices))

    def sites(self, spec: ModelSpec) -> tuple[Site, ...]:
        return tuple(self._sites(spec))

    def _sites(self, spec: ModelSpec) -> Iterator[Site]:
        densities = self._site_densities(spec)
        for layer in range(spec.layers):
            if (layer, "attn.in") in densities:
                yield spec.input_site(layer, "attn.in", densities[layer, "attn.in"], "q", "k", "v")
                yield spec.input_site(layer, "attn.out", densities[layer, "attn.out"], "o")
            yield spec.input_site(layer, "mlp.in", densities[layer, "mlp.in"], *spec.input_matrices)
            block = self.hidden_block or 1
            yield spec.neuron_site(layer, densities[layer, "mlp.hidden"], "hidden", block=block)

    def _site_densities(self, spec: ModelSpec) -> dict[SiteKey, float]:
        """The share of its units that each site keeps."""
        named: dict[str, float] = {}
        if self.attention_density is not None:
            named = {"attn.in": self.attention_density, "attn.out": self.attention_density}
        if self.allocated is None:
            named["mlp.in"], named["mlp.hidden"] = self.densities(spec)
        found = {(layer, name): named[name] for layer in range(spec.layers) for name in named}
        if self.allocated is not None:
            assert self.density is not None
            self.allocated.check_model(spec)
            found |= self.allocated.densities(self.density)
        return found

    def factor(self, site: Site, device: torch.device) -> Tensor | None:
        return None if self.factors is None else self.factors.near(site.layer, site.name, device)

    def check_model(self, spec: ModelSpec) -> None:
        if self.factors is not None:
            self.factors.check_model(spec)
        super().check_model(spec)

    def added_weights(self, spec: ModelSpec) -> int:
        if self.factors is None:
            return 0
        keys = ((site.layer, site.name) for site in self.sites(spec))
        return sum(self.factors.values[key].numel() for key in keys if key in self.factors.values)

    def select(self, site: Site, scores: Tensor, resident: Tensor | None = None) -> Tensor:
        if resident is None or self.cache_aware is None:
            return super().select(site, scores)
        k = kept_units(site.density, site.units)
        return cache_aware_topk(scores, k, resident, self.cache_aware)


def split_density(density: float, split: float, input_matrices: int) -> tuple[float, float]:
    """Divide the MLP's density between the input mask and the hidden mask.

    The matrices are of equal size, so ``(input_matrices * input + hidden) / (input_matrices + 1)``
    is the density. Where the curve would ask for more than every input channel, the rest of the
    budget goes back to the neurons. Raises InputError when nothing would be left for the input.
    """
    budget = density * (input_matrices + 1)
    hidden = density**split
    inputs = (budget - hidden) / input_matrices
    if inputs > 1:
        inputs, hidden = 1.0, budget - input_matrices
    if inputs <= 0:
        raise InputError(
            f"split {split:g} leaves nothing for the input mask at density {density:g}; raise it"
        )
    return inputs, hidden
