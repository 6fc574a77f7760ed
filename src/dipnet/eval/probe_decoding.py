"""What a token costs besides products and reads: random decoders that generate text tell.

They differ in one thing each, and generate as `dipnet run` does, so that everything is as cold, and
threads are as asleep, as they are between a model's operations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dipnet.eval.generate import Generation, generate
from dipnet.methods.dense import Dense
from dipnet.methods.dip import DIP
from dipnet.models.load import DEFAULT_MODEL, LoadedModel, load_tokenizer
from dipnet.pack.packing import pack
from dipnet.sim.device import PerUnit, Product, columns_cost
from dipnet.sim.walk import late, parts
from dipnet.store.geometry import Weights
from dipnet.store.index import Index, read_index
from dipnet.streaming.attach import natively_streamed
from dipnet.streaming.budget import CACHED
from dipnet.streaming.engine import default_threads
from dipnet.streaming.load import load
from dipnet.streaming.probe_reads import ReadCosts
from dipnet.streaming.probe_records import fitted


@dataclass(frozen=True)
class Sample:
    """A random decoder and a text to measure; ``streamed``: with masks and with caches, too."""

    width: int
    neurons: int
    layers: int
    vocabulary: int
    prompt: int
    streamed: bool = False

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
    Sample(256, 1024, 8, 8192, 16, streamed=True),
    Sample(512, 2048, 8, 8192, 16, streamed=True),
    Sample(256, 1024, 2, 65536, 16),
    Sample(256, 1024, 8, 8192, 512),
)
"""The differences: layers, width, vocabulary, tokens that attention reads.

Those of eight layers cost more than four times those of two: caches are colder.
"""
NEW_TOKENS = 12
LONGEST_WAKE = 3e-4
"""Seconds; more is no waking: products are slower as a whole."""
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
    threads: int
    wake: float
    selection: PerUnit
    exchange: PerUnit
    streaming: PerUnit
    guess: PerUnit


@dataclass(frozen=True)
class _Timed:
    """A sample's token: seconds in all, of the model without waiting, of products.

    ``kernels`` by their group's name; it takes so many ``reads``, ``records`` and their ``bytes``,
    and products in ``parts`` more than one.
    """

    total: float
    working: float
    reads: float
    records: float
    bytes: float
    parts: float
    kernels: Mapping[str, float]

    @property
    def besides_products(self) -> float:
        """``total`` without the kernels."""
        return self.total - sum(self.kernels.values())

    def working_besides(self, costs: ReadCosts, call: float) -> float:
        """``working`` without what reads are known to take of it."""
        each = self.reads * (costs.submit + costs.land) + self.records * (costs.ask + costs.take)
        return self.working - each - self.bytes / costs.check - self.parts * call


def decoding_costs(
    folder: Path,
    products: Mapping[Weights, tuple[Product, ...]],
    reads: ReadCosts,
    progress: Progress,
) -> tuple[StepCosts, float]:
    """Make the samples in a folder, let them generate, and divide what their tokens take.

    Also how many times as long as ``products`` say theirs took: a machine's speed changes, and
    decoders are measured longer.
    """
    decoders = [_decoders(*_made(folder / str(at), sample)) for at, sample in enumerate(SAMPLES)]
    _generate_in_turn([decoder for each in decoders for decoder in each.values()], progress)
    timed = [{name: d.timed() for name, d in each.items()} for each in decoders]
    pairs = [
        pair
        for each, found in zip(decoders, timed, strict=True)
        for name in ("dense", "memory")
        if name in each
        for pair in each[name].products(found[name], products[WEIGHTS])
    ]
    threads = default_threads()
    wake, call, factor = between_operations(pairs, threads)
    others = [max(found["dense"].besides_products, 1e-9) for found in timed]
    token, layer, number, logit, key = fitted([sample.terms for sample in SAMPLES], others)
    streamed = [each for each in zip(SAMPLES, timed, strict=True) if each[0].streamed]
    more = [_more(found, reads, call) for _, found in streamed]
    each = (
        _per_unit([sample for sample, _ in streamed], seconds)
        for seconds in zip(*more, strict=True)
    )
    costs = StepCosts(token, layer, number, logit, key, call, threads, wake, *each)
    return costs, factor


def _more(
    found: Mapping[str, _Timed], reads: ReadCosts, call: float
) -> tuple[float, float, float, float]:
    """Seconds of a token that masks take, and what exchange, streaming and guesses take more."""
    besides = {name: timed.working_besides(reads, call) for name, timed in found.items()}
    masks = found["memory"].besides_products - found["dense"].besides_products
    exchange = besides["alone"] - besides["memory"]
    streaming = besides["dense alone"] - besides["dense"]
    return masks, exchange, streaming, besides["ahead"] - besides["alone"] - masks


def _per_unit(samples: Sequence[Sample], seconds: Sequence[float]) -> PerUnit:
    """What the seconds of a token are, for each mask and each of its units."""
    counts = [(sample.masks, sample.units) for sample in samples]
    mask, unit = fitted(counts, [max(s, 1e-9) for s in seconds])
    return mask, unit


def between_operations(
    pairs: Sequence[tuple[float, float]], threads: int
) -> tuple[float, float, float]:
    """What products in decoders take more than in a loop, of seconds (in a loop, in a decoder).

    Seconds until sleeping threads ``wake``, and of each ``call``; both besides a factor. Found by
    trying: the least sum of absolute logarithms of the ratios.
    """
    loop, real = np.array(pairs).T
    best = (np.inf, 0.0, 0.0, 1.0)
    for factor in np.geomspace(0.5, 2, 57).tolist():
        work = factor * loop
        share = 1 - 1 / threads
        wakes = np.clip((real - work) / share, 0, LONGEST_WAKE) if share else np.zeros(1)
        for wake in {0.0, *wakes.tolist()}:
            known = work + late(work, wake, threads)
            call = max(0.0, float(np.median(real - known)))
            error = float(np.abs(np.log((known + call) / real)).sum())
            best = min(best, (error, wake, call, factor))
    return best[1:]


def _made(folder: Path, sample: Sample) -> tuple[Sample, Path]:
    """A sample and its store."""
    pack(str(_checkpoint(folder / "model", sample)), folder / "store", WEIGHTS)
    return sample, folder / "store"


def _half(index: Index) -> int:
    """Bytes of half of the records that may be streamed."""
    return sum(group.bytes for group in index.groups if group.name in CACHED) // 2


class _Decoder:
    """A sample that generates, with everything in memory or a ``cache``, and what its tokens took.

    ``totals`` are seconds of whole tokens; ``calls`` the model's own, with all that `_spent` has.
    """

    def __init__(
        self,
        sample: Sample,
        store: Path,
        cache: int | None = None,
        *,
        kept: float = KEPT,
        look_ahead: bool = False,
    ) -> None:
        method = DIP(input_density=kept, hidden_density=kept) if kept < 1 else Dense()
        context = sample.prompt + NEW_TOKENS
        model = load(store, method, cache=cache, context=context, look_ahead=look_ahead)
        natively_streamed(model).worth.always()
        self.loaded = LoadedModel("probe", model, load_tokenizer(DEFAULT_MODEL), WEIGHTS)
        self.prompt = torch.arange(3, 3 + sample.prompt)[None]
        self.index = read_index(store)
        self.kept = kept
        self.names: list[str] = list(dict.fromkeys(group.name for group in self.index.groups))
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
        """The means of all tokens: what a text takes is their sum."""
        seconds, wait, *rest = np.array(self.calls).mean(axis=0).tolist()
        reads, records, size, more, *kernels = rest
        by_name = dict(zip(self.names, kernels, strict=True))
        total = mean(self.totals or [0.0])
        return _Timed(total, seconds - wait, reads, records, size, more, by_name)

    def products(
        self, timed: _Timed, products: tuple[Product, ...]
    ) -> Iterator[tuple[float, float]]:
        """Seconds of a product of each group: those of its columns in a loop, and here."""
        kept = {g.key: self.kept if g.name in CACHED else 1.0 for g in self.index.groups}
        working = sum(kept[group.key] * group.bytes for group in self.index.groups)
        column, byte = columns_cost(products, working)
        for name, seconds in timed.kernels.items():
            groups = [group for group in self.index.groups if group.name == name]
            columns = kept[groups[0].key] * groups[0].channels
            yield columns * (column + byte * groups[0].stride), seconds / len(groups)

    def _text(self) -> Generation:
        return generate(self.loaded, self.prompt, max_new_tokens=NEW_TOKENS)


def _decoders(sample: Sample, store: Path) -> dict[str, _Decoder]:
    """Dense in memory; where it is streamed, with a cache, with masks, both, one filled ahead."""
    made = {"dense": _Decoder(sample, store, kept=1.0)}
    if sample.streamed:
        cache = _half(read_index(store))
        made["memory"] = _Decoder(sample, store)
        made["alone"] = _Decoder(sample, store, cache)
        made["dense alone"] = _Decoder(sample, store, cache, kept=1.0)
        made["ahead"] = _Decoder(sample, store, cache, look_ahead=True)
    return made


def _generate_in_turn(decoders: list[_Decoder], progress: Progress) -> None:
    """Let all generate, one after the other in every round: a machine's speed changes with time."""
    for number in range(1 + TRIES):
        for at, decoder in enumerate(decoders):
            progress((number + at / len(decoders)) / (1 + TRIES))
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
    """So far: seconds of waiting; reads, records, bytes, parts; seconds of kernels by name."""
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
    return [wait, reads, records, size, made, *kernels.values()]


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
