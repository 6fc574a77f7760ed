"""What a model takes of a GPU's memory beside its caches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedModel

from dipnet.errors import InputError
from dipnet.models.decoding.graph import LENGTHS
from dipnet.store.geometry import round_up
from dipnet.store.index import Group, Index
from dipnet.streaming.budget import CACHED, size_text
from dipnet.streaming.engine import Key
from dipnet.streaming.gpu.choices import SiteChoice
from dipnet.streaming.gpu.groups import DECODED_BYTES
from dipnet.streaming.keys import key_numbers

MARGIN = 192 << 20
"""What kernels, graphs and PyTorch's allocator may still take."""
SMALLEST_STEP = 2**20


def key_tokens(context: int) -> int:
    """The tokens that keys and values are held for: of one sequence, or of all together."""
    return round_up(context, LENGTHS)


def most_wanted(group: Group, choice: SiteChoice | None) -> int:
    """The records of a group that a token may want."""
    return group.units if choice is None else choice.most


@dataclass(frozen=True)
class DeviceNeeds:
    """Bytes of the GPU's memory: ``held`` for what is always there, ``past`` for the records of one
    token that find no place in a cache, ``keys`` for keys and values, ``work`` for a prompt."""

    held: int
    past: int
    keys: int
    work: int

    @classmethod
    def of(
        cls,
        index: Index,
        model: PreTrainedModel,
        choices: Mapping[Key, SiteChoice],
        context: int,
        size: int,
    ) -> DeviceNeeds:
        """Those of a model whose numbers have ``size`` bytes, for ``context`` tokens."""
        streamed = [group for group in index.groups if group.name in CACHED]
        held = sum(g.channels * g.stride for g in index.groups if g.name not in CACHED)
        tables = sum(4 * g.channels + 16 * g.units for g in index.groups)
        past: dict[str, int] = {}  # layers share the room, and may want different numbers
        for group in streamed:
            needed = most_wanted(group, choices.get(group.key)) * group.record_bytes
            past[group.name] = max(needed, past.get(group.name, 0))
        rows = max(g.rows for g in index.groups if g.layer is not None)
        others = sum(size * p.numel() for p in model.parameters() if not p.is_meta)
        return cls(
            held=held + tables + others,
            past=sum(past.values()),
            keys=key_numbers(model) * size * key_tokens(context),
            work=8 * DECODED_BYTES + context * (rows * (8 + 3 * size) + context * size),
        )

    @property
    def total(self) -> int:
        """All of it, with the margin."""
        return self.held + self.past + self.keys + self.work + MARGIN

    def left(self, memory: int, *, planned: bool = False) -> int:
        """What a budget leaves for the caches; InputError when it is too small.

        ``planned`` says that a plan brought it.
        """
        if memory < self.total:
            smallest = round_up(self.total, SMALLEST_STEP) >> 20
            plan = "; a plan's memory is a process's on a CPU, and the GPU's here" * planned
            raise InputError(
                f"a budget of {size_text(memory)} of the GPU's memory is too small for this model: "
                f"the smallest that works is {smallest} MiB (weights that are always there "
                f"{size_text(self.held)}, a token's records {size_text(self.past)}, keys and "
                f"values {size_text(self.keys)}, a prompt {size_text(self.work)}, margin "
                f"{size_text(MARGIN)}); a shorter context needs less{plan}"
            )
        return memory - self.total
