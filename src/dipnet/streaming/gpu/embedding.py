"""A token embedding in the host's memory: a token's row is read by the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dipnet.errors import InputError
from dipnet.kernels.gpu.cache import fetch
from dipnet.streaming.gpu.records import pin


class HostEmbedding(nn.Module):
    """(...) ids -> (..., d) rows of a bf16 ``table`` in ``dtype``, times ``scale``."""

    def __init__(
        self, table: Tensor, scale: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = table.shape
        self._table = pin(table) if device.type == "cuda" else table
        self._scale = None if scale == 1 else torch.tensor(scale, dtype=dtype, device=device)
        self._dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """(...) token ids -> (..., d)."""
        self._check(ids)
        flat = ids.reshape(-1).int()
        made = torch.empty(len(flat), self.embedding_dim, dtype=torch.bfloat16, device=ids.device)
        rows = torch.arange(len(flat), dtype=torch.int32, device=ids.device)
        bytes_ = self._table.view(torch.uint8), made.view(torch.uint8)
        fetch(bytes_[0], flat, rows, torch.full_like(flat[:1], len(flat)), bytes_[1])
        values = made.to(self._dtype)
        values = values if self._scale is None else values * self._scale
        return values.view(*ids.shape, self.embedding_dim)

    def _check(self, ids: Tensor) -> None:
        """Raise InputError for an id that is none; in a graph there are only ids of our own."""
        if ids.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        outside = ids[(ids < 0) | (ids >= self.num_embeddings)]
        if len(outside):
            raise InputError(
                f"token {int(outside[0])} is not in the vocabulary of {self.num_embeddings}"
            )
