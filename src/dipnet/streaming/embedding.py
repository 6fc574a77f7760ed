"""A token embedding that stays in its file: a token reads its own row."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dipnet.errors import InputError


class RowEmbedding(nn.Module):
    """Rows of a bf16 table that lies in a file from ``offset`` on; (...) ids -> (..., d) float32.

    ``scale`` is what the family multiplies its embeddings with.
    """

    def __init__(self, file: Path, offset: int, shape: tuple[int, int], scale: float) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = shape
        self.scale = scale
        self._offset = offset
        self._file = file.open("rb", buffering=0)

    def forward(self, ids: Tensor) -> Tensor:
        """(...) token ids -> (..., d)."""
        row = 2 * self.embedding_dim
        made = bytearray(row * ids.numel())
        for at, token in enumerate(ids.reshape(-1).tolist()):
            if not 0 <= token < self.num_embeddings:
                raise InputError(f"token {token} is not in the vocabulary of {self.num_embeddings}")
            data = os.pread(self._file.fileno(), row, self._offset + token * row)
            if len(data) != row:
                raise InputError(f"{self._file.name} was cut off while it is in use")
            made[at * row : (at + 1) * row] = data
        values = torch.frombuffer(made, dtype=torch.bfloat16).float() * self.scale
        return values.view(*ids.shape, self.embedding_dim)


def row_embedding(file: Path, name: str, model: PreTrainedModel) -> RowEmbedding:
    """The embedding of a model from the tensor ``name`` of a safetensors file."""
    old = model.get_input_embeddings()
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        header = json.loads(opened.read(length))
    entry = header.get(name)
    shape = [old.num_embeddings, old.embedding_dim]
    if entry is None or entry["dtype"] != "BF16" or entry["shape"] != shape:
        raise InputError(f"{file} lacks the embedding {name!r} of {shape}: pack the model again")
    start, end = entry["data_offsets"]
    if end - start != 2 * shape[0] * shape[1] or 8 + length + end > file.stat().st_size:
        raise InputError(f"{file} is damaged at {name!r}: pack the model again")
    scale = float(getattr(old, "embed_scale", 1.0))
    return RowEmbedding(file, 8 + length + start, (shape[0], shape[1]), scale)
