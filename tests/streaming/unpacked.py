"""A model in memory with the weights that a store holds: what streaming it should compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from dipnet.models.families import Decoder
from dipnet.store.columns import decode
from dipnet.store.index import RECORDS_NAME, REST_NAME, Group, Index, read_index


@torch.no_grad()
def unpacked(store: Path, model: PreTrainedModel) -> PreTrainedModel:
    """The ``model`` that was packed, with the store's weights in float32."""
    index, rest = read_index(store), load_file(store / REST_NAME)
    decoder = Decoder(model.float())
    state = decoder.model.state_dict()
    for name in rest.keys() & state.keys():
        state[name].copy_(rest[name])
    records = np.fromfile(store / RECORDS_NAME, np.uint8)
    for group in index.groups:
        columns = _columns(records, group)
        scales = rest.get(group.scale_name)
        if group.layer is None:
            head = decode(columns[:, 0], scales, index.weights, group.rows)
            decoder.model.get_output_embeddings().weight = torch.nn.Parameter(head)
            continue
        for matrix, values in _matrices(index, group, columns, scales).items():
            decoder.matrix(group.layer, matrix).copy_(values)
    return model


def _columns(records: np.ndarray, group: Group) -> Tensor:
    """(channels, columns or 1, stride) uint8."""
    content = records[group.offset : group.end].reshape(group.units, group.record_bytes)
    used = content[:, : group.columns * group.stride]
    return torch.from_numpy(used.reshape(group.channels, -1, group.stride).copy())


def _matrices(
    index: Index, group: Group, columns: Tensor, scales: Tensor | None
) -> dict[str, Tensor]:
    if not group.input_rows:
        whole = decode(columns[:, 0], scales, index.weights, group.rows)
        return {matrix: whole[group.output_rows(matrix)] for matrix in group.matrices}
    found = {}
    for at, matrix in enumerate(group.matrices):
        own = None if scales is None else scales.view(group.units, -1)[:, at]
        made = decode(columns[:, at].contiguous(), own, index.weights, group.rows)
        found[matrix] = made if matrix == "down" else made.T
    return found
