"""How a memory budget is divided: what must be there, and the caches of the sites.

Everything is in bytes and in whole records; nothing is allocated here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dipnet.errors import InputError
from dipnet.sim.sizes import Split, divide_bytes
from dipnet.store.index import Index
from dipnet.streaming.engine import Key
from dipnet.units import parse_size as parse_size
from dipnet.units import size_text as size_text

CACHED = ("mlp.in", "mlp.hidden", "mlp.neuron")
"""The groups whose records may be streamed; the others are held in memory."""
MARGIN = 96 << 20
"""What Python, torch and the kernel's own bookkeeping may still take after loading."""
SLACK = 16 << 20
"""What one process holds more than another that does the same, when the budget is divided."""


@dataclass(frozen=True)
class Needs:
    """Memory in bytes that a model takes apart from its caches.

    ``process`` is what the process holds when the budget is divided, and ``peak`` the most that it
    held before; ``pinned`` the records that are never streamed; ``frames`` those on their way;
    ``keys`` the key/value cache of the longest sequence; ``work`` the activations and sums of a
    prompt's piece.
    """

    process: int
    peak: int
    pinned: int
    frames: int
    keys: int
    work: int

    @property
    def total(self) -> int:
        """All of it, with the margin."""
        return self.process + self.pinned + self.frames + self.keys + self.work + MARGIN

    @property
    def smallest(self) -> int:
        """The smallest budget that works here and in the next process, in whole MiB."""
        needed = max(self.total, self.peak) + SLACK
        return -(-needed // 2**20) * 2**20

    def left(self, memory: int) -> int:
        """What a budget leaves for the caches; InputError when it is too small."""
        if memory < max(self.total, self.peak):
            raise InputError(
                f"a budget of {size_text(memory)} is too small for this model: the smallest that "
                f"works is {self.smallest >> 20} MiB (the process {size_text(self.process)}, "
                f"weights that are always in memory {size_text(self.pinned)}, keys and values "
                f"{size_text(self.keys)}, buffers {size_text(self.frames + self.work)}, margin "
                f"{size_text(MARGIN)}); a shorter context needs less"
            )
        return memory - self.total


def pinned_bytes(index: Index) -> int:
    """Bytes of the records that are always in memory."""
    return sum(group.bytes for group in index.groups if group.name not in CACHED)


def cached_names(index: Index) -> list[str]:
    """The names of the groups whose records may be streamed, in the order of computation."""
    return [group.name for group in index.first_layer if group.name in CACHED]


def divide(
    index: Index,
    budget: int | None,
    densities: Mapping[Key, float],
    split: Split = "wanted",
) -> dict[Key, int]:
    """Slots of every group when ``budget`` bytes are for the caches (None: everything is held).

    A site gets a share in proportion to the bytes that a token wants of it, so that all have the
    same chance of a hit, or with ``split`` "even" as many bytes as any other; what a site cannot
    use goes to the others.
    """
    slots = {group.key: group.units for group in index.groups}
    if budget is None:
        return slots
    sizes = {key: index.group(*key).bytes for key in slots if key[1] in CACHED}
    shares = dict.fromkeys(sizes, 1.0)
    if split == "wanted":
        shares = {key: densities[key] * size for key, size in sizes.items()}
    for key, size in divide_bytes(sizes, shares, budget).items():
        slots[key] = size // index.group(*key).record_bytes
    return slots
