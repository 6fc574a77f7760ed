"""A model on the kernels for a token a row: made when it is sparsified, undone at its restoring."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from dipnet.errors import BackendError, InputError
from dipnet.kernels.gpu import MOST_SHARING
from dipnet.kernels.gpu.tiles import MOST_UNITS
from dipnet.methods.base import Method
from dipnet.models.decoding import loop, token
from dipnet.models.decoding.blocks import ACTIVATIONS, Block
from dipnet.models.decoding.counts import StepCounts
from dipnet.models.decoding.graph import LENGTHS, Replay
from dipnet.models.decoding.memory import free_text, ran_out
from dipnet.models.decoding.modules import LayerModules
from dipnet.models.decoding.packed import PackedLinear, PackedRows
from dipnet.models.decoding.sharing import MOST_ROWS
from dipnet.models.decoding.sites import Kept, SiteStep, keeps_above_threshold, keeps_fixed_number
from dipnet.models.families import Decoder
from dipnet.models.residual import Residual
from dipnet.models.tokens import TokenState
from dipnet.models.usage import Usage
from dipnet.units import Site, size_text

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
    """The steps of a model's layers, with the counts of what they keep.

    ``strict`` says that the kernels were asked for by name.
    """

    def __init__(
        self,
        decoder: Decoder,
        method: Method,
        tokens: TokenState,
        residual: Residual,
        usage: Usage,
        kept_inputs: int,
        strict: bool,
    ) -> None:
        self.decoder = decoder
        self.tokens = tokens
        self.residual = residual
        self.usage = usage
        self.kept_inputs = kept_inputs
        self.strict = strict
        self.stepping = False
        device, sites = decoder.model.device, usage.sites
        counted = [] if keeps_fixed_number(method) else list(sites)
        self.counts = StepCounts(tuple(sites.values()), counted, device)
        size = None if is_packed(decoder) else decoder.model.dtype.itemsize
        self.sites = {
            key: SiteStep(site, method, self.counts, device, size) for key, site in sites.items()
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
        rows, single = inputs.shape[0], inputs.shape[1] == 1
        fits = 1 <= rows <= MOST_ROWS
        self.stepping = pruned and single and fits and not torch.is_grad_enabled()
        if self.stepping:
            self.counts.begin(rows, None if tokens.counted is None else tokens.counted[:, 0])
        return self.stepping

    def predicted(self, step: SiteStep, x: Tensor) -> Kept:
        """What a predictor keeps, in a step through Hugging Face's code."""
        assert step.site.place is not None
        seen = self.residual.at(step.site.place)
        return step.decide(seen.reshape(-1, seen.shape[-1]).to(x.device))

    def begin_compiled(self, given: Mapping[str, Any]) -> bool:
        """`begin` while a compiler looks on: a step, if the decoder's call is of a token a row.

        ``given`` are the call's keyword arguments. Nothing is read of it that a later call could
        have otherwise, and what is written is constant or keeps its address.
        """
        inputs = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        if not torch.compiler.is_compiling() or inputs is None:
            return False
        tokens = self.tokens
        tokens.running, tokens.all_dense, tokens.dense, tokens.counted = True, False, None, None
        return self.begin(inputs)

    @torch.inference_mode(False)  # what it keeps could not be written outside of it
    def replay(self, length: int, rows: int = 1) -> Replay:
        """A cache for ``length`` tokens of each of ``rows`` sequences, and the step on it: those of
        before where they suffice."""
        held = self._replay
        if held is None or held.length < length or held.rows != rows:
            self._replay = held = None  # its memory first
            ring = max(1, min(self.kept_inputs, MOST_SHARING // rows))
            columns = self.columns(length, rows)
            made = Replay(self.decoder, self.blocks, self.counts, rows, columns, ring)
            self._replay = held = made
        return held

    def columns(self, length: int, rows: int) -> int:
        """Of the cache that is made for ``rows`` texts of ``length`` tokens: a few more."""
        return -(-length // LENGTHS) * LENGTHS

    def _replay_or_none(self, length: int, rows: int) -> Replay | None:
        """`replay`; where memory runs out, None, or InputError if the kernels were asked for."""
        try:
            return self.replay(length, rows)
        except (RuntimeError, BackendError) as error:  # what it holds is let go with it
            if not ran_out(error):
                raise
        self._replay = None
        torch.cuda.empty_cache()
        spec, model = self.decoder.spec, self.decoder.model
        keys = 2 * spec.layers * spec.matrices["k"][0] * rows * length * model.dtype.itemsize
        reason = (
            f"keys and values of {rows} x {length} tokens take {size_text(keys)}, and "
            f"{free_text(model.device)} is free on the GPU: generate less at a time, or free some"
        )
        if self.strict:
            raise InputError(reason)
        warnings.warn(f"Hugging Face's loop decodes: {reason}", stacklevel=5)
        return None

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
        """Continue (batch, n) tokens with our decode loop; None where it does not serve that."""
        stopping, config = stopping_criteria, generation_config
        if loop.why_not(input_ids, stopping, config, options):
            return None
        length = int(stopping.max_length)
        if self.why_no_loop(length):
            return None
        replay = self._replay_or_none(length, len(input_ids))
        if replay is None:
            return None
        call = loop.Call(logits_processor, stopping, config, options)
        return loop.decode(model, replay, input_ids, call)


def why_not(decoder: Decoder, method: Method, sites: Sequence[Site]) -> str | None:
    """Why a model cannot be decoded with these kernels, as the end of a sentence."""
    return (
        _why_not_method(method, sites) or _why_not_model(decoder) or _why_not_rows(decoder, sites)
    )


def is_packed(decoder: Decoder) -> bool:
    """Whether a model's linear layers are a store's columns."""
    return isinstance(decoder.holder(0, "down"), PackedLinear)


def _why_not_rows(decoder: Decoder, sites: Sequence[Site]) -> str | None:
    """Columns hold no rows of outputs, and records of neurons no columns of gate and up."""
    whole = is_packed(decoder) and isinstance(decoder.holder(0, "up").packed, PackedRows)
    for site in sites if is_packed(decoder) else ():
        if whole and site.name == "mlp.neuron" and site.scored_on == "residual":
            continue
        if site.scored_on not in ("input", "hidden"):
            return (
                f"needs rows of weights where {site.scored_on} decides {site.name}, and a packed "
                "model holds columns"
            )
        if whole and site.name == "mlp.in":
            return f"needs columns of weights at {site.name}, and this model holds whole neurons"
    return None


def _why_not_method(method: Method, sites: Sequence[Site]) -> str | None:
    if sites and not (keeps_fixed_number(method) or keeps_above_threshold(method)):
        return f"selects by top-k or thresholds, and {method.name} by a rule of its own"
    for site in sites:
        if site.units > MOST_UNITS:
            return f"selects among {MOST_UNITS} units, and {site.name} has {site.units}"
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
            plain = type(module) in (nn.Linear, PackedLinear) and "forward" not in vars(module)
            numbers = module.weight.dtype in (decoder.model.dtype, torch.uint8)
            if not (plain and numbers):
                return f"reads plain linear layers, and {path!r} of layer {layer} is none"
            if module.weight.device != decoder.model.device:
                return "needs the whole model on one device"
    return None
