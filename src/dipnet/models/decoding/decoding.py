"""A model on the kernels for one token: made when it is sparsified, undone when it is restored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from dipnet.methods.base import Method
from dipnet.models.decoding import loop, token
from dipnet.models.decoding.blocks import ACTIVATIONS, Block
from dipnet.models.decoding.counts import StepCounts
from dipnet.models.decoding.graph import LENGTHS, Replay
from dipnet.models.decoding.modules import LayerModules
from dipnet.models.decoding.sites import Kept, SiteStep, keeps_above_threshold, keeps_fixed_number
from dipnet.models.families import Decoder
from dipnet.models.residual import Residual
from dipnet.models.tokens import TokenState
from dipnet.models.usage import Usage
from dipnet.units import Site

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SCORED = {
    "attn.in": ("input",),
    "attn.out": ("input",),
    "mlp.in": ("input",),
    "mlp.hidden": ("hidden", "gate", "up"),
    "mlp.neuron": ("residual",),
    "attn.head": ("residual",),
}
"""The sites that are served, and what may decide them."""


class Decoding:
    """The steps of a model's layers, with the counts of what they keep."""

    def __init__(
        self,
        decoder: Decoder,
        method: Method,
        tokens: TokenState,
        residual: Residual,
        usage: Usage,
        kept_inputs: int,
    ) -> None:
        self.decoder = decoder
        self.tokens = tokens
        self.residual = residual
        self.usage = usage
        self.kept_inputs = kept_inputs
        self.stepping = False
        device, sites = decoder.model.device, usage.sites
        counted = [] if keeps_fixed_number(method) else list(sites)
        self.counts = StepCounts(tuple(sites.values()), counted, device)
        self.sites = {
            key: SiteStep(site, method, self.counts, device) for key, site in sites.items()
        }
        self.blocks: list[Block] = []
        self._replay: Replay | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: its graph it captures itself."""
        return {**vars(self), "_replay": None}

    def attach(self, undo: list[Callable[[], None]]) -> None:
        """Put the weights where the products want them, and the products in the model.

        What undoes a change is in ``undo`` as soon as it is made: memory may run out.
        """
        undo.append(self._forget)
        self.usage.steps = self.counts
        for layer in range(self.decoder.spec.layers):
            sites = {name: step for (at, name), step in self.sites.items() if at == layer}
            block = Block(self.decoder, layer, sites, undo)
            self.blocks.append(block)
            undo += LayerModules(self, self.decoder, layer, block).attach()

    def _forget(self) -> None:
        self._replay = None
        self.blocks.clear()
        self.usage.steps = None

    def begin(self, inputs: Tensor) -> bool:
        """Whether the forward call over (batch, tokens, ...) ``inputs`` that begins is a step."""
        tokens = self.tokens
        pruned = not tokens.all_dense and tokens.dense is None
        single = tuple(inputs.shape[:2]) == (1, 1)
        self.stepping = pruned and single and not torch.is_grad_enabled()
        if self.stepping:
            self.counts.tokens.add_(1)
        return self.stepping

    def predicted(self, step: SiteStep, x: Tensor) -> Kept:
        """What a predictor keeps, in a step through Hugging Face's code."""
        assert step.site.place is not None
        return step.decide(self.residual.at(step.site.place).reshape(1, -1).to(x.device))

    def begin_compiled(self, given: Mapping[str, Any]) -> bool:
        """`begin` while a compiler looks on: a step, if the call of the decoder is of one token.

        ``given`` are the call's keyword arguments. Nothing is read of it that a later call could
        have otherwise, and what is written is constant or keeps its address.
        """
        inputs = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        if not torch.compiler.is_compiling() or inputs is None:
            return False
        self.tokens.running, self.tokens.all_dense, self.tokens.dense = True, False, None
        return self.begin(inputs)

    def replay(self, length: int) -> Replay:
        """A cache for ``length`` tokens and the step on it: those of before where they suffice."""
        if self._replay is None or self._replay.length < length:
            self._replay = None  # its memory first
            rounded = -(-length // LENGTHS) * LENGTHS
            self._replay = Replay(self.decoder, self.blocks, self.counts, rounded, self.kept_inputs)
        return self._replay

    def why_no_loop(self, length: int) -> str | None:
        """Why our decode loop does not serve a text of ``length`` tokens; None when it does."""
        if not self._prefill_ends_with_prompt():
            return "prunes every token after the prompt"
        return token.why_not(self.decoder, -(-length // LENGTHS) * LENGTHS)

    def _prefill_ends_with_prompt(self) -> bool:
        return self.tokens.prefill in ("sparse", "dense") and self.usage.recorder is None

    def sample(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **options: Any,
    ) -> Tensor | None:
        """Continue (1, n) tokens with our decode loop; None where it does not serve the call."""
        stopping, config = stopping_criteria, generation_config
        if loop.why_not(input_ids, stopping, config, options):
            return None
        length = int(stopping.max_length)
        if self.why_no_loop(length):
            return None
        streamer = options.get("streamer")
        made: Tensor = loop.decode(
            model, self.replay(length), input_ids, logits_processor, stopping, config, streamer
        )
        return made


def why_not(decoder: Decoder, method: Method, sites: Sequence[Site]) -> str | None:
    """Why a model cannot be decoded with these kernels, as the end of a sentence."""
    return _why_not_method(method, sites) or _why_not_model(decoder)


def _why_not_method(method: Method, sites: Sequence[Site]) -> str | None:
    if sites and not (keeps_fixed_number(method) or keeps_above_threshold(method)):
        return f"selects by top-k or thresholds, and {method.name} by a rule of its own"
    for site in sites:
        if site.scored_on not in SCORED.get(site.name, ()):
            return f"does not skip units of {site.name} that {site.scored_on} decides"
        if site.name not in ("mlp.hidden", "attn.head") and site.block > 1:
            return f"skips single units of {site.name}, not blocks of {site.block}"
    return None


def _why_not_model(decoder: Decoder) -> str | None:
    spec = decoder.spec
    if spec.activation not in ACTIVATIONS:
        return f"has no activation {spec.activation!r}"
    if decoder.model.dtype not in DTYPES:
        return f"takes float16, bfloat16 and float32, not {decoder.model.dtype}"
    for layer in range(spec.layers):
        for path in decoder.family.modules:
            module = decoder.module(layer, path)
            plain = type(module) is nn.Linear and "forward" not in vars(module)
            if not plain or module.weight.dtype != decoder.model.dtype:
                return f"reads plain linear layers, and {path!r} of layer {layer} is none"
            if module.weight.device != decoder.model.device:
                return "needs the whole model on one device"
    return None
