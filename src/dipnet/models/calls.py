"""The hooks that tell tokens and counts where a forward call begins and ends."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dipnet.models.decoding import Decoding
from dipnet.models.tokens import TokenState
from dipnet.models.usage import Usage


class Calls:
    """Watches the forward calls of a model's decoder."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: TokenState,
        usage: Usage,
        decoding: Decoding | None = None,
    ) -> None:
        self.decoder = model.get_decoder()
        self.tokens = tokens
        self.usage = usage
        self.decoding = decoding
        self._signature = inspect.signature(type(self.decoder).forward)

    def watch(self) -> list[Callable[[], None]]:
        """Hook the decoder; returns what undoes it."""
        begin = self.decoder.register_forward_pre_hook(self.begin, with_kwargs=True)
        end = self.decoder.register_forward_hook(self.end, always_call=True)
        return [begin.remove, end.remove]

    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Torch's forward pre-hook: a call over some tokens begins."""
        if self.decoding is not None and self.decoding.begin_compiled(kwargs):
            return
        given = self._signature.bind_partial(module, *args, **kwargs).arguments
        inputs = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:  # the decoder itself says what is missing
            return
        past = given.get("past_key_values")
        self.tokens.begin(inputs, given.get("attention_mask"), past)
        if self.usage.recorder is not None:
            self.usage.recorder.begin(self.tokens.counted, inputs.shape[:2], past)
        if self.decoding is None or not self.decoding.begin(inputs):
            self.usage.count_tokens(self.tokens.sparse_tokens(inputs))

    def end(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Torch's forward hook: the call has ended; by an error where there is no output."""
        self.tokens.running = False
        if self.decoding is not None:
            self.decoding.stepping = False
        if self.usage.recorder is not None:
            self.usage.recorder.end(complete=output is not None)
