"""A store's records in memory: read once, checked, and pinned where a GPU shall read them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dipnet.errors import InputError
from dipnet.kernels.gpu import Weight
from dipnet.store.check import read_group
from dipnet.store.geometry import Weights
from dipnet.store.index import RECORDS_NAME, Group, Index
from dipnet.streaming.engine import StoreError

PORTABLE = 0x01
"""Of cudaHostRegister: pinned for every context."""


@dataclass(frozen=True, eq=False)
class Records:
    """The columns of one group, (channels, stride) uint8, and their (channels,) float32 scales.

    There are no scales for bf16. The padding of records and their checksums are left out. Of whole
    neurons they are their rows and columns, as a record has them, neuron by neuron.
    """

    group: Group
    kind: Weights
    columns: Tensor
    scales: Tensor | None

    def weight(self, columns: Tensor, scales: Tensor | None) -> Weight:
        """Some columns as the kernels take them."""
        return Weight(columns, scales, self.kind, self.group.rows)

    def to(self, device: torch.device) -> Records:
        """The same on a device."""
        scales = None if self.scales is None else self.scales.to(device)
        return replace(self, columns=self.columns.to(device), scales=scales)

    @property
    def units(self) -> Tensor:
        """The columns unit by unit: (units, bytes)."""
        return self.columns.view(self.group.units, -1)


def read_records(folder: Path, index: Index, number: int, scales: Mapping[str, Tensor]) -> Records:
    """The records of the group with that number, each compared with its checksum.

    Raises StoreError when one is damaged, InputError when the file cannot be read or the host's
    memory does not hold them.
    """
    group = index.groups[number]
    try:
        columns = torch.empty(group.units, group.columns * group.stride, dtype=torch.uint8)
    except RuntimeError:
        raise InputError(
            f"the host's memory does not hold the records of {group.label}: a model on a GPU has "
            "its records there; free some, or load it with device='cpu', which reads from disk"
        ) from None
    stored = columns.numpy()
    for first, piece, damaged in read_group(folder, index, number):
        for record in damaged:
            raise StoreError(
                f"record {record.unit} of {group.label} in {folder / RECORDS_NAME} is damaged, its "
                f"checksum does not fit: run `dipnet check {folder}`, then copy the store again or "
                "pack the model again"
            )
        stored[first : first + len(piece)] = piece[:, : stored.shape[1]]
    scaled = None if index.weights == "bf16" else scales[group.scale_name]
    number_of = (group.units * group.columns,)
    if scaled is not None and (scaled.shape != number_of or scaled.dtype != torch.float32):
        raise StoreError(f"the scales of {group.label} are damaged: pack the model again")
    return Records(group, index.weights, columns.view(-1, group.stride), scaled)


def pin(memory: Tensor) -> Tensor:
    """Keep a tensor's memory where it is, so that a GPU can read it, for as long as it lives.

    Raises InputError when the system does not allow it.
    """
    if memory.is_pinned():
        return memory
    runtime = torch.cuda.cudart()
    status = int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, PORTABLE))
    if status:
        raise InputError(
            f"cannot pin {memory.nbytes >> 20} MiB of the host's memory for the GPU (CUDA error "
            f"{status}): free some of it, raise `ulimit -l`, or give the GPU more with memory="
        )
    weakref.finalize(memory.untyped_storage(), runtime.cudaHostUnregister, memory.data_ptr())
    return memory
