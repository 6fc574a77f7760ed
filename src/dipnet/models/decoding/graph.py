"""A token's step, captured once and replayed for every token."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor
from transformers import StaticCache

from dipnet.models.decoding.blocks import Block
from dipnet.models.decoding.counts import StepCounts
from dipnet.models.decoding.forecast import OWN
from dipnet.models.decoding.token import TokenStep
from dipnet.models.families import Decoder

LENGTHS = 256
"""A cache's length is a multiple of it, so that a longer text seldom needs another graph."""


class Replay:
    """A static cache for a batch of ``rows`` sequences, and the step that decodes on it: a CUDA
    graph on a GPU."""

    def __init__(
        self,
        decoder: Decoder,
        blocks: list[Block],
        counts: StepCounts,
        rows: int,
        length: int,
        ring: int,
    ) -> None:
        self.rows = rows
        self.length = length
        self.counts = counts
        self.cache = _cache(decoder, rows, length)
        self.step = TokenStep(decoder, blocks, counts, self.cache, rows, ring)
        self.logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        if decoder.model.device.type == "cuda":
            counts.alive.zero_()  # what follows is no token of any text
            self._capture()

    def begin(self) -> StaticCache:
        """The cache, empty, for the prompt."""
        self.cache.reset()
        return self.cache

    def prompt_ended(self, tokens: int, padding: Tensor | None = None) -> None:
        """The cache holds so many columns; the first (rows,) int64 ``padding`` are no tokens."""
        self.step.prompt_ended(tokens, padding)

    def run(self, token: Tensor, alive: Tensor | None = None) -> Tensor:
        """The (rows, vocabulary) logits after (rows,) tokens; overwritten by the next call.

        Where (1,) ``alive`` is given and False, nothing of the tokens is counted.
        """
        self.step.token.copy_(token)
        if alive is None:
            self.counts.alive.fill_(1)
        else:
            self.counts.alive.copy_(alive)  # of all rows
        if self.graph is None:
            return self.step()
        self.graph.replay()
        assert self.logits is not None
        return self.logits

    @torch.no_grad()
    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels are compiled, what is made once is made
            for _ in range(2):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # a capture that is broken off would leave its own stream behind as the current one; other
        # threads may go on meanwhile
        own = _own_stream(self.step.token.device)
        capture = torch.cuda.graph(self.graph, stream=own, capture_error_mode="thread_local")
        with _nothing_collected(), torch.cuda.stream(torch.cuda.current_stream()), capture:
            self.logits = self.step()


@cache
def _own_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that all graphs are captured on: cuBLAS takes memory for every stream."""
    return torch.cuda.Stream(device, OWN)


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Garbage is collected before, and none meanwhile: what frees memory breaks a capture."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _cache(decoder: Decoder, rows: int, length: int) -> StaticCache:
    model, spec = decoder.model, decoder.spec
    groups = spec.matrices["k"][0] // spec.head_size
    with torch.inference_mode(False):
        cache = StaticCache(config=model.config.get_text_config(), max_cache_len=length)
        cache.early_initialization(rows, groups, spec.head_size, model.dtype, model.device)
    return cache
