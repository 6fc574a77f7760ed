"""Walk through a model's decoder blocks one by one, on calibration text.

For what is fitted block by block: each block is run again and again on the same inputs, without
the rest of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dipnet.methods.base import Method
from dipnet.models.attach import Attachment
from dipnet.models.families import Decoder


def walk_blocks(model: PreTrainedModel, windows: list[Tensor]) -> Iterator[WalkedBlock]:
    """The decoder blocks in order, each with its inputs for every (batch, tokens) window.

    The inputs of a block are the dense outputs of the block before, unless that one was told to
    pass on what its pruned weights give.
    """
    decoder = Decoder(model)
    calls = [_block_calls(model, decoder.layers, window) for window in windows]
    hidden = [states for states, _ in calls]
    for layer, block in enumerate(decoder.layers):
        arguments = [by_layer[layer] for _, by_layer in calls]
        walked = WalkedBlock(decoder, layer, block, hidden, arguments)
        yield walked
        hidden = walked.outputs(walked.passes_on)


def _block_calls(
    model: PreTrainedModel, layers: nn.ModuleList, window: Tensor
) -> tuple[Tensor, list[dict[str, Any]]]:
    """The first block's input and every block's other arguments, for one window."""
    hidden: list[Tensor] = []
    arguments: list[dict[str, Any]] = []

    def capture(_block: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0])
        arguments.append(kwargs)

    handles = [block.register_forward_pre_hook(capture, with_kwargs=True) for block in layers]
    try:
        with torch.no_grad():
            model.get_decoder()(input_ids=window, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return hidden[0], arguments


class WalkedBlock:
    """A decoder block and what reaches it; valid until the walk goes on."""

    def __init__(
        self,
        decoder: Decoder,
        layer: int,
        module: nn.Module,
        hidden: list[Tensor],
        arguments: list[dict[str, Any]],
    ) -> None:
        self.layer = layer
        self.passes_on: Method | None = None
        self._decoder = decoder
        self._module = module
        self._calls = list(zip(hidden, arguments, strict=True))

    def outputs(self, method: Method | None = None) -> list[Tensor]:
        """The block's (batch, tokens, hidden) output for each window, dense without a method."""
        with self._pruned(method), torch.no_grad():
            return [self._call(states, kwargs) for states, kwargs in self._calls]

    def error(self, method: Method) -> float:
        """Relative L2 error of the block's output when ``method`` prunes it."""
        pairs = zip(self.outputs(method), self._dense, strict=True)
        wrong = sum(float((pruned - dense).float().square().sum()) for pruned, dense in pairs)
        right = sum(float(dense.float().square().sum()) for dense in self._dense)
        return (wrong / right) ** 0.5

    def input_norms(self) -> dict[str, Tensor]:
        """For each MLP matrix the (inputs,) L2 norm over all tokens of every input channel."""
        squares: dict[str, Tensor] = {}

        def add(matrix: str, x: Tensor) -> None:
            summed = x.detach().float().square().flatten(0, -2).sum(dim=0)
            squares[matrix] = squares[matrix] + summed if matrix in squares else summed

        handles = [
            self._decoder.holder(self.layer, matrix).register_forward_pre_hook(
                lambda _module, args, matrix=matrix: add(matrix, args[0])
            )
            for matrix in self._decoder.spec.mlp_matrices
        ]
        try:
            self.outputs()
        finally:
            for handle in handles:
                handle.remove()
        return {matrix: total.sqrt() for matrix, total in squares.items()}

    def pass_on(self, method: Method) -> None:
        """Let the blocks that follow see this block's output under ``method``, not the dense."""
        self.passes_on = method

    @cached_property
    def _dense(self) -> list[Tensor]:
        return self.outputs()

    def _call(self, states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        output = self._module(states, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def _pruned(self, method: Method | None) -> Iterator[None]:
        if method is None:
            yield
            return
        attachment = Attachment(self._decoder, method, layers=(self.layer,))
        attachment.attach()
        try:
            yield
        finally:
            attachment.detach()
