"""Puts a store's records in the place of a model's linear layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial, wraps
from threading import RLock
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from dipnet.errors import InputError
from dipnet.methods.base import Method
from dipnet.models.attach import ATTACHED
from dipnet.models.caching import CacheState, SiteCache
from dipnet.models.calls import Calls
from dipnet.models.families import Decoder
from dipnet.models.residual import Residual
from dipnet.models.tokens import Prefill, TokenState
from dipnet.models.usage import Usage
from dipnet.store.index import Group
from dipnet.streaming.engine import Engine, Key
from dipnet.streaming.linear import (
    EngineCache,
    GroupProduct,
    HeadMasks,
    Masks,
    RecordGroup,
    RecordLinear,
    Seconds,
)
from dipnet.streaming.look_ahead import LookAhead
from dipnet.streaming.methods import ON_HEADS
from dipnet.streaming.neurons import NeuronColumns, NeuronGroup
from dipnet.streaming.stats import Counting, Recorder
from dipnet.streaming.worth import Worth


class Loaded:
    """What `load` attached to a model: records in the place of its linear layers."""

    decoder: Decoder
    method: Method
    usage: Usage
    recorder: Counting
    groups: Mapping[Key, GroupProduct]

    def detach(self) -> None:
        """Undo is impossible: there are no dense weights to go back to."""
        raise InputError("a streamed model has no dense weights to restore: load it again")

    def replace_layers(self) -> None:
        """Replace the linear layers of the decoder."""
        for layer in range(self.decoder.spec.layers):
            for path, held in self.decoder.family.modules.items():
                self._replace_linear(layer, path, held)

    def replace_head(self) -> None:
        """Replace the linear layer behind the decoder."""
        model = self.decoder.model
        old = model.get_output_embeddings()
        group = self.groups[None, "head"]
        bias = getattr(old, "bias", None)
        linear = RecordLinear(
            group, slice(0, group.group.rows), 1, None if bias is None else bias.data
        )
        name = next(name for name, module in model.named_modules() if module is old)
        model.set_submodule(name, linear)

    def _group(self, layer: int, matrix: str) -> GroupProduct:
        return next(
            group
            for (at, _), group in self.groups.items()
            if at == layer and matrix in group.group.matrices
        )

    def _replace_linear(self, layer: int, path: str, held: tuple[str, ...]) -> None:
        group = self._group(layer, held[0])
        old = self.decoder.module(layer, path)
        bias = None if old.bias is None else old.bias.data
        if isinstance(group, NeuronGroup) and held == ("down",):
            self.decoder.layers[layer].set_submodule(path, NeuronColumns(group, bias))
            return
        slices = [group.group.output_rows(matrix) for matrix in held]
        rows = slice(slices[0].start, slices[-1].stop)
        takers = (group.group.input_rows or len(group.group.matrices)) // len(held)
        self.decoder.layers[layer].set_submodule(path, RecordLinear(group, rows, takers, bias))


class Streamed(Loaded):
    """One method on one streamed model; what `usage` and `stats` read."""

    groups: dict[Key, RecordGroup]
    recorder: Recorder

    def __init__(
        self,
        decoder: Decoder,
        engine: Engine,
        method: Method,
        prefill: Prefill,
        *,
        look_ahead: bool,
    ) -> None:
        self.decoder = decoder
        self.engine = engine
        self.method = method
        self.usage = Usage(method, decoder.spec)
        sites = self.usage.sites.values()
        by_position = any(site.scored_on == "position" for site in sites)
        self.tokens = TokenState(prefill, positions=by_position)
        self.residual = Residual.of_sites(decoder, sites, self.tokens)
        self.seconds = Seconds()
        self.worth = Worth()
        self.recorder = Recorder(engine, self.seconds, self.worth)
        self.groups = {group.key: self._record_group(group) for group in engine.index.groups}
        self._looks_ahead = look_ahead
        self._turn = RLock()

    def attach(self) -> None:
        """Replace the linear layers, and watch the calls."""
        self.replace_layers()
        self.residual.watch()
        for layer in range(self.decoder.spec.layers if self._looks_ahead else 0):
            self._look_ahead(layer)
        self.replace_head()
        model = self.decoder.model
        setattr(model, ATTACHED, self)
        self.recorder.watch(model)
        Calls(model, self.tokens, self.usage).watch()
        for module in (model, model.get_decoder()):
            module.forward = _alone(module.forward, self._turn)

    def caching(self) -> CacheState | None:
        """The caches of the sites; None when all records are held, and no mask depends on them."""
        groups = [self.groups[key] for key in self.usage.sites if key in self.groups]
        streaming = [group for group in groups if not group.held]
        if not streaming:
            return None
        units = {key: site.units for key, site in self.usage.sites.items()}
        slots = {key: self.engine.slots.get(key, held) for key, held in units.items()}
        warm = any(self.engine.resident(group.key).any() for group in streaming)
        return CacheState(self.engine.policy, slots, warm)

    def guesses(self) -> Mapping[str, tuple[int, int]]:
        """Records read ahead so far, and those of them that were wanted, by the site's name."""
        sites = self.recorder.stats().sites
        wanted = {name for _, name in self.usage.sites if name in sites}
        return {name: (sites[name].guessed, sites[name].useful) for name in wanted}

    def _record_group(self, group: Group) -> RecordGroup:
        made = NeuronGroup if group.input_rows else RecordGroup
        return made(self.engine, group, self.tokens, self._masks(group.key))

    def _masks(self, key: Key) -> Masks | None:
        layer, name = key
        heads = self.usage.sites.get(cast(Any, (layer, ON_HEADS)))
        if name == "attn.out" and heads is not None:
            return HeadMasks(heads, self.method, self.usage, None, self.seconds, self.residual)
        site = self.usage.sites.get(cast(Any, key))
        if site is None:
            return None
        cache = SiteCache(site, self.method, EngineCache(self.engine, key))
        return Masks(site, self.method, self.usage, cache, self.seconds, self.residual)

    def _look_ahead(self, layer: int) -> None:
        """Guess the MLP's masks: the input's before attention, the neurons' from what is there."""
        if (layer, "mlp.neuron") in self.groups:
            self._look_ahead_of_neurons(layer)
            return
        reads, hidden = self.groups[layer, "mlp.in"], self.groups[layer, "mlp.hidden"]
        if not hidden.held:
            # bf16 multiplies nothing before all is there: there is nothing to guess from.
            guesses = self.engine.index.weights != "bf16"
            early = partial(self._early_hidden, layer) if guesses else None
            reads.look_ahead = LookAhead(hidden, early, self.seconds, self.worth)
        if not reads.held:
            ahead = LookAhead(reads, None, self.seconds, self.worth)
            norm = self.decoder.module(layer, self.decoder.family.mlp_norm)
            self._before_attention(layer, ahead, norm)
            if layer and reads.masks is None:
                self.groups[layer - 1, "mlp.hidden"].look_ahead = ahead

    def _look_ahead_of_neurons(self, layer: int) -> None:
        """Ask for predicted neurons where their predictor reads; without a mask, for all."""
        group = cast(NeuronGroup, self.groups[layer, "mlp.neuron"])
        if group.held:
            return
        if group.masks is None:
            ahead = LookAhead(group, None, self.seconds, self.worth)
            self._before_attention(layer, ahead, nn.Identity())
            if layer:
                self.groups[layer - 1, "mlp.neuron"].look_ahead = ahead
        elif group.masks.site.place is not None:  # after the hook that keeps what is seen there
            module = self.decoder.residual_module(group.masks.site.place)
            module.register_forward_pre_hook(group.decide_early)

    def _before_attention(self, layer: int, ahead: LookAhead, norm: nn.Module) -> None:
        self.decoder.layers[layer].register_forward_pre_hook(
            partial(_before_attention, ahead, norm), with_kwargs=True
        )

    def _early_hidden(self, layer: int) -> Tensor:
        """(1, neurons): the MLP's hidden activation from the records multiplied so far."""
        group = self.groups[layer, "mlp.in"]
        made = self.engine.partial(group.key)
        parts = {name: self._with_bias(layer, name, made) for name in group.group.matrices}
        act: Callable[[Tensor], Tensor] = ACT2FN[self.decoder.spec.activation]
        return act(parts["gate"]) * parts["up"] if "gate" in parts else act(parts["up"])

    def _with_bias(self, layer: int, matrix: str, made: Tensor) -> Tensor:
        rows = made[:, self.groups[layer, "mlp.in"].group.output_rows(matrix)]
        holder = self.decoder.holder(layer, matrix)
        return rows if holder.bias is None else rows + holder.bias[self.decoder.rows(matrix)]


def is_streamed(model: PreTrainedModel) -> bool:
    """Whether a model's records come and go: `streamed` knows it."""
    return isinstance(getattr(model, ATTACHED, None), Loaded)


def streamed(model: PreTrainedModel) -> Loaded:
    """What `load` attached to a model; InputError when it was not made by `load`."""
    attached = getattr(model, ATTACHED, None)
    if not isinstance(attached, Loaded):
        raise InputError("the model is not streamed: make one with dipnet.load(store, method)")
    return attached


def natively_streamed(model: PreTrainedModel) -> Streamed:
    """`streamed` of a model whose records the native engine reads; InputError on a GPU."""
    attached = streamed(model)
    if not isinstance(attached, Streamed):
        raise InputError("the model is on a GPU: load it with device='cpu' for this")
    return attached


def _before_attention(
    ahead: LookAhead, norm: nn.Module, _layer: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> None:
    x = args[0] if args else kwargs["hidden_states"]
    if x.shape[:-1].numel() == 1:
        ahead.with_input(lambda: norm(x.reshape(1, -1)))


def _alone(forward: Callable[..., Any], turn: AbstractContextManager[Any]) -> Callable[..., Any]:
    """A forward function that waits for its turn, and during which torch has one thread.

    There is one engine and one state of the running call: two of the caller's threads would mix
    theirs. A token's operations outside our kernels are too small to share, and torch's threads
    would spin on the cores that our own threads need. Hooks would not do: after Ctrl-C torch does
    not call them.
    """

    @wraps(forward)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with turn:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return forward(*args, **kwargs)
            finally:
                torch.set_num_threads(threads)

    return alone
