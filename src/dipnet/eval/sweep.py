"""Methods × densities on one text: what is asked, and the rows that were measured.

Knows how to evaluate a method that is ready; making it ready (calibration, fitting) is the
caller's, who hands in a function for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from dipnet.cache import CacheSettings
from dipnet.errors import InputError
from dipnet.eval.perplexity import Perplexity, count_windows, leading_tokens, perplexity
from dipnet.methods.base import Method
from dipnet.methods.dense import Dense
from dipnet.models.attach import sparsify, usage
from dipnet.models.families import describe
from dipnet.models.usage import CacheUsage, Density
from dipnet.units import ModelSpec


@dataclass(frozen=True)
class Setting:
    """How a text is measured; the arguments of `perplexity`, and what it means for a method.

    ``prompt`` leading tokens of each window are processed dense and are not scored. With a
    ``cache`` every site has one, warm from one window to the next.
    """

    window: int
    stride: int
    prompt: int = 0
    bos: int | None = None
    batch_size: int = 1
    cache: CacheSettings | None = None

    @property
    def dense_positions(self) -> int:
        """Leading positions of each window that are processed dense, BOS included."""
        return self.prompt + (self.bos is not None) if self.prompt else 0

    def count(self, tokens: Tensor) -> int:
        """The number of windows that (n,) ``tokens`` make."""
        return count_windows(
            len(tokens),
            window=self.window,
            stride=self.stride,
            prompt=self.prompt,
            bos=self.bos is not None,
        )

    def first(self, tokens: Tensor, windows: int | None) -> Tensor:
        """The tokens of the first ``windows`` windows; all tokens when None."""
        if windows is None:
            return tokens
        bos = self.bos is not None
        return tokens[: leading_tokens(windows, window=self.window, stride=self.stride, bos=bos)]


@dataclass(frozen=True)
class Job:
    """One method at one density: to be measured, or with the ``reason`` why it cannot be.

    ``label`` is what the user wrote for the method; ``density`` what was asked for, None for a
    method that has no density or brings its own. ``recording`` surrounds the measurement with what
    watches the model.
    """

    label: str
    density: float | None
    method: Method | None
    reason: str | None = None
    recording: Callable[[PreTrainedModel], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class Measured:
    """The figures of one evaluated method; ``fit_seconds`` is what making it ready took.

    ``cache`` is None when the setting has none, ``store`` for what is no packed model.
    """

    perplexity: Perplexity
    density: Density
    parameters: dict[str, Any]
    seconds: float
    fit_seconds: float
    cache: CacheUsage | None = None
    store: StoreUse | None = None


@dataclass(frozen=True)
class StoreUse:
    """What decoding the text token by token reads of a packed model.

    ``hit_rates`` maps each kind of site that may be streamed to the share of wanted records that
    were in memory; ``hit_rate`` is the share of their bytes. ``bytes_per_token`` are those of the
    records that were missed. ``own_allocation`` says whether the store's allocation divided the
    density.
    """

    hit_rates: dict[str, float | None]
    hit_rate: float
    bytes_per_token: float
    own_allocation: bool


@dataclass(frozen=True)
class Row:
    """A job and its figures, or the reason why there are none."""

    label: str
    density: float | None
    measured: Measured | None
    reason: str | None = None


DENSE = Job("dense", None, Dense())


def plan(label: str, density: float | None, build: Callable[[], Method], spec: ModelSpec) -> Job:
    """The job of a method, tested against the model's shapes before anything is run."""
    try:
        method = build()
        method.check_model(spec)
    except InputError as error:
        return Job(label, density, None, str(error))
    return Job(label, density, method)


def sweep(
    model: PreTrainedModel,
    jobs: Iterable[Job],
    tokens: Tensor,
    setting: Setting,
    *,
    ready: Callable[[Method], Method],
    started: Callable[[Job], object] | None = None,
    progress: Callable[[int], object] | None = None,
) -> Iterator[Row]:
    """Measure the jobs one after the other; a row is yielded as soon as it is known.

    ``ready`` calibrates or fits a method; where it says that it cannot (InputError), the row says
    why. ``started`` is called with each job, ``progress`` with the number of windows done.
    """
    for job in jobs:
        if started:
            started(job)
        yield _row(model, job, tokens, setting, ready, progress)


def _row(
    model: PreTrainedModel,
    job: Job,
    tokens: Tensor,
    setting: Setting,
    ready: Callable[[Method], Method],
    progress: Callable[[int], object] | None,
) -> Row:
    if job.method is None:
        return Row(job.label, job.density, None, job.reason)
    start = time.perf_counter()
    try:
        method = ready(job.method)
        attached = sparsify(
            model, method, prefill=setting.dense_positions or "sparse", cache=setting.cache
        )
    except InputError as error:
        return Row(job.label, job.density, None, str(error))
    fitted = time.perf_counter()
    with attached:
        try:
            with job.recording(attached):
                result = measure(attached, tokens, setting, progress)
        except InputError as error:
            if job is DENSE:  # there would be nothing to compare with
                raise
            return Row(job.label, job.density, None, str(error))
        density, cached = usage(attached).density(), usage(attached).cache()
    measured = Measured(
        result,
        density,
        resolved_parameters(method, describe(model)),
        seconds=time.perf_counter() - fitted,
        fit_seconds=fitted - start,
        cache=cached if setting.cache else None,
    )
    return Row(job.label, job.density, measured)


def measure(
    model: PreTrainedModel,
    tokens: Tensor,
    setting: Setting,
    progress: Callable[[int], object] | None = None,
) -> Perplexity:
    """Perplexity of the model as it is, on (n,) ``tokens``."""
    return perplexity(
        model,
        tokens,
        window=setting.window,
        stride=setting.stride,
        prompt=setting.prompt,
        bos=setting.bos,
        batch_size=setting.batch_size,
        progress=progress,
    )


def resolved_parameters(method: Method, spec: ModelSpec) -> dict[str, Any]:
    """What a method was set to: its plain fields, and the unit densities that its sites aim at, in
    the mean over the layers that have them.
    """
    values = {field.name: getattr(method, field.name) for field in fields(method)}
    plain = {name: value for name, value in values.items() if isinstance(value, float | int | str)}
    densities: dict[str, list[float]] = {}
    for site in method.sites(spec):
        densities.setdefault(site.name, []).append(site.density)
    means = {name: sum(values) / len(values) for name, values in densities.items()}
    return {**plain, "site_densities": means}
