"""A model on a device as `dipnet.load` makes it for "cuda": on a CPU where there is no GPU.

In float32, so that its masks are those of the CPU's engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dipnet.methods.base import Method
from dipnet.methods.dense import Dense
from dipnet.models.families import Decoder
from dipnet.store.index import read_index
from dipnet.streaming.attach import streamed
from dipnet.streaming.gpu.attach import OnDevice
from dipnet.streaming.gpu.load import Bounds, on_device
from dipnet.streaming.load import DEFAULT_POLICY, _context, _skeleton
from dipnet.streaming.methods import fitted_method
from tests.streaming.decoding import cache_bytes

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def place(
    store: Path,
    method: Method | None = None,
    share: float | None = None,
    *,
    prefill: Any = "sparse",
    policy: str = DEFAULT_POLICY,
    memory: int | None = None,
    context: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """The model of a store on `DEVICE`, with caches of a share of the records."""
    index = read_index(store)
    model, scales = _skeleton(store)
    decoder = Decoder(model)
    cache = None if share is None else cache_bytes(store, share)
    tokens = _context(model, context)
    bounds = Bounds(DEVICE, memory, cache, tokens, policy, "wanted", dtype)
    fitted = fitted_method(method or Dense(), store, index, decoder.spec)
    return on_device(store, index, scales, decoder, fitted, prefill, bounds)


def placed(model: PreTrainedModel) -> OnDevice:
    """What was attached to it."""
    found = streamed(model)
    assert isinstance(found, OnDevice)
    return found
