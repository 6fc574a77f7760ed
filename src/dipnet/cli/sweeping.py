"""A sweep with a progress bar: what `eval` and `demo` share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dipnet.cli.console import out
from dipnet.cli.progress import window_progress
from dipnet.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from dipnet.adapt.ready import Fitter
    from dipnet.cli.methods import MethodRequest
    from dipnet.eval.report import Report
    from dipnet.eval.streamed import StoreSetting
    from dipnet.eval.sweep import Job, Row, Setting
    from dipnet.eval.texts import TokenText
    from dipnet.models.load import LoadedModel


def plan_jobs(
    loaded: LoadedModel, requests: Iterable[MethodRequest], densities: Sequence[float]
) -> list[Job]:
    """The dense model, then every method at every density.

    Raises InputError with the first reason when methods are asked for and none can run.
    """
    from dipnet.eval.sweep import DENSE, plan
    from dipnet.models.families import describe

    spec = describe(loaded.model)
    jobs = [
        plan(request.label, density, partial(request.build, density), spec)
        for request in requests
        if request.name != "dense"
        for density in (densities if request.takes_density else (None,))
    ]
    _check_any(jobs)
    return [DENSE, *jobs]


def needs_calibration(jobs: Iterable[Job]) -> bool:
    """Whether a calibration text is needed for any of the jobs."""
    return any(job.method is not None and job.method.needs_calibration for job in jobs)


def measure(
    loaded: LoadedModel,
    jobs: Sequence[Job],
    tokens: Tensor,
    setting: Setting,
    calibration: TokenText | None = None,
    split_text: TokenText | None = None,
) -> list[Row]:
    """The rows of the jobs on (n,) tokens, with a progress bar on stderr.

    Raises InputError when a method needs a calibration text and there is none, or when none of the
    methods that were asked for could be measured.
    """
    from dipnet.eval.sweep import sweep

    fitter = fitter_for(loaded, jobs, setting, calibration, split_text)
    made = partial(sweep, loaded.model, jobs, tokens, setting, ready=fitter)
    return _collect(made, jobs, setting.count(tokens))


def fitter_for(
    loaded: LoadedModel,
    jobs: Sequence[Job],
    setting: Setting,
    calibration: TokenText | None = None,
    split_text: TokenText | None = None,
) -> Fitter:
    """What makes the jobs' methods ready; InputError when they need a text and there is none."""
    from dipnet.adapt.ready import Fitter

    if needs_calibration(jobs) and calibration is None:
        names = {job.label for job in jobs if job.method and job.method.needs_calibration}
        raise InputError(
            f"{', '.join(sorted(names))} must be calibrated on text first: give --calibration FILE"
        )
    return Fitter(
        loaded.model,
        setting.window,
        calibration.tokens if calibration else None,
        split_text.tokens if split_text else None,
        setting.batch_size,
        setting.bos,
    )


def measure_store(
    store: Path, jobs: Sequence[Job], tokens: Tensor, setting: Setting, held: StoreSetting
) -> list[Row]:
    """As `measure`, of a packed model, with the engine that generates."""
    from dipnet.cli.streamed import check_fitted
    from dipnet.eval.streamed import stream_sweep

    made = partial(stream_sweep, store, jobs, tokens, setting, held, ready=check_fitted)
    return _collect(made, jobs, setting.count(tokens))


def _collect(sweeping: Callable[..., Iterable[Row]], jobs: Sequence[Job], windows: int) -> list:
    """The rows of a sweep over so many windows, with a progress bar."""
    runnable = sum(job.method is not None for job in jobs)
    with window_progress() as progress:
        task = progress.add_task("", total=runnable * windows)
        rows = sweeping(
            started=lambda job: progress.update(task, description=_named(job)),
            progress=lambda done: progress.advance(task, done),
        )
        measured = list(rows)
    _check_any(measured[1:] or measured)
    return measured


def show(report: Report) -> None:
    """Print the table, and why rows are missing."""
    from dipnet.eval.report import reasons, table

    out.print(report.title, style="bold", markup=False, soft_wrap=True)
    out.print(table(report))
    for reason in reasons(report.rows):
        out.print(f"– {reason}", style="dim", markup=False, soft_wrap=True)


def _check_any(found: Sequence[Job | Row]) -> None:
    """Raise the first reason when there is not one that has none."""
    if found and all(item.reason for item in found):
        raise InputError(str(found[0].reason))


def _named(job: Job) -> str:
    return job.label if job.density is None else f"{job.label} at {job.density:g}"
