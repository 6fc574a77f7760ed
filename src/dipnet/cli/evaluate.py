"""``dipnet eval``: methods × densities on one text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dipnet.cli.console import json_text, note, print_json, quiet_libraries
from dipnet.cli.inputs import (
    calibration_text,
    calibration_tokens,
    load,
    split_tokens,
    tokens_of,
)
from dipnet.cli.methods import MethodRequest, parse_method, unique
from dipnet.cli.options import (
    METHOD_HELP,
    Calibration,
    Densities,
    Device,
    Dtype,
    Json,
    Model,
    Seed,
    Window,
)
from dipnet.cli.streamed import Memory, Streaming, Weights, shapes_of
from dipnet.cli.sweeping import measure, measure_store, needs_calibration, plan_jobs, show
from dipnet.cli.texts import (
    Bos,
    BosOption,
    Column,
    Dataset,
    DatasetConfig,
    DatasetSplit,
    Source,
    Stride,
    TextFile,
    Windows,
    measured_text,
    setting_of,
)
from dipnet.cli.tracing import Trace, TraceScores, Tracing
from dipnet.errors import InputError
from dipnet.files import check_writable, make_folder, write_file
from dipnet.units import check_density

if TYPE_CHECKING:
    from dipnet.cache import CacheSettings
    from dipnet.eval.report import Report

DENSITIES = (0.8, 0.67, 0.5, 0.4, 0.3)
JSON_NAME = "eval.json"
PLOT_NAME = "perplexity.png"


def evaluate(
    model: Model = None,
    text: TextFile = None,
    dataset: Dataset = None,
    dataset_config: DatasetConfig = None,
    split: DatasetSplit = None,
    column: Column = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help=f"{METHOD_HELP}; repeatable; default: dip", show_default=False),
    ] = None,
    density: Densities = None,
    calibration: Calibration = None,
    fit_split: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Fit how DIP-like methods divide each density on this text first",
            show_default=False,
        ),
    ] = None,
    window: Window = None,
    stride: Stride = None,
    windows: Windows = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at a time")] = 1,
    bos: BosOption = Bos.AUTO,
    dense_prompt: Annotated[
        int, typer.Option(min=0, help="Leading tokens of a window that stay dense and unscored")
    ] = 0,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE|SIZE",
            help="A packed model's record cache in bytes: 64MiB; a checkpoint's as a share of each "
            "site's units: 0.5. Counts hits, and lets dip:cache_aware=0.2 prefer what is resident",
            show_default=False,
        ),
    ] = None,
    cache_policy: Annotated[
        str | None,
        typer.Option(
            "--cache-policy",
            "--policy",
            help="What it evicts: lru or lfu; default: lfu packed, else lru",
            show_default=False,
        ),
    ] = None,
    memory: Memory = None,
    weights: Weights = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trace: Trace = None,
    trace_scores: TraceScores = False,
    json: Json = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the rows as a PNG", show_default=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help=f"Save {JSON_NAME} and {PLOT_NAME} there",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure perplexity for methods × densities, and for the dense model.

    Example: dipnet eval --method dip --method cats --density 0.5 --density 0.4 --plot p.png

    Example: dipnet eval Qwen/Qwen3-0.6B --text test.txt --method dip --density 0.5 --out results

    Example: dipnet eval qwen3.dipnet --text test.txt --density 0.5 --memory 1GiB
    """
    _check_outputs(plot, out)
    tracing = Tracing(trace, trace_scores)
    requests = [parse_method(name) for name in unique(method or ["dip"])]
    densities = _densities(requests, density)
    tracing.check(requests, densities)
    _check_split(requests, fit_split)
    quiet_libraries()
    streaming = Streaming(memory, cache, cache_policy, weights=weights)
    streams = streaming.streams(model, device, dtype, shares=True)
    caching = None if streams else _caching(requests, cache, cache_policy)
    if streams:
        _check_streaming(streaming, requests, calibration, fit_split)
    from transformers import set_seed

    from dipnet.eval.report import Report
    from dipnet.eval.texts import read_text

    content = measured_text(model, Source(text, dataset, dataset_config, split, column))
    calibrate_on = calibration_text(model, calibration)
    fit_on = read_text(fit_split) if fit_split else None
    store = streaming.open(model) if streams else None
    loaded = shapes_of(store) if store else load(model, device, dtype)
    setting = setting_of(loaded, window, stride, dense_prompt, bos, batch_size, caching)
    measured = tokens_of(loaded, content)
    used = setting.first(measured.tokens, windows)
    jobs = tracing.jobs(plan_jobs(loaded, requests, densities), loaded.name)
    set_seed(seed)
    if store:
        held = streaming.setting(store, setting.window)
        rows = measure_store(store, jobs, used, setting, held)
        windows_used = setting.count(used)
        report = Report(loaded, measured, setting, windows_used, seed, rows, held=held)
        return _deliver(report, json=json, plot=plot, folder=out, trace=trace)
    fitted_on = calibration_tokens(loaded, calibrate_on) if needs_calibration(jobs) else None
    split_on = split_tokens(loaded, fit_on, setting.window) if fit_on else None
    rows = measure(loaded, jobs, used, setting, fitted_on, split_on)
    report = Report(loaded, measured, setting, setting.count(used), seed, rows, fitted_on, split_on)
    _deliver(report, json=json, plot=plot, folder=out, trace=trace)


def _check_outputs(plot: Path | None, folder: Path | None) -> None:
    """Test that everything can be written, before hours of work."""
    if plot and plot.suffix.lower() != ".png":
        raise InputError(f"--plot draws a PNG: name the file {plot.with_suffix('.png')}")
    if plot:
        check_writable(plot)
    if folder:
        check_writable(make_folder(folder) / JSON_NAME)


def _densities(requests: Sequence[MethodRequest], asked: Sequence[float] | None) -> list[float]:
    """The densities to measure at; InputError when they are given and no method takes one."""
    densities = [check_density(value) for value in unique(asked or DENSITIES)]
    if asked and not any(request.takes_density for request in requests):
        names = ", ".join(request.label for request in requests)
        raise InputError(f"--density has no effect on {names}: leave it out")
    return densities


def _check_split(requests: Sequence[MethodRequest], file: Path | None) -> None:
    if file and not any(request.wants_split for request in requests):
        raise InputError(
            "--fit-split has no effect: of the methods, only dip and wina without a split of their "
            "own have one to fit"
        )


def _caching(
    requests: Sequence[MethodRequest], share: str | None, policy: str | None
) -> CacheSettings | None:
    """What the options say of a checkpoint's cache; InputError when they make no sense together."""
    from dipnet.cache import CacheSettings

    if share is not None:
        return CacheSettings(_share(share), policy or "lru")
    if policy is not None:
        raise InputError("--cache-policy goes with --cache SHARE: give that")
    aware = [request.label for request in requests if "cache_aware" in request.options]
    if aware:
        raise InputError(f"{', '.join(aware)}: cache_aware has no effect without --cache SHARE")
    return None


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(
            f"--cache {text}: a checkpoint's cache is a share of each site's units such as 0.5; "
            "sizes are for packed models (dipnet pack, or --weights int4)"
        ) from None


def _check_streaming(
    streaming: Streaming,
    requests: Sequence[MethodRequest],
    calibration: Path | None,
    fit_split: Path | None,
) -> None:
    """Raise InputError for what cannot be done with a packed model."""
    streaming.check(requests)
    for option, file in (("--calibration", calibration), ("--fit-split", fit_split)):
        if file:
            raise InputError(
                f"{option} needs the dense model, and a store does not hold it: leave it out, or "
                "measure the checkpoint"
            )


def _deliver(
    report: Report, *, json: bool, plot: Path | None, folder: Path | None, trace: Path | None
) -> None:
    """Show the report, and write the files that were asked for; the trace is there already."""
    from dipnet.eval.report import as_json

    if json:
        print_json(as_json(report))
    else:
        show(report)
    if trace:
        note(f"saved {trace}")
    files: dict[Path, str | bytes] = {}
    if plot:
        files[plot] = _picture(report)
    if folder:
        files[folder / JSON_NAME] = json_text(as_json(report))
        files[folder / PLOT_NAME] = _picture(report)
    for path, content in files.items():
        write_file(path, content)
        note(f"saved {path}")


def _picture(report: Report) -> bytes:
    from dipnet.eval.plot import Panel, draw

    return draw([Panel(f"{report.loaded.name} on {report.text.text.name}", report.rows)])
