"""A model on a GPU whose records are in the host's memory: what `dipnet.load` does for a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from dipnet.errors import BackendError, InputError
from dipnet.kernels.gpu.cache import make_cache
from dipnet.kernels.gpu.choice import why_not
from dipnet.methods.base import Method
from dipnet.models.families import Decoder
from dipnet.models.load import check_device
from dipnet.models.tokens import Prefill
from dipnet.sim.sizes import Split
from dipnet.store.index import REST_NAME, Group, Index
from dipnet.streaming.budget import divide
from dipnet.streaming.embedding import RowEmbedding
from dipnet.streaming.engine import Key
from dipnet.streaming.gpu.attach import OnDevice
from dipnet.streaming.gpu.budget import DeviceNeeds, most_wanted
from dipnet.streaming.gpu.choices import SiteChoice
from dipnet.streaming.gpu.embedding import HostEmbedding
from dipnet.streaming.gpu.groups import CachedGroup, DeviceGroup, HeldGroup, Room, Running
from dipnet.streaming.gpu.records import Records, pin, read_records
from dipnet.streaming.keys import reserve_keys
from dipnet.streaming.methods import densities

SCORED = ("input", "hidden")
"""What the scores of a site may read here."""


@dataclass(frozen=True)
class Bounds:
    """How a model on a GPU is held.

    ``memory`` bounds all that it takes of the GPU's, ``cache`` the caches alone; with neither,
    everything is there. Keys and values are for ``context`` tokens. ``planned`` says that a plan
    brought the bounds.
    """

    device: torch.device
    memory: int | None
    cache: int | None
    context: int
    policy: str
    split: Split
    dtype: torch.dtype = torch.bfloat16
    planned: bool = False


def check_gpu(name: str) -> torch.device:
    """The GPU of a name such as "cuda".

    Raises InputError when there is no such device, BackendError when the kernels cannot run on it.
    """
    if name.partition(":")[0] != "cuda":
        raise InputError(
            f"a packed model runs on 'cpu' or on a GPU such as 'cuda', not on {name!r}"
        )
    probe = torch.empty(0, device=check_device(name))
    reason = why_not(probe)
    if reason:
        raise BackendError(f"backend 'gpu' {reason}: load the store with device='cpu'")
    return probe.device


def check_options(
    look_ahead: bool | None, reader: object, policy: str | None, split: str | None, bounded: bool
) -> None:
    """Raise InputError for an option of `dipnet.load` that would change nothing on a GPU."""
    if look_ahead:
        raise InputError(
            "look_ahead is for device='cpu', which reads from disk: on a GPU nothing is read ahead"
        )
    if reader is not None:
        raise InputError(
            "reader is for device='cpu', which reads from disk: a GPU's records are in the host's "
            "memory or in its own"
        )
    for name, value in (("policy", policy), ("cache_split", split)):
        if value is not None and not bounded:
            raise InputError(
                f"{name} is for caches, and without memory= or cache= everything is on the GPU: "
                "give one of them, or leave it out"
            )


def check_sites(method: Method, index: Index, decoder: Decoder) -> None:
    """Raise InputError when a method's masks, or a store's records, are none that a GPU caches."""
    if index.unit != "column":
        raise InputError(
            "a GPU caches columns of input channels, and this store holds whole neurons: pack the "
            "model with --unit column, or load it with device='cpu'"
        )
    for site in method.sites(decoder.spec):
        if site.scored_on not in SCORED or site.name == "attn.head":
            raise InputError(
                f"{method.name} decides {site.name} by {site.scored_on}, which a packed model on a "
                "GPU does not serve: take dense, dip, teal or glu, or load it with device='cpu'"
            )


def on_device(
    folder: Path,
    index: Index,
    scales: Mapping[str, Tensor],
    decoder: Decoder,
    method: Method,
    prefill: Prefill,
    bounds: Bounds,
) -> PreTrainedModel:
    """Give the empty model of ``decoder`` the records of the store in ``folder``.

    Raises InputError when the method cannot run there, a record is damaged, the budget is too
    small, or the host's or the GPU's memory does not hold what it has to.
    """
    check_sites(method, index, decoder)
    model = decoder.model
    table = next(each for each in model.modules() if isinstance(each, RowEmbedding))
    name = next(path for path, each in model.named_modules() if each is table)
    with safe_open(folder / REST_NAME, framework="pt") as rest:
        model.set_submodule(
            name,
            HostEmbedding(
                rest.get_tensor(f"{name}.weight"), table.scale, bounds.dtype, bounds.device
            ),
        )

    def read(number: int) -> Records:
        return read_records(folder, index, number, scales)

    return place(index, read, decoder, method, prefill, bounds)


@torch.inference_mode(False)  # the caches' state could not be written outside of it
def place(
    index: Index,
    read: Callable[[int], Records],
    decoder: Decoder,
    method: Method,
    prefill: Prefill,
    bounds: Bounds,
) -> PreTrainedModel:
    """Attach records to a model that has its embedding; ``read`` gives those of a group."""
    model, device = decoder.model, bounds.device
    limited = bounds.memory is not None
    try:
        _move(model, device, bounds.dtype)
        attached = OnDevice(
            decoder, method, prefill, bounds.policy, context=bounds.context, limited=limited
        )
        groups = _groups(index, read, attached, bounds)
        attached.attach(groups)
    except torch.OutOfMemoryError:
        raise InputError(
            "the GPU's memory does not hold this model: give memory=, and the rest stays in the "
            "host's, or free some"
        ) from None
    reserve_keys(model.get_decoder(), bounds.context, strict=limited)
    model.generation_config.disable_compile = True  # tokens are one CUDA graph without it
    return model


def _move(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Bring what is no record to the device: parameters in ``dtype``, buffers as they are.

    What is a record now is an empty parameter there, until its layer is replaced.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            value = torch.empty(0) if parameter.is_meta else parameter.data
            setattr(module, name, nn.Parameter(value.to(device, dtype), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _groups(
    index: Index, read: Callable[[int], Records], attached: OnDevice, bounds: Bounds
) -> dict[Key, DeviceGroup]:
    """Every group on the device, those that fit whole without a cache."""
    choices: dict[Key, SiteChoice] = {
        key: SiteChoice(site, attached.method) for key, site in attached.usage.sites.items()
    }
    budget, model = bounds.cache, attached.decoder.model
    if bounds.memory is not None:
        size = bounds.dtype.itemsize
        needs = DeviceNeeds.of(index, model, choices, bounds.context, size)
        budget = needs.left(bounds.memory, planned=bounds.planned)
    shares = densities(attached.method, index, attached.decoder.spec)
    slots = divide(index, budget, shares, bounds.split)
    builder = _Builder(index, attached.running, choices, slots, bounds)
    return {group.key: builder.group(read(at)) for at, group in enumerate(index.groups)}


class _Builder:
    """Makes groups, and the rooms that the caches of like ones share."""

    def __init__(
        self,
        index: Index,
        running: Running,
        choices: Mapping[Key, SiteChoice],
        slots: Mapping[Key, int],
        bounds: Bounds,
    ) -> None:
        self.index = index
        self.running = running
        self.choices = choices
        self.slots = slots
        self.bounds = bounds
        self._rooms: dict[str, Room] = {}
        self._taken: dict[str, int] = {}

    def group(self, records: Records) -> DeviceGroup:
        """A group on the device; its records are pinned where it has a cache."""
        key, device = records.group.key, self.bounds.device
        choice = self.choices.get(key)
        if self.slots[key] == records.group.units:
            return HeldGroup(records, self.running, choice, device)
        if device.type == "cuda":
            pin(records.columns)
        gamma = 1.0 if choice is None else choice.gamma
        slots, policy = self.slots[key], self.bounds.policy
        cache = make_cache(records.group.units, slots, policy, device, gamma)
        room = self._room(records)
        first = self._taken.get(records.group.name, 0)
        self._taken[records.group.name] = first + slots
        return CachedGroup(records, self.running, choice, cache, room, first)

    def _room(self, like: Records) -> Room:
        name = like.group.name
        if name not in self._rooms:
            cached = list(self._cached(name))
            past = max(most_wanted(group, self.choices.get(group.key)) for group in cached)
            slots = sum(self.slots[group.key] for group in cached)
            self._rooms[name] = Room(like, slots, past, self.bounds.device)
        return self._rooms[name]

    def _cached(self, name: str) -> Iterator[Group]:
        """The groups of that name that have a cache."""
        groups = (group for group in self.index.groups if group.name == name)
        return (group for group in groups if self.slots[group.key] < group.units)
