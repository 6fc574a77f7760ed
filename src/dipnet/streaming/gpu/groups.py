"""The product of one group of records on a GPU: all of them there, or a cache of them.

A token's product is on the device from its mask to its sums, so that a CUDA graph can hold it. A
batch's rows go one after the other: each finds what the one before has left in the cache. A prompt
that is dense uses no cache: the records stream past it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dipnet.kernels import gpu
from dipnet.kernels.gpu import Weight
from dipnet.kernels.gpu.cache import UnitCache, access, fetch
from dipnet.models.decoding.counts import StepCounts
from dipnet.models.decoding.sharing import MOST_ROWS
from dipnet.models.tokens import TokenState
from dipnet.models.usage import Usage
from dipnet.streaming.gpu.choices import SiteChoice
from dipnet.streaming.gpu.records import Records
from dipnet.streaming.linear import GroupProduct

DECODED_BYTES = 32 << 20
"""Of float32 weights that a prompt's product has at a time."""


@dataclass(frozen=True, eq=False)
class Running:
    """What all groups of a model share: the tokens of the running call, and the counts."""

    tokens: TokenState
    usage: Usage
    counts: StepCounts


class DeviceGroup(GroupProduct):
    """A group whose products are computed on the device; ``choice`` is None where all is wanted."""

    def __init__(self, records: Records, running: Running, choice: SiteChoice | None) -> None:
        super().__init__(records.group, running.tokens)
        self.records = records
        self.running = running
        self.choice = choice
        self.streamed_bytes = 0

    @abstractmethod
    def wanted(self, x: Tensor) -> Tensor:
        """What a token wants by its (1, channels) input: (units,) bool."""

    @abstractmethod
    def masked(self, x: Tensor, wanted: Tensor, alive: Tensor) -> Tensor:
        """(1, channels) times the (units,) wanted: (1, rows).

        Where (1,) int64 ``alive`` is 0, no cache changes.
        """

    @abstractmethod
    def parts(self, channels: int) -> Iterator[tuple[slice, Weight]]:
        """All columns on the device, so many at a time."""

    def step(self, x: Tensor) -> Tensor:
        """(rows, channels), a token of each sequence of a step -> (rows, outputs)."""
        alive = self.running.counts.alive
        made = []
        for at, row in enumerate(x.split(1)):
            wanted = self.wanted(row)
            self._count(wanted, alive[at : at + 1])
            made.append(self.masked(row, wanted, alive[at : at + 1]))
        return _stacked(made)

    @torch.compiler.disable
    def product(self, x: Tensor) -> Tensor:
        """(..., channels) -> (..., rows) of a call through Hugging Face's modules."""
        flat = x.detach().reshape(-1, self.group.channels).contiguous()
        made = self.whole(flat) if self._is_whole(len(flat)) else self._one_by_one(flat)
        return made.view(*x.shape[:-1], -1)

    def whole(self, x: Tensor) -> Tensor:
        """(tokens, channels) -> (tokens, rows): everything is wanted, nothing counted."""
        made = x.new_zeros(len(x), self.group.rows, dtype=torch.float32)
        for part, weight in self.parts(max(1, DECODED_BYTES // (4 * self.group.outputs))):
            index = torch.arange(weight.units, device=x.device)
            made += (x[:, part] @ weight.rows(index).to(x.dtype)).float()
        return made.to(x.dtype)

    def _is_whole(self, tokens: int) -> bool:
        return self.tokens.all_dense or (self.choice is None and tokens > 1)

    def _one_by_one(self, x: Tensor) -> Tensor:
        dense, counted = (
            None if flags is None else flags.flatten()
            for flags in (self.tokens.dense, self.tokens.counted)
        )
        stays_dense = [False] * len(x) if dense is None else dense.tolist()
        alive = x.new_ones(len(x), dtype=torch.int64) if counted is None else counted.long()
        made, masks = [], []
        for at, row in enumerate(x.split(1)):
            masks.append(self.wanted(row))
            self._count(masks[-1], alive[at : at + 1])
            made.append(
                self.whole(row)
                if stays_dense[at]
                else self.masked(row, masks[-1], alive[at : at + 1])
            )
        recorder = self.running.usage.recorder
        if recorder is not None and self.choice is not None:
            scores = self.choice.method.score(self.choice.site, x)
            recorder.add(self.choice.site, torch.stack(masks), scores, counted)
        return _stacked(made)

    def _count(self, wanted: Tensor, alive: Tensor) -> None:
        """Count the units of a site that does not want the same number each time."""
        if self.choice is not None and self.choice.fixed is None:
            site = self.choice.site
            counter = self.running.counts.units[site.layer, site.name]
            counter[:1].addcmul_(wanted.sum(dim=0, keepdim=True), alive)


class HeldGroup(DeviceGroup):
    """A group whose records are all in the device's memory."""

    def __init__(
        self,
        records: Records,
        running: Running,
        choice: SiteChoice | None,
        device: torch.device,
    ) -> None:
        super().__init__(records.to(device), running, choice)
        self.weight = self.records.weight(self.records.columns, self.records.scales)
        channels = torch.arange(self.group.channels, dtype=torch.int32, device=device)
        self._all = channels.expand(MOST_ROWS, -1)

    def step(self, x: Tensor) -> Tensor:
        """(rows, channels), a token of each sequence of a step -> (rows, outputs)."""
        return self.whole(x) if self.choice is None else super().step(x)

    def wanted(self, x: Tensor) -> Tensor:
        """What a token wants by its (1, channels) input: (units,) bool."""
        assert self.choice is not None, "what wants all is multiplied whole"
        return self.choice.wanted(x, None)

    def masked(self, x: Tensor, wanted: Tensor, alive: Tensor) -> Tensor:
        """(1, channels) times the (units,) wanted: (1, rows)."""
        index, count = gpu.union_indices(wanted[None])
        block = self.group.block
        return gpu.columns_product(x, index[None], self.weight, count=count, block=block)

    def whole(self, x: Tensor) -> Tensor:
        """(tokens, channels) -> (tokens, rows): everything is wanted, nothing counted."""
        if self.weight.kind == "bf16" and x.dtype == torch.bfloat16:
            return x @ self.weight.numbers[:, : self.group.rows]
        if len(x) <= MOST_ROWS:
            return gpu.columns_product(x, self._all[: len(x)], self.weight)
        return super().whole(x)

    def parts(self, channels: int) -> Iterator[tuple[slice, Weight]]:
        """All columns, so many at a time."""
        data, scales = self.weight.data, self.weight.scales
        for start in range(0, self.group.channels, channels):
            part = slice(start, start + channels)
            yield part, self.records.weight(data[part], None if scales is None else scales[part])

    def _is_whole(self, tokens: int) -> bool:
        return self.tokens.all_dense or self.choice is None


class Room:
    """Memory on the device for the caches of like groups, and behind them for what goes past.

    A row holds a record: ``slots`` rows belong to the caches, ``past`` rows to the token at hand.
    """

    def __init__(self, like: Records, slots: int, past: int, device: torch.device) -> None:
        rows, block = slots + past, like.group.block
        self.past = slots
        self.data = torch.zeros(rows, like.units.shape[1], dtype=torch.uint8, device=device)
        scaled = like.scales is not None
        self.scales = torch.zeros(rows, block, device=device) if scaled else None
        flat = None if self.scales is None else self.scales.view(-1)
        self.weight = like.weight(self.data.view(rows * block, -1), flat)


class CachedGroup(DeviceGroup):
    """A group of which the device has a cache, in ``room`` from row ``first`` on.

    The records are in the host's memory, where the device reads those that are missing.
    """

    def __init__(
        self,
        records: Records,
        running: Running,
        choice: SiteChoice | None,
        cache: UnitCache,
        room: Room,
        first: int,
    ) -> None:
        super().__init__(records, running, choice)
        self.cache = cache
        self.room = room
        self.first = first
        device = room.data.device
        self.most = self.group.units if choice is None else choice.most
        self._all = torch.ones(self.group.units, dtype=torch.bool, device=device)
        self._scales: tuple[Tensor, Tensor] | None = None
        if records.scales is not None and room.scales is not None:
            self._scales = records.scales.to(device).view(self.group.units, -1), room.scales

    def wanted(self, x: Tensor) -> Tensor:
        """What a token wants by its (1, channels) input: (units,) bool."""
        return self._all if self.choice is None else self.choice.wanted(x, self.cache.factor)

    def masked(self, x: Tensor, wanted: Tensor, alive: Tensor) -> Tensor:
        """(1, channels) times the (units,) wanted, which are brought to the device: (1, rows)."""
        first, past = self.first, self.room.past
        places = access(self.cache, wanted, alive, first=first, past=past, most=self.most)
        brought = places.missed, places.missed_rows, places.misses
        fetch(self.records.units, *brought, self.room.data, self._scales)
        kept = x.view(self.group.units, -1).index_select(0, places.units)
        return gpu.columns_product(
            kept.view(1, -1),
            places.rows[None],
            self.room.weight,
            count=places.count,
            compact=True,
            block=self.group.block,
        )

    def parts(self, channels: int) -> Iterator[tuple[slice, Weight]]:
        """All columns, so many at a time, from the host's memory."""
        self.streamed_bytes += self.records.columns.nbytes
        scales = None if self._scales is None else self._scales[0].view(-1)
        device = self.room.data.device
        for start in range(0, self.group.channels, channels):
            part = slice(start, start + channels)
            columns = self.records.columns[part].to(device, non_blocking=True)
            yield part, self.records.weight(columns, None if scales is None else scales[part])


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))
