"""Perplexity of packed models: the same rows as a sweep's, from the engine that generates.

A window's tokens are decided one after another, as in decoding, so hits and misses are decoding's.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from dipnet.errors import InputError
from dipnet.eval.sweep import (
    DENSE,
    Job,
    Measured,
    Row,
    Setting,
    StoreUse,
    measure,
    resolved_parameters,
)
from dipnet.methods.base import Method
from dipnet.models.attach import usage
from dipnet.models.families import describe
from dipnet.streaming.attach import natively_streamed, streamed
from dipnet.streaming.budget import cached_names, size_text
from dipnet.streaming.load import load, stats
from dipnet.streaming.methods import takes_allocation


@dataclass(frozen=True)
class StoreSetting:
    """How a packed model is held while it is measured.

    ``cache`` are the bytes of its record cache, None when everything is in memory; ``memory`` is
    the budget that they were divided from, if any.
    """

    cache: int | None = None
    policy: str = "lfu"
    memory: int | None = None

    @property
    def title(self) -> str:
        """What a report says of it."""
        if self.cache is None:
            return "all in memory"
        budget = f" ({size_text(self.memory)} of memory)" if self.memory else ""
        return f"{self.policy} cache of {size_text(self.cache)}{budget}"


def stream_sweep(
    store: Path,
    jobs: Iterable[Job],
    tokens: Tensor,
    setting: Setting,
    how: StoreSetting,
    *,
    ready: Callable[[Method], Method],
    started: Callable[[Job], object] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Iterator[Row]:
    """Measure the jobs on the store one after the other, each with caches that begin empty.

    The arguments are those of `dipnet.eval.sweep.sweep`. Raises InputError when the store or its
    bounds cannot be used; what is wrong with one method is said in its row.
    """
    for job in jobs:
        if started:
            started(job)
        yield _row(store, job, tokens, setting, how, ready, progress)


def _row(
    store: Path,
    job: Job,
    tokens: Tensor,
    setting: Setting,
    how: StoreSetting,
    ready: Callable[[Method], Method],
    progress: Callable[[int], object] | None,
) -> Row:
    if job.method is None:
        return Row(job.label, job.density, None, job.reason)
    gc.collect()  # a model and its hooks hold each other: the last job's goes now, not sometime
    begun = time.perf_counter()
    try:
        method = ready(job.method)
        model = load(
            store,
            method,
            context=setting.window,
            prefill=setting.dense_positions or "sparse",
            cache=how.cache,
            policy=how.policy,
        )
        with job.recording(model):
            result = measure(model, tokens, setting, progress)
    except InputError as error:
        if job is DENSE:  # there would be nothing to compare with
            raise
        return Row(job.label, job.density, None, str(error))
    measured = Measured(
        result,
        usage(model).density(),
        resolved_parameters(streamed(model).method, describe(model)),
        seconds=time.perf_counter() - begun,
        fit_seconds=0.0,
        store=_use(model, method),
    )
    return Row(job.label, job.density, measured)


def _use(model: PreTrainedModel, method: Method) -> StoreUse:
    """What the counts of the sites that may be streamed mean for a token that is decoded."""
    attached, counted = natively_streamed(model), stats(model)
    index = attached.engine.index
    missed = wanted = 0.0
    names = cached_names(index)
    for name in names:
        site, group = counted.sites[name], index.group(0, name)
        asked = site.hits + site.misses
        # Without masks a piece of a window asks once for all; with masks every token asks.
        asks = asked / group.units
        if (0, name) in attached.usage.sites:
            asks = attached.usage.density().tokens * index.layers
        size = group.record_bytes * index.layers / asks
        missed += site.misses * size
        wanted += asked * size
    return StoreUse(
        hit_rates={name: counted.sites[name].hit_rate for name in names},
        hit_rate=1 - missed / wanted,
        bytes_per_token=missed,
        own_allocation=takes_allocation(method, index),
    )
