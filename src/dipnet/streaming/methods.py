"""Which methods run on which records, and how much they want of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import Tensor

from dipnet.errors import InputError
from dipnet.methods.base import Method
from dipnet.methods.dip import DIP
from dipnet.methods.dip_threshold import DIPThreshold
from dipnet.methods.heads import NeuronsAndHeads
from dipnet.store.check import check_allocation
from dipnet.store.geometry import Unit
from dipnet.store.index import ALLOCATION_NAME, Group, Index
from dipnet.streaming.engine import Key
from dipnet.streaming.plan import Identity
from dipnet.units import ModelSpec, Site

EARLY = ("residual", "position")
"""What is known of a token before its MLP: scores that choose whole neurons read one of these."""
ON_HEADS = "attn.head"
"""Masks over heads run on any store: attention's records are in memory."""


def unit_for(method: Method | None) -> Unit:
    """The unit of the records that a method runs on."""
    whole = isinstance(method, NeuronsAndHeads) and method.mlp_density is not None
    return "neuron" if whole else "column"


def densities(method: Method, index: Index, spec: ModelSpec) -> dict[Key, float]:
    """The share of each group's records that a token wants."""
    found: dict[Key, float] = {group.key: 1.0 for group in index.groups}
    sites = (site for site in method.sites(spec) if site.name != ON_HEADS)
    return found | {(site.layer, site.name): site.density for site in sites}


def takes_allocation(method: Method, model: Index | Identity) -> bool:
    """Whether the store's own allocation divides the method's density: nothing else does."""
    held = model.allocation_sha256 is not None
    return held and isinstance(method, DIP) and not method.has_own_division


def fitted_method(method: Method, folder: Path, index: Index, spec: ModelSpec) -> Method:
    """The method as it runs on the store in ``folder``: with its blocks and its allocation, and
    checked against its records.
    """
    if not isinstance(method, Method):
        raise InputError(f"method is a method such as dipnet.DIP(density=0.5), not {method!r}")
    if isinstance(method, DIP):
        method = _divided(_in_blocks(method, index), folder, index)
    method.check(spec)
    _check_order(method, index)
    for site in method.sites(spec):
        if site.name != ON_HEADS:
            _check_site(method, site, index)
    if any(method.weight_mask(0, matrix) is not None for matrix in spec.matrices):
        raise InputError(f"{method.name} changes the weights: apply it before packing")
    return method.prepare(_NoWeights(method.name), spec)


def _in_blocks(method: DIP, index: Index) -> DIP:
    """The method deciding about as many neurons as a record holds, where it does not say."""
    block = index.neurons.block
    if method.hidden_block is None and block > 1:
        return dataclasses.replace(method, hidden_block=block)
    return method


def _divided(method: DIP, folder: Path, index: Index) -> DIP:
    """The method with the store's own allocation, where it takes that."""
    if not takes_allocation(method, index):
        return method
    check_allocation(folder, index)
    try:
        return dataclasses.replace(method, allocation=folder / ALLOCATION_NAME)
    except InputError as error:
        raise InputError(f"{error}, or do without the store's with allocation=none") from None


def _check_order(method: Method, index: Index) -> None:
    """Raise InputError for what was fitted on neurons that a store holds in another order."""
    plain = method.plain if isinstance(method, DIPThreshold) else method
    if not isinstance(plain, DIP) or not index.neurons_permuted:
        return
    if plain.factors is not None:
        raise InputError(
            "these scores are of the checkpoint's neurons, and the store holds them in another "
            "order: pack the model without --calibration, or leave scores out"
        )
    if plain is not method and plain.hidden_block not in (None, 1):
        raise InputError(
            "these thresholds are of blocks of the checkpoint's neurons, and the store holds them "
            "in another order: pack the model without --calibration, or with --block 1"
        )


def _check_site(method: Method, site: Site, index: Index) -> None:
    """Raise InputError when a method's masks are not of a store's records."""
    matrices = tuple(operand.matrix for operand in site.operands)
    held: dict[str, Group] = {group.name: group for group in index.first_layer}
    group = held.get(site.name)
    if site.name == "mlp.neuron" and site.scored_on in EARLY and group is None:
        raise InputError(
            f"{method.name} chooses whole neurons, and this store holds columns of input channels: "
            "pack the model with --unit neuron"
        )
    by_columns = site.name == "mlp.in" or matrices == ("down",)
    if by_columns and group is None:
        raise InputError(
            f"{method.name} chooses columns of input channels, and this store holds whole neurons: "
            "pack the model with --unit column; methods that can: dense, dejavu, random"
        )
    if group is None or tuple(group.matrices) != matrices or _late(site):
        raise InputError(
            f"{method.name} cannot run from a store: its masks at {site.name} thin "
            f"{', '.join(matrices)} by what the MLP itself has computed, and a store is read "
            "before that; methods that can: dense, dip, dip-threshold, teal, glu, and of whole "
            "neurons dejavu, random"
        )
    if group.block != site.block:
        raise InputError(
            f"the records of {site.name} hold blocks of {group.block} channels and the method "
            f"decides about {site.block}: leave out hidden_block, or pack with --block "
            f"{site.block}"
        )


def _late(site: Site) -> bool:
    """Whether a site's scores are not known when its records must be asked for."""
    if site.name == "mlp.neuron":
        return site.scored_on not in EARLY
    return site.scored_on in ("gate", "up")


class _NoWeights:
    """What a method that wants to read the weights is told."""

    def __init__(self, name: str) -> None:
        self._name = name

    def matrix(self, _layer: int, _name: str) -> Tensor:
        raise InputError(
            f"{self._name} reads all weights to prepare itself, and a streamed model never holds "
            "them: use dip (for wina's norms with the scores of dipnet fit scores --kind norm), or "
            "evaluate it on the checkpoint"
        )
