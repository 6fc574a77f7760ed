"""``dipnet simulate``: what a model would do on a device, from a trace or evaluated here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dipnet.cli.console import err, note, out, print_json, quiet_libraries
from dipnet.cli.grid import DEFAULT_DEVICE, grid_of, numbers
from dipnet.cli.inputs import calibration_text, calibration_tokens, load, tokens_of
from dipnet.cli.methods import MethodRequest, parse_method, unique
from dipnet.cli.options import FLAG, METHOD_HELP, Calibration, Json, Window
from dipnet.cli.progress import window_progress
from dipnet.cli.streamed import Kind
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
from dipnet.errors import InputError
from dipnet.files import check_writable, write_file
from dipnet.registry import method_class
from dipnet.sim.shape import SHAPES
from dipnet.units import check_density

if TYPE_CHECKING:
    from dipnet.eval.simulate import Refusal, Simulator
    from dipnet.eval.sweep import Job
    from dipnet.sim.report import Simulation
    from dipnet.sim.sweep import Grid, Outcome

DEFAULT_DENSITY = 0.5
DEVICE_HELP = "Where it would run: a preset (docs/devices.md), or a file that dipnet probe wrote"


@dataclass(frozen=True)
class Reading:
    """How a text is cut into windows."""

    window: int | None
    stride: int | None
    windows: int | None
    bos: Bos


def simulate(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="SOURCE",
            help="A trace, or a model to evaluate; default: the bundled demo-swiglu",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|FILE,...",
            help=f"{DEVICE_HELP}; default: {DEFAULT_DEVICE}",
            show_default=False,
        ),
    ] = None,
    memory: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SIZE|SHARE,...",
            help="Memory for weights, caches, keys and values: 2GiB, or 50% of what holds the "
            "dense model; default: what the device has",
            show_default=False,
        ),
    ] = None,
    flash_speed: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SPEED,...",
            help="The device with another Flash: 1GB/s; a measured curve is scaled",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...",
            help="What caches keep: none, lru, lfu, belady (the bound); default: lfu",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Kind, typer.Option(help="How weights are packed; their bytes only, not their quality")
    ] = Kind.INT4,
    shape: Annotated[
        str | None,
        typer.Option(
            help=f"Stretch the statistics over another model's shape: {', '.join(SHAPES)}",
            show_default=False,
        ),
    ] = None,
    no_look_ahead: Annotated[
        bool,
        typer.Option(
            "--no-look-ahead",
            metavar=FLAG,
            help="Without reading ahead, on devices that dipnet probe measured",
        ),
    ] = False,
    method: Annotated[
        list[str] | None,
        typer.Option(help=f"{METHOD_HELP}; repeatable; default: dip", show_default=False),
    ] = None,
    density: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHARE,...",
            help="Share of the MLP's weights to read (teal: of all the block's); "
            f"default: {DEFAULT_DENSITY}",
            show_default=False,
        ),
    ] = None,
    gamma: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHARE,...",
            help="γ of cache-aware masks, decided anew for every memory: 0.2; 1 is without",
            show_default=False,
        ),
    ] = None,
    text: TextFile = None,
    dataset: Dataset = None,
    dataset_config: DatasetConfig = None,
    split: DatasetSplit = None,
    column: Column = None,
    calibration: Calibration = None,
    window: Window = None,
    stride: Stride = None,
    windows: Windows = None,
    bos: BosOption = Bos.AUTO,
    json: Json = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw perplexity against throughput and memory as a PNG",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Simulate a model on devices: tokens/s, hits and bytes for methods × memories × caches.

    Options with dots take several values, with commas or repeated.

    Example: dipnet simulate --memory 50%,75% --density 0.5,0.67 --gamma 1,0.5 --windows 4

    Example: dipnet simulate run.trace --device phone,laptop-nvme --policy none,lru,lfu,belady

    Example: dipnet simulate --shape phi-3-medium --memory 4GiB --plot pareto.png
    """
    grid = grid_of(device, memory, flash_speed, policy, weights.value, shape, not no_look_ahead)
    evaluated = {
        "--method": method,
        "--density": density,
        "--gamma": gamma,
        "--text": text,
        "--dataset": dataset,
        "--dataset-config": dataset_config,
        "--split": split,
        "--column": column,
        "--calibration": calibration,
        "--window": window,
        "--stride": stride,
        "--windows": windows,
        "--plot": plot,
    }
    if source is not None and Path(source).is_file():
        _check_unused(source, [option for option, value in evaluated.items() if value])
        found = _from_trace(source, grid)
    else:
        _check_plot(plot)
        requests = _requests(method, gamma)
        densities = _densities(requests, density)
        texts = Source(text, dataset, dataset_config, split, column)
        how = Reading(window, stride, windows, bos)
        found = _from_model(source, grid, requests, densities, texts, calibration, how)
    _deliver(found, json=json, plot=plot)


def _check_unused(source: str, given: Sequence[str]) -> None:
    """Raise InputError for options that need the model."""
    if "--plot" in given:
        raise InputError("a trace knows no perplexity to draw: give the model instead of the trace")
    if given:
        raise InputError(
            f"{given[0]} has no effect on {source}: what tokens want is in the trace; leave it "
            "out, or give the model"
        )


def _check_plot(plot: Path | None) -> None:
    """Test that the picture can be written, before hours of work."""
    if plot and plot.suffix.lower() != ".png":
        raise InputError(f"--plot draws a PNG: name the file {plot.with_suffix('.png')}")
    if plot:
        check_writable(plot)


def _requests(methods: Sequence[str] | None, gammas: Sequence[str] | None) -> list[MethodRequest]:
    """Every method, with every γ where it takes one and brings none."""
    requests = [parse_method(name) for name in unique(methods or ["dip"])]
    asked = numbers("--gamma", gammas)
    if not asked:
        return requests
    if not any(_takes_gamma(request) for request in requests):
        names = ", ".join(request.label for request in requests)
        raise InputError(f"--gamma has no effect on {names}: leave it out")
    made = []
    for request in requests:
        if not _takes_gamma(request):
            made.append(request)
            continue
        for gamma in asked:
            more = {} if gamma == 1 else {"cache_aware": gamma}
            made.append(replace(request, options={**request.options, **more}))
    return made


def _takes_gamma(request: MethodRequest) -> bool:
    known = {field.name for field in fields(method_class(request.name))}
    return "cache_aware" in known - set(request.options)


def _densities(requests: Sequence[MethodRequest], asked: Sequence[str] | None) -> list[float]:
    densities = [check_density(value) for value in numbers("--density", asked)]
    if densities and not any(request.takes_density for request in requests):
        names = ", ".join(request.label for request in requests)
        raise InputError(f"--density has no effect on {names}: leave it out")
    return densities or [DEFAULT_DENSITY]


def _from_trace(source: str, grid: Grid) -> Simulation:
    """The trace in everything that is swept."""
    from dipnet.sim.report import Simulation
    from dipnet.sim.sweep import simulate_trace
    from dipnet.sim.trace import open_trace

    trace = open_trace(source)
    with err.status(f"replaying {source}") as status:

        def progress(done: int, total: int) -> None:
            status.update(f"replaying {source}: {done / total:.0%}")

        rows = list(simulate_trace(trace, grid, progress))
    simulated = grid.shape or trace.shape
    needs = grid.needs(trace.shape, rows[0].scenario.context)
    name = trace.shape.name or source
    return Simulation(name, simulated.name or source, f"trace {source}", rows, needs)


def _from_model(
    source: str | None,
    grid: Grid,
    requests: Sequence[MethodRequest],
    densities: Sequence[float],
    texts: Source,
    calibration: Path | None,
    how: Reading,
) -> Simulation:
    """The model, evaluated with every method, in everything that is swept."""
    _check_checkpoint(source)
    quiet_libraries()
    from dipnet.cli.sweeping import fitter_for, needs_calibration, plan_jobs
    from dipnet.eval.simulate import Refusal, Simulator
    from dipnet.sim.report import Simulation
    from dipnet.sim.sweep import DENSE

    content = measured_text(source, texts)
    calibrate_on = calibration_text(source, calibration)
    loaded = load(source, "auto", "auto")
    setting = setting_of(loaded, how.window, how.stride, 0, how.bos, 1, None)
    measured = tokens_of(loaded, content)
    _, *jobs = plan_jobs(loaded, requests, densities)
    fitted_on = calibration_tokens(loaded, calibrate_on) if needs_calibration(jobs) else None
    simulator = Simulator(
        loaded,
        setting.first(measured.tokens, how.windows),
        setting,
        grid,
        fitter_for(loaded, jobs, setting, fitted_on),
    )
    found = _collect(simulator, jobs)
    rows = [row for row in found if not isinstance(row, Refusal)]
    refusals = [row for row in found if isinstance(row, Refusal)]
    if refusals and all(row.asked.label == DENSE for row in rows):
        raise InputError(f"{refusals[0].asked.label}: {refusals[0].reason}")
    simulated = grid.shape.name if grid.shape else loaded.name
    reasons = [(refusal.asked.line, refusal.reason) for refusal in refusals]
    needs = grid.needs(simulator.shape, setting.window)
    return Simulation(loaded.name, simulated, content.name, rows, needs, reasons)


def _check_checkpoint(source: str | None) -> None:
    """Raise InputError for a packed model: the dense model's perplexity is not in a store."""
    from dipnet.streaming.packed import is_store

    if source is not None and is_store(source):
        raise InputError(
            f"{source!r} is a packed model: give its checkpoint, or a trace of it (dipnet eval "
            f"{source} --trace FILE)"
        )


def _collect(simulator: Simulator, jobs: Sequence[Job]) -> list[Outcome | Refusal]:
    """The rows of a simulation, with a progress bar."""
    windows = simulator.setting.count(simulator.tokens)
    with window_progress() as bar:
        task = bar.add_task("", total=simulator.evaluations(jobs) * windows)
        watched = replace(
            simulator,
            started=lambda asked: bar.update(task, description=asked.line),
            progress=lambda done: bar.advance(task, done),
        )
        return list(watched.rows(jobs))


def _deliver(simulation: Simulation, *, json: bool, plot: Path | None) -> None:
    """Show what was found, and write the picture if it was asked for."""
    from dipnet.sim.report import as_json, table

    if json:
        print_json(as_json(simulation))
    else:
        out.print(simulation.title, style="bold", markup=False, soft_wrap=True)
        out.print(table(simulation))
        for name, reason in simulation.refusals:
            out.print(f"– {name}: {reason}", style="dim", markup=False, soft_wrap=True)
        if simulation.remark:
            out.print(simulation.remark, markup=False, soft_wrap=True)
    if plot:
        from dipnet.eval.simulate_plot import draw

        write_file(plot, draw(simulation.rows))
        note(f"saved {plot}")
