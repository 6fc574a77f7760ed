"""What a model would do on devices: every method in every memory, with its perplexity.

The model is evaluated once for a method whose masks do not depend on a cache, and the trace of that
is replayed in every memory; anew for every memory and policy where they do (DIP-CA), with the
caches that this memory has room for.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from dipnet.cache import POLICIES, CacheSlots
from dipnet.errors import InputError
from dipnet.eval.sweep import Job, Setting, measure
from dipnet.methods.base import Method
from dipnet.methods.dense import Dense
from dipnet.models.attach import sparsify, usage
from dipnet.models.families import describe
from dipnet.models.load import LoadedModel
from dipnet.models.recording import model_shape, record, trace_sites
from dipnet.models.tokens import Prefill
from dipnet.sim.scenario import Scenario, cache_slots, run, source_slots
from dipnet.sim.shape import ModelShape
from dipnet.sim.sweep import Asked, Grid, Outcome, simulate_dense
from dipnet.sim.trace import Trace, open_trace


@dataclass(frozen=True)
class Refusal:
    """Why a method has no rows, or not all of them."""

    asked: Asked
    reason: str


@dataclass(frozen=True)
class Simulator:
    """A model on a text, to be simulated in a grid: what its evaluations have in common.

    ``tokens`` are (n,), ``ready`` makes a method ready for the model. ``started`` is called with
    what is evaluated next, ``progress`` with the number of windows done.
    """

    loaded: LoadedModel
    tokens: Tensor
    setting: Setting
    grid: Grid
    ready: Callable[[Method], Method]
    started: Callable[[Asked], object] = lambda _: None
    progress: Callable[[int], object] = lambda _: None

    @cached_property
    def shape(self) -> ModelShape:
        """The model's shape, under its name."""
        return model_shape(self.loaded.model, self.loaded.name)

    def rows(self, jobs: Iterable[Job]) -> Iterator[Outcome | Refusal]:
        """The rows of the dense model, then those of the jobs.

        Raises InputError when a memory fits neither the model nor a device.
        """
        scenarios = self.grid.scenarios(self.shape, self.setting.window)
        yield from self._dense(scenarios)
        for job in jobs:
            asked = asked_of(job)
            try:
                yield from self._job(asked, job, scenarios)
            except InputError as error:
                yield Refusal(asked, str(error))

    def evaluations(self, jobs: Iterable[Job]) -> int:
        """How often the text is evaluated at most."""
        caches = len(_online(self.grid.scenarios(self.shape, self.setting.window)))
        return 1 + sum(caches if is_aware(job.method) else 1 for job in jobs if job.method)

    @property
    def _prefill(self) -> Prefill:
        return self.setting.dense_positions or "sparse"

    def _dense(self, scenarios: Sequence[Scenario]) -> Iterator[Outcome]:
        self.started(Asked("dense"))
        with sparsify(self.loaded.model, Dense(), prefill=self._prefill) as model:
            perplexity = measure(model, self.tokens, self.setting, self.progress).perplexity
            tokens = usage(model).density().tokens
        yield from simulate_dense(self.shape, self.grid, scenarios, tokens, perplexity)

    def _job(
        self, asked: Asked, job: Job, scenarios: Sequence[Scenario]
    ) -> Iterator[Outcome | Refusal]:
        if job.method is None:
            raise InputError(str(job.reason))
        self.started(asked)
        method = self.ready(job.method)
        if not method.sites(describe(self.loaded.model)):
            raise InputError(
                "its masks are the same for every token: prune the checkpoint, and simulate that"
            )
        with tempfile.TemporaryDirectory(prefix="dipnet-") as folder:
            file = Path(folder) / "trace"
            if is_aware(method):
                yield from self._aware(asked, method, scenarios, file)
                return
            trace, perplexity = self._traced(method, None, file)
            target = self.grid.target(self.shape, trace.sites, trace.added_weights)
            for scenario in scenarios:
                made = run(target, scenario, trace)
                yield from self.grid.outcomes(asked, made, perplexity)

    def _aware(
        self,
        asked: Asked,
        method: Method,
        scenarios: Sequence[Scenario],
        file: Path,
    ) -> Iterator[Outcome | Refusal]:
        """A method whose masks depend on the cache: evaluated with each one's own."""
        online = _online(scenarios)
        if len(online) < len(scenarios):
            yield Refusal(
                asked, f"masks that prefer what is in memory need {' or '.join(POLICIES)}"
            )
        spec = describe(self.loaded.model)
        sites = trace_sites(method.sites(spec))
        target = self.grid.target(self.shape, sites, method.added_weights(spec))
        for scenario in online:
            slots = cache_slots(target, scenario)
            theirs = source_slots(target, slots, self.shape.layers, sites)
            held = {site.key: count for site, count in zip(sites, theirs, strict=True)}
            trace, perplexity = self._traced(method, CacheSlots(held, scenario.policy), file)
            made = run(target, scenario, trace, slots=slots)
            yield from self.grid.outcomes(asked, made, perplexity)

    def _traced(self, method: Method, cache: CacheSlots | None, file: Path) -> tuple[Trace, float]:
        """Evaluate a method with a cache of its own, recorded: its trace and perplexity."""
        with (
            sparsify(self.loaded.model, method, prefill=self._prefill, cache=cache) as model,
            record(model, file, name=self.loaded.name),
        ):
            found = measure(model, self.tokens, self.setting, self.progress)
        return open_trace(file), found.perplexity


def asked_of(job: Job) -> Asked:
    """What a job's rows are called."""
    return Asked(job.label, job.density, getattr(job.method, "cache_aware", None))


def is_aware(method: Method | None) -> bool:
    """Whether a method's masks depend on what is in memory."""
    return getattr(method, "cache_aware", None) not in (None, 1)


def _online(scenarios: Sequence[Scenario]) -> list[Scenario]:
    """The scenarios whose caches do not need the future, and hold something."""
    return [scenario for scenario in scenarios if scenario.policy in POLICIES]
