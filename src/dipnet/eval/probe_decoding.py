"""What a token costs besides products and reads: random decoders that generate text tell.

They differ in one thing each, and generate as `dipnet run` does, so that everything is as cold, and
threads are as asleep, as they are between a model's operations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dipnet.eval.generate import Generation, generate
from dipnet.methods.dip import DIP
from dipnet.models.load import DEFAULT_MODEL, LoadedModel, load_tokenizer
from dipnet.pack.packing import pack
from dipnet.sim.device import Product, columns_cost
from dipnet.sim.walk import parts
from dipnet.store.geometry import Weights
from dipnet.store.index import Index, read_index
from dipnet.streaming.attach import natively_streamed
from dipnet.streaming.budget import CACHED
from dipnet.streaming.load import load
from dipnet.streaming.probe_reads import ReadCosts
from dipnet.streaming.probe_records import fitted


@dataclass(frozen=True)
class Sample:
    """A random decoder and a text to measure."""

    width: int
    neurons: int
    layers: int
    vocabulary: int
    prompt: int

    @property
    def terms(self) -> tuple[float, ...]:
        """How often a token pays for itself, a layer, a number, a logit and a key."""
        keys = self.layers * self.width // 2 * (self.prompt + NEW_TOKENS / 2)
        return 1.0, self.layers, self.units, self.vocabulary, keys

    @property
    def masks(self) -> int:
        """Of a token."""
        return 2 * self.layers

    @property
    def units(self) -> int:
        """Of all masks of a token: the numbers of its layers' activations."""
        return self.layers * (self.width + self.neurons)


SAMPLES = (
    Sample(256, 1024, 2, 8192, 16),
    Sample(256, 1024, 8, 8192, 16),
    Sample(1024, 4096, 2, 8192, 16),
    Sample(256, 1024, 2, 65536, 16),
    Sample(256, 1024, 8, 8192, 512),
)
"""The differences: layers, width, vocabulary, tokens that attention reads."""
NEW_TOKENS = 24
TRIES = 4
"""Of each text that is generated; one more before them warms up."""
KEPT = 0.5
HEAD_SIZE = 64
WEIGHTS: Weights = "int4"

Progress = Callable[[float], object]
"""Called with the share of the work that is done."""


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a token's steps, as `EngineCosts` has them."""

    token: float
    layer: float
    number: float
    logit: float
    key: float
    call: float
    selection: float
    unit: float
    exchange: float
    guess: float


@dataclass(frozen=True)
class _Timed:
    """A sample's token: seconds in all, of the model without waiting, for masks, of products.

    ``kernels`` by their group's name; it takes so many ``reads``, ``records`` and their ``bytes``,
    and products in ``parts`` more than one.
    """

    total: float
    working: float
    selection: float
    reads: float
    records: float
    bytes: float
    parts: float
    kernels: Mapping[str, float]

    def reading(self, costs: ReadCosts, call: float) -> float:
        """Seconds of the processor's work on reads, as far as it is known."""
        each = self.reads * (costs.submit + costs.land) + self.records * (costs.ask + costs.take)
        return each + self.bytes / costs.check + self.parts * call


def decoding_costs(
    folder: Path,
    products: Mapping[Weights, tuple[Product, ...]],
    reads: ReadCosts,
    progress: Progress,
) -> StepCosts:
    """Make the samples in a folder, let them generate, and divide what their tokens take."""
    made = [_made(folder / str(at), sample) for at, sample in enumerate(SAMPLES)]
    decoders = [_decoders(*each) for each in made]
    _generate_in_turn(decoders, progress)
    timed = [[decoder.timed() for decoder in each] for each in decoders]
    held = [memory for memory, *_ in timed]
    calls: list[float] = []
    for (_, store), memory in zip(made, held, strict=True):
        calls += _calls(read_index(store), memory, products[WEIGHTS])
    call = max(0.0, median(calls))
    exchanges: list[float] = []
    guesses: list[float] = []
    for sample, (memory, alone, ahead) in zip(SAMPLES, timed, strict=True):
        alone_more = alone.working - alone.reading(reads, call)
        exchanges.append((alone_more - memory.working) / sample.masks)
        ahead_more = ahead.working - ahead.reading(reads, call)
        guesses.append((ahead_more - alone_more - memory.selection) / sample.masks)
    others = [max(t.total - t.selection - sum(t.kernels.values()), 1e-9) for t in held]
    token, layer, number, logit, key = fitted([sample.terms for sample in SAMPLES], others)
    counts = [(sample.masks, sample.units) for sample in SAMPLES]
    selection, unit = fitted(counts, [t.selection for t in held])
    exchange, guess = (max(0.0, median(costs)) for costs in (exchanges, guesses))
    return StepCosts(token, layer, number, logit, key, call, selection, unit, exchange, guess)


def _made(folder: Path, sample: Sample) -> tuple[Sample, Path]:
    """A sample and its store."""
    pack(str(_checkpoint(folder / "model", sample)), folder / "store", WEIGHTS)
    return sample, folder / "store"


def _calls(index: Index, timed: _Timed, products: tuple[Product, ...]) -> Iterator[float]:
    """What a product of each group takes beyond its columns."""
    kept = {group.key: KEPT if group.name in CACHED else 1.0 for group in index.groups}
    working = sum(kept[group.key] * group.bytes for group in index.groups)
    column, byte = columns_cost(products, working)
    for name, seconds in timed.kernels.items():
        groups = [group for group in index.groups if group.name == name]
        columns = kept[groups[0].key] * groups[0].channels
        yield seconds / len(groups) - columns * (column + byte * groups[0].stride)


def _half(index: Index) -> int:
    """Bytes of half of the records that may be streamed."""
    return sum(group.bytes for group in index.groups if group.name in CACHED) // 2


class _Decoder:
    """A sample that generates, with everything in memory or a ``cache``, and what its tokens took.

    ``totals`` are seconds of whole tokens; ``calls`` the model's own, with all that `_spent` has.
    """

    def __init__(
        self, sample: Sample, store: Path, cache: int | None = None, *, look_ahead: bool = False
    ) -> None:
        method = DIP(input_density=KEPT, hidden_density=KEPT)
        context = sample.prompt + NEW_TOKENS
        model = load(store, method, cache=cache, context=context, look_ahead=look_ahead)
        natively_streamed(model).worth.always()
        self.loaded = LoadedModel("probe", model, load_tokenizer(DEFAULT_MODEL), WEIGHTS)
        self.prompt = torch.arange(3, 3 + sample.prompt)[None]
        groups = read_index(store).groups
        self.names: list[str] = list(dict.fromkeys(group.name for group in groups))
        self.whole = cache is None
        self.totals: list[float] = []
        self.calls: list[NDArray[np.float64]] = []

    def generate(self) -> None:
        """Make texts, and keep what their tokens took; only whole models are asked for totals."""
        if self.whole:
            self.totals += self._text().token_seconds
        with _watched(self.loaded.model, self.names) as calls:
            self._text()
        self.calls += calls[1:]  # the first is the prompt's

    def forget(self) -> None:
        """What was made so far only warmed up."""
        self.totals, self.calls = [], []

    def timed(self) -> _Timed:
        """The medians of all tokens."""
        seconds, wait, *rest = np.array(self.calls).T
        selection, reads, records, size, more, *kernels = (float(np.median(r)) for r in rest)
        by_name = dict(zip(self.names, kernels, strict=True))
        working = float(np.median(seconds - wait))
        total = median(self.totals or [0.0])
        return _Timed(total, working, selection, reads, records, size, more, by_name)

    def _text(self) -> Generation:
        return generate(self.loaded, self.prompt, max_new_tokens=NEW_TOKENS)


def _decoders(sample: Sample, store: Path) -> list[_Decoder]:
    """With everything in memory, with a cache, and with one that is filled ahead."""
    cache = _half(read_index(store))
    alone, ahead = (_Decoder(sample, store, cache, look_ahead=on) for on in (False, True))
    return [_Decoder(sample, store), alone, ahead]


def _generate_in_turn(decoders: list[list[_Decoder]], progress: Progress) -> None:
    """Let all generate, one after the other in every round: a machine's speed changes with time."""
    every = [decoder for each in decoders for decoder in each]
    for number in range(1 + TRIES):
        for at, decoder in enumerate(every):
            progress((number + at / len(every)) / (1 + TRIES))
            if number == 1:
                decoder.forget()
            decoder.generate()


@contextmanager
def _watched(model: PreTrainedModel, names: list[str]) -> Iterator[list[NDArray[np.float64]]]:
    """What each call inside the block takes: seconds, and all that `_spent` has."""
    took: list[NDArray[np.float64]] = []

    def begin(*_: Any) -> None:
        spent = _spent(model, names)
        took.append(-np.array([time.perf_counter(), *spent]))

    def end(*_: Any) -> None:
        now = time.perf_counter()
        took[-1] += [now, *_spent(model, names)]

    hooks = model.register_forward_pre_hook(begin), model.register_forward_hook(end)
    try:
        yield took
    finally:
        for hook in hooks:
            hook.remove()


def _spent(model: PreTrainedModel, names: list[str]) -> list[float]:
    """So far: seconds of waiting and for masks; reads, records, bytes, parts; kernels by name."""
    attached = natively_streamed(model)
    kernels = dict.fromkeys(names, 0.0)
    wait = records = size = made = 0.0
    for (_, name), group in attached.groups.items():
        totals = attached.engine.totals(group.key)
        kernels[name] += totals["kernels"]
        wait += totals["wait"]
        records += totals["read"] + totals["guessed"]
        size += (totals["read"] + totals["guessed"]) * group.group.record_bytes
        if not group.held:
            made += float(parts(totals["hits"], totals["misses"]))
    reads = attached.engine.reader_totals()["reads"]
    return [wait, attached.seconds.selection, reads, records, size, made, *kernels.values()]


def _checkpoint(folder: Path, sample: Sample) -> Path:
    """A random decoder, whose text never ends by itself."""
    config = LlamaConfig(
        hidden_size=sample.width,
        intermediate_size=sample.neurons,
        num_hidden_layers=sample.layers,
        num_attention_heads=sample.width // HEAD_SIZE,
        num_key_value_heads=sample.width // HEAD_SIZE // 2,
        head_dim=HEAD_SIZE,
        vocab_size=sample.vocabulary,
        max_position_embeddings=2 * (max(s.prompt for s in SAMPLES) + NEW_TOKENS),
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    return folder
