"""Settings of a packed model on trial: perplexity from the engine, speed from the simulator.

A trial decodes the text as `dipnet run` would decode it, with the caches that the budget leaves
room for, and records what its masks want. That trace is replayed and timed on the device.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dipnet.errors import InputError
from dipnet.eval.perplexity import perplexity
from dipnet.methods.base import Method
from dipnet.methods.dense import Dense
from dipnet.methods.dip import DIP
from dipnet.models.families import describe
from dipnet.models.load import empty_model, load_config
from dipnet.models.recording import model_shape, record
from dipnet.sim.device import Device
from dipnet.sim.scenario import Figures, Needs, Scenario, run
from dipnet.sim.shape import ModelShape
from dipnet.sim.sizes import Split
from dipnet.sim.target import Key, own_target
from dipnet.sim.trace import open_trace
from dipnet.store.index import Group, Index, read_index
from dipnet.streaming.budget import CACHED, divide
from dipnet.streaming.load import load
from dipnet.streaming.methods import densities, fitted_method
from dipnet.streaming.packed import block_of
from dipnet.streaming.plan import Policy
from dipnet.units import ModelSpec

ERRORS = 2.0
"""Standard errors that a bound must keep from the mean: 97.7 % sure, were the errors normal."""
LEAST_WINDOWS = 3
"""Of a text before a trial that looks hopeless is given up."""
DECODED = 32
"""Tokens that are decoded one by one to see how good the guesses of the look-ahead are."""


@dataclass(frozen=True)
class Setup:
    """How a model runs, but for its density; `DIP`'s and `load`'s settings by the same names."""

    block: int
    gamma: float | None = None
    split: float | None = None
    policy: Policy = "lfu"
    cache_split: Split = "wanted"
    allocation: Path | None = None
    scores: Path | None = None

    def method(self, density: float | None) -> Method:
        """The method at a density; None is the dense model."""
        if density is None:
            return Dense()
        return DIP(
            density,
            split=self.split,
            cache_aware=self.gamma,
            allocation=self.allocation,
            scores=self.scores,
        )


@dataclass(frozen=True)
class Increase:
    """How much larger the perplexity is than the dense model's, as a share of it.

    Of the text's windows the ``mean``, and what it is at ``least`` and ``at_most`` on other text of
    that kind: `ERRORS` standard errors of the paired differences away.
    """

    mean: float
    least: float
    at_most: float

    @classmethod
    def of(cls, losses: Sequence[float], dense: Sequence[float]) -> Increase:
        """From two or more windows' mean losses in nats; of ``dense`` there may be more."""
        differences = [loss - other for loss, other in zip(losses, dense, strict=False)]
        mean = statistics.fmean(differences)
        error = ERRORS * statistics.stdev(differences) / math.sqrt(len(differences))
        return cls(*(math.expm1(value) for value in (mean, mean - error, mean + error)))


@dataclass(frozen=True)
class Trial:
    """The windows' mean losses of a setup at a density; no ``trace`` when it was given up."""

    losses: tuple[float, ...]
    increase: Increase
    trace: Path | None


@dataclass(frozen=True)
class Task:
    """What is planned for: a model in a store, a device, a budget, a text.

    ``room`` are the bytes of the caches, None for everything in memory; ``context`` the tokens that
    keys and values are kept for. ``max_increase`` bounds the perplexity's increase. ``windows`` are
    (n,) tokens each, of one size, and begin with ``bos`` if given. ``blocks`` maps the sizes of
    records that may be tried to what makes the store of one; the store's own need not be there.
    ``allocation`` and ``scores`` are files for `DIP`, if any.
    """

    store: Path
    device: Device
    room: int | None
    context: int
    max_increase: float
    windows: Sequence[Tensor]
    bos: int | None = None
    blocks: Mapping[int, Callable[[], Path]] = field(default_factory=dict)
    allocation: Path | None = None
    scores: Path | None = None

    @property
    def usual(self) -> Setup:
        """What a search begins with."""
        return Setup(block_of(self.index), allocation=self.allocation, scores=self.scores)

    @cached_property
    def index(self) -> Index:
        """The store's index."""
        return read_index(self.store)

    @cached_property
    def shapes(self) -> tuple[ModelSpec, ModelShape]:
        """The model's shapes, as methods and as simulations know them."""
        empty = empty_model(load_config(str(self.store)))
        return describe(empty), model_shape(empty, self.index.source)

    @property
    def window(self) -> int:
        """The tokens of a window, BOS included."""
        return len(self.windows[0]) + (self.bos is not None)


class Trials:
    """Makes trials, each once, and what they come to on the device.

    Traces go to ``folder``. ``started`` is called with what is evaluated next, ``progress`` with
    the number of windows done.
    """

    def __init__(
        self,
        task: Task,
        folder: Path,
        started: Callable[[str], object] = lambda _: None,
        progress: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.task = task
        self.recall: Mapping[str, float] | None = None
        self._folder = folder
        self._started = started
        self._progress = progress
        self._known: dict[object, Trial] = {}
        self._numbers = count()  # of the traces' files: a forgotten one is not used again
        self._stores = {block_of(task.index): task.store}

    @cached_property
    def dense(self) -> tuple[float, ...]:
        """The dense model's losses, which no cache changes."""
        self._started("dense")
        model = self._load(self.task.usual, None)
        return tuple(self._losses(model))

    @property
    def dense_perplexity(self) -> float:
        """The dense model's perplexity on the text."""
        return math.exp(statistics.fmean(self.dense))

    def trial(self, setup: Setup, density: float) -> Trial:
        """Evaluate a setup at a density; what does not change its masks does not repeat it."""
        key = _masks(setup, density, streaming=self.task.room is not None)
        if key not in self._known:
            self._known[key] = self._evaluate(setup, density)
        return self._known[key]

    def figures(self, setup: Setup, density: float | None = None) -> Figures:
        """What a setup comes to on the device; the dense model without a density."""
        shape = self.task.shapes[1]
        index = read_index(self.store(setup.block))
        file = None if density is None else self.trial(setup, density).trace
        trace = None if file is None else open_trace(file)
        target = own_target(shape, trace.sites if trace else ())
        slots = self.slots(setup, density)
        needs = Needs.of(target, index.weights, self.task.context)
        held = sum(slots[key] * group.record_bytes for key, group in _cached(index).items())
        how = Scenario(needs.fixed + held, setup.policy, index.weights, self.task.context)
        tokens, window = self._tokens(), self.task.window
        made = run(target, how, trace, tokens=tokens, sequence=window, slots=slots)
        return replace(made, recall=self.recall).on(self.task.device)

    def method(self, setup: Setup, density: float | None) -> Method:
        """A setup's method as it runs on its store."""
        store = self.store(setup.block)
        return fitted_method(setup.method(density), store, read_index(store), self.task.shapes[0])

    @cached_property
    def divided(self) -> bool:
        """Whether an allocation, the task's or the store's own, divides densities."""
        method = self.method(self.task.usual, 1.0)
        return isinstance(method, DIP) and method.allocated is not None

    def slots(self, setup: Setup, density: float | None) -> dict[Key, int]:
        """The records of each streamed group that have room, as `load` divides it."""
        index = read_index(self.store(setup.block))
        shares = densities(self.method(setup, density), index, self.task.shapes[0])
        divided = divide(index, self.task.room, shares, setup.cache_split)
        return {key: divided[key] for key in _cached(index)}

    @cached_property
    def streaming(self) -> bool:
        """Whether any record is read from disk while tokens are decoded."""
        setup = self.task.usual
        slots = self.slots(setup, None)
        groups = _cached(self.task.index)
        return any(slots[key] < group.units for key, group in groups.items())

    def store(self, block: int) -> Path:
        """The store with records of so many neurons; made when it is first asked for."""
        if block not in self._stores:
            self._stores[block] = self.task.blocks[block]()
        return self._stores[block]

    def learn_recall(self, setup: Setup, density: float) -> None:
        """Decode some tokens with the look-ahead, to see which share of its guesses is right."""
        file = self._folder / "decoded.trace"
        model = self._load(setup, density)
        past = None
        with record(model, file), torch.inference_mode():
            for token in self.task.windows[0][:DECODED]:
                out = model(input_ids=token[None, None], past_key_values=past, use_cache=True)
                past = out.past_key_values
        self.recall = open_trace(file).recall

    def forget(self, kept: Trial | None) -> None:
        """Remove all traces but one: each may have hundreds of megabytes."""
        for key, trial in list(self._known.items()):
            if trial.trace is not None and trial is not kept:
                trial.trace.unlink()
                del self._known[key]

    def _evaluate(self, setup: Setup, density: float) -> Trial:
        dense = self.dense
        self._started(f"{named(setup)} at {density:g}")
        file = self._folder / f"{next(self._numbers)}-{density:g}.trace"
        model = self._load(setup, density)
        losses: list[float] = []
        with record(model, file, name=self.task.index.source):
            for loss in self._losses(model):
                losses.append(loss)
                if self._hopeless(losses):
                    break
        increase = Increase.of(losses, dense)
        if len(losses) == len(dense) and self.inside(increase):
            return Trial(tuple(losses), increase, file)
        file.unlink()
        return Trial(tuple(losses), increase, None)

    def inside(self, increase: Increase) -> bool:
        """Whether the bound is kept, on other text, too."""
        return increase.at_most <= self.task.max_increase

    def _hopeless(self, losses: Sequence[float]) -> bool:
        if len(losses) < LEAST_WINDOWS:
            return False
        return Increase.of(losses, self.dense).least > self.task.max_increase

    def _load(self, setup: Setup, density: float | None) -> PreTrainedModel:
        gc.collect()  # a model and its hooks hold each other: the last trial's goes now
        return load(
            self.store(setup.block),
            setup.method(density),
            cache=self.task.room,
            context=self.task.window,
            policy=setup.policy,
            cache_split=setup.cache_split,
            prefill="sparse",
        )

    def _losses(self, model: PreTrainedModel) -> Iterator[float]:
        """The mean loss of each window, caches warm from one to the next."""
        for tokens in self.task.windows:
            yield perplexity(model, tokens, window=self.task.window, bos=self.task.bos).nll
            self._progress(1)

    def _tokens(self) -> int:
        return self.task.window * len(self.task.windows)


def named(setup: Setup) -> str:
    """A setup for people, without what is as usual."""
    gamma = "DIP" if setup.gamma is None else f"DIP-CA, γ {setup.gamma:g}"
    split = "" if setup.split is None else f", split {setup.split:g}"
    return f"{gamma}{split}, {setup.policy}, {setup.cache_split}, block {setup.block}"


def _masks(setup: Setup, density: float, *, streaming: bool) -> object:
    """What the masks depend on: with γ on the caches."""
    if setup.gamma is None or not streaming:
        return setup.block, setup.split, density
    return setup, density


def _cached(index: Index) -> dict[Key, Group]:
    """The groups whose records may be streamed."""
    groups = [group for group in index.groups if group.name in CACHED]
    return {(group.layer, group.name): group for group in groups if group.layer is not None}


def check_windows(count: int, window: int) -> None:
    """Raise InputError for a text that is too short to tell an increase from chance."""
    if count < LEAST_WINDOWS:
        raise InputError(
            f"the text has {count} windows of {window} tokens, and planning needs "
            f"{LEAST_WINDOWS}: give a longer text or a smaller --window"
        )
