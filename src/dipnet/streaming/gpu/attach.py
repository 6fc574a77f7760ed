"""Records on a GPU in the place of a model's linear layers, and our decode loop before them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import wraps
from threading import RLock
from typing import Any, cast

from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from dipnet.methods.base import Method
from dipnet.models.attach import ATTACHED, sample
from dipnet.models.caching import CacheState
from dipnet.models.calls import Calls
from dipnet.models.decoding import Decoding
from dipnet.models.decoding.blocks import ACTIVATIONS, Block
from dipnet.models.decoding.graph import Replay
from dipnet.models.families import Decoder
from dipnet.models.residual import Residual
from dipnet.models.tokens import Prefill, TokenState
from dipnet.streaming.attach import Loaded
from dipnet.streaming.engine import Key
from dipnet.streaming.gpu.blocks import StoredBlock
from dipnet.streaming.gpu.budget import key_tokens
from dipnet.streaming.gpu.groups import CachedGroup, DeviceGroup, Running
from dipnet.streaming.gpu.usage import DeviceRecorder, DeviceUsage
from dipnet.streaming.keys import check_room


def in_turn(forward: Callable[..., Any], turn: AbstractContextManager[Any]) -> Callable[..., Any]:
    """A forward function that waits for its turn."""

    @wraps(forward)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with turn:
            return forward(*args, **kwargs)

    return alone


class StoredDecoding(Decoding):
    """Our decode loop, on blocks whose products are of records.

    Keys and values are for ``context`` tokens, and where memory is ``limited`` for no more. A text
    has the model to itself (``turn``): its caches, its counts and its graph's state are there once.
    """

    recorder: DeviceRecorder

    def __init__(
        self,
        decoder: Decoder,
        method: Method,
        tokens: TokenState,
        usage: DeviceUsage,
        *,
        context: int,
        limited: bool,
    ) -> None:
        residual = Residual.of_sites(decoder, (), tokens)
        super().__init__(decoder, method, tokens, residual, usage, kept_inputs=1, strict=True)
        self.context = context
        self.limited = limited
        self.turn = RLock()

    def build(self, groups: Mapping[Key, DeviceGroup]) -> None:
        """Make the blocks, for families that the loop knows."""
        if self.decoder.spec.activation not in ACTIVATIONS:
            return
        for layer in range(self.decoder.spec.layers):
            names = ("attn.in", "attn.out", "mlp.in", "mlp.hidden")
            block = StoredBlock(self.decoder, [groups[layer, name] for name in names])
            self.blocks.append(cast(Block, block))  # it has all that a step asks of one

    def begin(self, inputs: Tensor) -> bool:
        """Whether the forward call over (batch, tokens, ...) ``inputs`` decodes tokens."""
        if self.limited and not self.recorder.in_loop:
            self._replay = None  # Hugging Face's own cache takes the memory of ours
        if self.tokens.all_dense:
            self.recorder.prompt()
            return False
        counted = self.tokens.sparse_tokens(inputs)
        number = counted if isinstance(counted, int) else counted.sum()
        self.counts.tokens[:1].add_(number)
        return True

    def replay(self, length: int, rows: int = 1) -> Replay:
        """The step for texts of ``length`` tokens: of the longest that memory is kept for."""
        return super().replay(max(length, self.context // rows), rows)

    def columns(self, length: int, rows: int) -> int:
        """Of a cache: in limited memory no more than it was divided for, in all rows together."""
        rounded = super().columns(length, rows)
        return min(rounded, key_tokens(self.context) // rows) if self.limited else rounded

    def why_no_loop(self, length: int) -> str | None:
        """Why our decode loop does not serve a text of ``length`` tokens; None when it does."""
        if not self.blocks:
            return f"has no activation {self.decoder.spec.activation!r}"
        return super().why_no_loop(length)

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
        longest = stopping_criteria.max_length
        if self.limited and longest is not None:
            check_room(self.context, len(input_ids), longest)
        with self.turn, self.recorder.loop():
            return super().sample(
                model,
                input_ids,
                logits_processor,
                stopping_criteria,
                generation_config,
                **options,
            )


class OnDevice(Loaded):
    """One method on one model whose records a GPU caches."""

    usage: DeviceUsage
    recorder: DeviceRecorder
    groups: dict[Key, DeviceGroup]

    def __init__(
        self,
        decoder: Decoder,
        method: Method,
        prefill: Prefill,
        policy: str,
        *,
        context: int,
        limited: bool,
    ) -> None:
        self.decoder = decoder
        self.method = method
        self.policy = policy
        self.usage = DeviceUsage(method, decoder.spec)
        self.tokens = TokenState(prefill)
        given = decoder, method, self.tokens, self.usage
        self.decoding = StoredDecoding(*given, context=context, limited=limited)
        self.usage.steps = self.decoding.counts
        self.running = Running(self.tokens, self.usage, self.decoding.counts)

    def attach(self, groups: dict[Key, DeviceGroup]) -> None:
        """Replace the linear layers by ``groups``, and watch the calls."""
        self.groups = self.usage.groups = groups
        self.decoding.build(groups)
        self.recorder = self.decoding.recorder = DeviceRecorder(groups, self.usage)
        self.replace_layers()
        self.replace_head()
        model = self.decoder.model
        setattr(model, ATTACHED, self)
        self.recorder.watch(model)
        Calls(model, self.tokens, self.usage, self.decoding).watch()
        kind = type(model)
        named = {"_sample": sample, "__doc__": kind.__doc__, "__module__": kind.__module__}
        model.__class__ = type(kind.__name__, (kind,), named)
        for module in (model, model.get_decoder()):
            module.forward = in_turn(module.forward, self.decoding.turn)

    def caching(self) -> CacheState | None:
        """The caches of the sites; None when all records are there, and no mask depends on them."""
        cached = {k: g.cache for k, g in self.groups.items() if isinstance(g, CachedGroup)}
        if not cached.keys() & self.usage.sites.keys():
            return None
        slots = {key: site.units for key, site in self.usage.sites.items()}
        slots |= {key: cached[key].slots for key in slots if key in cached}
        warm = any(int(cache.clock[0]) > 0 for cache in cached.values())
        return CacheState(self.policy, slots, warm)

    def guesses(self) -> Mapping[str, tuple[int, int]]:
        """Records read ahead, and those of them that were wanted, by site: there are none."""
        return {}
