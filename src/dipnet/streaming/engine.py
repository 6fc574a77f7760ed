"""The native engine for one store: sites by (layer, name), tensors in and out.

Knows records and masks; knows no method and no model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dipnet.errors import BackendError, InputError
from dipnet.store.index import RECORDS_NAME, REST_NAME, Group, Index

try:
    from dipnet import _native
except ImportError:  # a source tree whose extension was never built
    _BUILT = False
else:
    _BUILT = True

Key = tuple[int | None, str]
"""A group's (layer, name); the head's layer is None."""
Fault = tuple[int, int, int]
"""First byte, end, errno: reads of records.bin that fail, for tests."""

FRAME_BYTES = 32 << 20
"""Memory for records on their way. A deep queue of large reads has 16 MiB under way; half of the
frames may hold what was read ahead."""
LEAST_FRAMES = 256
"""However large they are: half of them may hold guesses (csrc/engine.cpp)."""
DEPTH = 256
"""Reads in flight: disks reach their full rate from 32 to 64 of 32 KiB (benchmarks/disk.py)."""


class StoreError(InputError):
    """A store's records cannot be read, or are not what was packed."""


@dataclass(frozen=True)
class Reader:
    """How records are read. ``backend`` is io_uring, pread or auto; ``faults`` are for tests."""

    backend: str = "auto"
    depth: int = DEPTH
    frame_bytes: int = FRAME_BYTES
    faults: Sequence[Fault] = ()


def default_threads() -> int:
    """The CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def frames_size(index: Index, reader: Reader) -> int:
    """Bytes of the memory for records on their way: room for some of the largest at least."""
    return max(reader.frame_bytes, LEAST_FRAMES * largest_record(index))


def largest_record(index: Index) -> int:
    """Bytes of the largest record of a store."""
    return max(group.record_bytes for group in index.groups)


def _by_column(scales: Tensor, group: Group) -> NDArray[np.float32]:
    """(units * columns,) scales as the store has them, record by record -> column by column."""
    if not group.input_rows:
        return scales.numpy()
    return scales.view(group.units, group.columns).T.contiguous().numpy().reshape(-1)


class Engine:
    """Multiplies masked activations with a store's records, cached and streamed.

    ``slots`` says for every group how many of its records are held in memory. Raises InputError
    when the store's file cannot be opened and BackendError when the native core is not built.
    """

    def __init__(
        self,
        folder: Path,
        index: Index,
        scales: Mapping[str, Tensor],
        slots: Mapping[Key, int],
        policy: str,
        reader: Reader | None = None,
    ) -> None:
        if not _BUILT:
            raise BackendError("the native core is not built: run `pip install .`")
        reader = reader or Reader()
        self.folder = folder
        self.index = index
        self.slots = slots
        self.policy = policy
        try:
            self._native = _native.Engine(
                str(folder / RECORDS_NAME),
                depth=reader.depth,
                backend=reader.backend,
                threads=default_threads(),
                frame_bytes=reader.frame_bytes,
                largest_record=largest_record(index),
                faults=list(reader.faults),
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"cannot read {folder / RECORDS_NAME}: {error}") from None
        self._sites = {
            group.key: self._add(number, group, scales, slots, policy)
            for number, group in enumerate(index.groups)
        }

    def _add(
        self,
        number: int,
        group: Group,
        scales: Mapping[str, Tensor],
        slots: Mapping[Key, int],
        policy: str,
    ) -> int:
        scaled = self.index.weights != "bf16"
        try:
            return self._native.add(
                kind=self.index.weights,
                channels=group.channels,
                block=group.block,
                outputs=group.outputs,
                rows=group.rows,
                stride=group.stride,
                record_bytes=group.record_bytes,
                offset=group.offset,
                group=number,
                scale=_by_column(scales[group.scale_name], group) if scaled else None,
                slots=slots[group.layer, group.name],
                policy=policy,
                input_rows=group.input_rows,
            )
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise StoreError(
                f"the scales of {group.label} in {self.folder / REST_NAME} are damaged "
                f"({' '.join(str(error).split())[:80]}): copy the store again or pack the model "
                "again"
            ) from None

    def hold(self, key: Key) -> None:
        """Read as many records of a group as there are slots, before anything asks for them."""
        group = self.index.group(*key)
        self._native.access(self._sites[key], np.ones(group.units, dtype=bool))
        self._guarded(self._native.load, self._sites[key])

    def resident(self, key: Key) -> NDArray[np.bool_]:
        """(units,) what the cache of a group holds; a view that follows it."""
        return self._native.resident(self._sites[key])

    def access(self, key: Key, wanted: NDArray[np.bool_]) -> tuple[int, int, int]:
        """Tell the cache of a token's (units,) mask: how many were hits, misses, and admitted."""
        return self._native.access(self._sites[key], wanted)

    def begin(self, key: Key, x: Tensor, masks: Tensor) -> None:
        """Ask for the records of (tokens, units) ``masks`` and multiply (tokens, channels) ``x``
        with those in memory."""
        self._guarded(self._native.begin, self._sites[key], x.numpy(), masks.numpy())

    def partial(self, key: Key) -> Tensor:
        """(1, rows): the product with the records multiplied so far, of a single token."""
        made = torch.empty(1, self.index.group(*key).rows)
        self._native.partial(made.numpy())
        return made

    def prefetch(self, key: Key, mask: Tensor, scores: Tensor, *, certain: bool = False) -> None:
        """Read records of a (units,) guess ahead; as many as fit when they are ``certain``."""
        self._native.prefetch(self._sites[key], mask.numpy(), scores.numpy(), certain)

    def finish(self, key: Key, tokens: int) -> Tensor:
        """(tokens, rows): the product with all records, when the last has come."""
        made = torch.empty(tokens, self.index.group(*key).rows)
        self._guarded(self._native.finish, made.numpy())
        return made

    def rows(self, key: Key, x: Tensor, masks: Tensor) -> Tensor:
        """What the rows of (tokens, units) ``masks`` make of (tokens, width) ``x``, 0 elsewhere.

        (tokens, input_rows * units), of a group of neurons; `columns` ends the request.
        """
        group = self.index.group(*key)
        made = torch.empty(len(x), group.input_rows * group.units)
        arguments = (self._sites[key], x.numpy(), masks.numpy(), made.numpy())
        self._guarded(self._native.rows, *arguments)
        return made

    def columns(self, key: Key, h: Tensor) -> Tensor:
        """(tokens, units) activations of the neurons of the last `rows` -> (tokens, width)."""
        made = torch.empty(len(h), self.index.group(*key).rows)
        self._guarded(self._native.columns, h.numpy(), made.numpy())
        return made

    def totals(self, key: Key) -> dict[str, Any]:
        """Counts of units and records, and seconds, of one group."""
        return self._native.totals(self._sites[key])

    def reader_totals(self) -> dict[str, Any]:
        """Reads, bytes and the time in which the disk was busy."""
        return self._native.reader_totals()

    def reset_totals(self) -> None:
        """Forget the counts of the groups; the reader's go on."""
        self._native.reset_totals()

    def _guarded(self, call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except _native.RecordError as error:
            site, unit, number, _ = error.args
            raise self._explained(self.index.groups[site], unit, number) from None

    def _explained(self, group: Group, unit: int, number: int) -> StoreError:
        where = f"record {unit} of {group.label} in {self.folder / RECORDS_NAME}"
        if number == 0:
            return StoreError(
                f"{where} is damaged, its checksum does not fit: run `dipnet check {self.folder}`, "
                "then copy the store again or pack the model again"
            )
        return StoreError(
            f"{where} cannot be read ({os.strerror(number)}): check the disk; the model is unharmed"
        )
