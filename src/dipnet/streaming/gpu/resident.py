"""A packed model whose records are all in a GPU's memory, as they are on disk.

Its linear layers are the store's columns, once; what `sparsify` puts on it is what it puts on any
model, so that the reference and the kernels decide and count alike.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from dipnet.errors import InputError
from dipnet.kernels.gpu import Weight
from dipnet.methods.base import Method
from dipnet.methods.dense import Dense
from dipnet.models.attach import sparsify
from dipnet.models.decoding.memory import free_bytes, free_text
from dipnet.models.decoding.packed import PackedColumns, PackedRows, put_packed
from dipnet.models.families import Decoder
from dipnet.models.tokens import Prefill
from dipnet.store.index import Index
from dipnet.streaming.filling import filled_model
from dipnet.streaming.gpu.records import Records, read_records
from dipnet.streaming.methods import fitted_method
from dipnet.units import size_text


def resident(
    folder: Path,
    index: Index,
    method: Method | None,
    prefill: Prefill,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> PreTrainedModel:
    """The model of a store, in activations of ``dtype``, decoding with ``method`` (None: dense).

    Raises InputError when a record is damaged, the method cannot run on the records, or the
    device's memory does not hold them.
    """
    _check_room(index, device)
    try:
        model, scales = filled_model(folder, device, dtype)
        decoder = Decoder(model)
        fitted = fitted_method(method or Dense(), folder, index, decoder.spec)
        for number in range(len(index.groups)):
            _put(decoder, read_records(folder, index, number, scales).to(device))
    except torch.OutOfMemoryError:
        raise _too_small(index, device) from None
    return sparsify(model, fitted, prefill=prefill, backend=backend)


def _put(decoder: Decoder, records: Records) -> None:
    """Let the linear layers of a group be its records."""
    group = records.group
    rows = {matrix: group.output_rows(matrix) for matrix in group.matrices}
    if not group.input_rows:
        packed = PackedColumns(records.weight(records.columns, records.scales))
        put_packed(decoder, group.layer, rows, packed)
        return
    *inputs, down = _by_matrix(records)
    end = rows.pop("down")
    put_packed(decoder, group.layer, rows, PackedRows(inputs))
    own = {"down": slice(0, end.stop - end.start)}
    put_packed(decoder, group.layer, own, PackedColumns(down))


def _by_matrix(records: Records) -> list[Weight]:
    """The rows or columns of each matrix of whole neurons, as views of their records."""
    number, scales = records.group.columns, records.scales
    data = records.columns.view(-1, number, records.group.stride)
    return [
        records.weight(
            data[:, at], None if scales is None else scales.view(-1, number)[:, at].contiguous()
        )
        for at in range(number)
    ]


def _held_bytes(index: Index) -> int:
    """Bytes of a store's columns, without what pads its records, and of the rest."""
    columns = sum(group.units * group.columns * group.stride for group in index.groups)
    return columns + index.rest_bytes


def _check_room(index: Index, device: torch.device) -> None:
    free = free_bytes(device)
    if free is not None and free < _held_bytes(index):
        raise _too_small(index, device)


def _too_small(index: Index, device: torch.device) -> InputError:
    needed, free = size_text(_held_bytes(index)), free_text(device)
    return InputError(
        f"this model's weights take {needed}, and {free} is free on the GPU: free some, or give "
        "cache= (of the records on the GPU) or memory= (of the GPU)"
    )
