"""``dipnet plan``: the fastest settings of a model inside a budget and a bound on perplexity."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dipnet.cli.console import json_text, note, out, quiet_libraries, stream
from dipnet.cli.inputs import check_window, is_bundled, tokens_of
from dipnet.cli.options import Json, Model, Window
from dipnet.cli.planned import Stores
from dipnet.cli.probe import probe_progress
from dipnet.cli.progress import window_progress
from dipnet.cli.streamed import Kind, Memory, Streaming, Weights, shapes_of, source_of
from dipnet.cli.texts import TextFile
from dipnet.errors import InputError
from dipnet.files import check_writable, write_file

if TYPE_CHECKING:
    from torch import Tensor

    from dipnet.adapt.plan import Choice
    from dipnet.adapt.trials import Task, Trials
    from dipnet.eval.texts import Text
    from dipnet.methods.dip import DIP
    from dipnet.sim.device import Device
    from dipnet.streaming.budget import Needs
    from dipnet.streaming.plan import Plan

DEFAULT_INCREASE = "1%"
DEFAULT_WEIGHTS = Kind.INT4
WINDOW = 256
WINDOWS = 8


def plan(
    model: Model = None,
    memory: Memory = None,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Or the size of the record cache alone: 64MiB; neither: everything in memory",
            show_default=False,
        ),
    ] = None,
    max_ppl_increase: Annotated[
        str,
        typer.Option(
            metavar="SHARE", help="Bound on the perplexity's increase over the dense model's"
        ),
    ] = DEFAULT_INCREASE,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE",
            help="Where it will run: a preset, or a file that dipnet probe wrote; default: this "
            "machine, which is measured first",
            show_default=False,
        ),
    ] = None,
    weights: Weights = None,
    text: TextFile = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens that keys and values are kept for; default: the model's, at most 1024",
            show_default=False,
        ),
    ] = None,
    window: Window = None,
    windows: Annotated[
        int, typer.Option(min=3, help="Windows of text that each candidate is measured on")
    ] = WINDOWS,
    allocation: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Divide densities as dipnet fit allocation says; default: the store's own",
            show_default=False,
        ),
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Score as dipnet fit scores says", show_default=False),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="Write the plan here", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Find the fastest settings inside a budget and a bound on perplexity, and say why.

    Density, its division between the two masks, γ, the caches and the size of records are searched;
    perplexity is measured, speed simulated. The plan is for --plan of dipnet run.

    Example: dipnet plan meta-llama/Llama-3.1-8B --memory 4GiB --text train.txt --out plan.json

    Example: dipnet plan demo-swiglu --cache 4MiB --max-ppl-increase 5% --device phone
    """
    bound = _bound(max_ppl_increase)
    if file is not None:
        check_writable(file)
    given = _device(device)
    quiet_libraries()
    streaming = _streaming(model, memory, cache, weights)
    content = _text(model, text)
    method = _planned_method(allocation, scores)
    store = streaming.open(model)
    _check_columns(store, method)
    needs = _needs(store, context)
    room = _room(needs, streaming)
    measured, bos = _windows(store, content, window, windows)
    simulated = given or _probed(store)
    with Stores(model, store) as stores, tempfile.TemporaryDirectory(prefix="dipnet-") as folder:
        from dipnet.adapt.plan_report import plan_of
        from dipnet.adapt.trials import Task

        made = stores.makers()
        kept = _context(store, context)
        task = Task(store, simulated, room, kept, bound, measured, bos, made, allocation, scores)
        trials, choice = _choose(task, Path(folder))
        sizes = streaming.as_json()
        found = plan_of(choice, trials, needs, sizes["memory"], sizes["cache"], content)
        stores.keep(found.block)
        _deliver(found, choice, trials, file, json=json)


def _bound(text: str) -> float:
    """The share of ``1%`` or ``0.01``; InputError for anything else."""
    percent = text.strip().endswith("%")
    try:
        share = float(text.strip().removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf"):
        raise InputError(f"--max-ppl-increase {text}: write a share such as 1% or 0.01")
    return share


def _planned_method(allocation: Path | None, scores: Path | None) -> DIP:
    """What is planned, at some density; InputError for files that are none."""
    from dipnet.methods.dip import DIP

    return DIP(0.5, allocation=allocation, scores=scores)


def _check_columns(store: Path, method: DIP) -> None:
    """Raise InputError for a store that DIP, which is planned, cannot run from."""
    from dipnet.models.families import describe
    from dipnet.store.index import read_index
    from dipnet.streaming.methods import fitted_method

    index = read_index(store)
    if index.unit == "neuron":
        raise InputError(
            f"{str(store)!r} holds whole neurons, and dipnet plan plans dip, which takes columns: "
            "pack the model without --unit neuron"
        )
    fitted_method(method, store, index, describe(shapes_of(store).model))


def _device(name: str | None) -> Device | None:
    from dipnet.sim.device import load_device

    return None if name is None else load_device(name)


def _streaming(
    model: str | None, memory: str | None, cache: str | None, weights: Kind | None
) -> Streaming:
    """The store's options: a checkpoint is packed as int4, unless something else is asked for."""
    from dipnet.models.load import DEFAULT_MODEL
    from dipnet.streaming.packed import is_store

    if weights is None and not is_store(model or DEFAULT_MODEL):
        weights = DEFAULT_WEIGHTS
    streaming = Streaming(memory, cache, weights=weights)
    streaming.streams(model, "auto", "auto")
    return streaming


def _text(model: str | None, file: Path | None) -> Text:
    """The text that is planned on; for a bundled model not the one that is measured on."""
    from dipnet.eval.texts import bundled_text, read_text
    from dipnet.models.load import check_name

    if file:
        return read_text(file)
    source = source_of(model)
    if source is None or is_bundled(source):
        return bundled_text("calibration")
    if source == model:
        check_name(source)
    raise InputError(f"what shall {model!r} be planned on? give --text")


def _needs(store: Path, context: int | None) -> Needs:
    """What the model takes beside its caches, before anything else is loaded."""
    from dipnet.streaming.load import measured_needs

    return measured_needs(store, context)


def _room(needs: Needs, streaming: Streaming) -> int | None:
    """Bytes for the caches; InputError when the budget has none."""
    sizes = streaming.as_json()
    if sizes["memory"] is not None:
        return needs.left(sizes["memory"])
    return sizes["cache"]


def _context(store: Path, context: int | None) -> int:
    from dipnet.store.index import read_index
    from dipnet.streaming.load import DEFAULT_CONTEXT

    return context or min(read_index(store).context, DEFAULT_CONTEXT)


def _windows(
    store: Path, content: Text, window: int | None, count: int
) -> tuple[list[Tensor], int | None]:
    """The first windows of the text, and the token that each begins with."""
    from dipnet.adapt.trials import check_windows
    from dipnet.eval.texts import bos_token

    loaded = shapes_of(store)
    size = window or min(WINDOW, check_window(loaded, None))
    check_window(loaded, size)
    bos = bos_token(loaded.tokenizer)
    body = size - (bos is not None)
    tokens = tokens_of(loaded, content).tokens
    found = list(tokens[: len(tokens) // body * body].split(body))[:count]
    check_windows(len(found), size)
    return found, bos


def _probed(store: Path) -> Device:
    """This machine, with the disk that the store is on."""
    from dipnet.eval.probe import probe

    note("measuring this machine, in under a minute (--device FILE takes what dipnet probe wrote)")
    with probe_progress() as progress:
        return probe(store.absolute().parent, "this machine", progress)


def _choose(task: Task, folder: Path) -> tuple[Trials, Choice]:
    """The choice, with a progress bar in windows of text."""
    from dipnet.adapt.plan import choose, evaluations
    from dipnet.adapt.trials import Trials

    with window_progress() as bar:
        at = bar.add_task("")
        begun = time.monotonic()

        def started(what: str) -> None:
            bar.update(at, description=what)
            if what != "dense" and not told:
                told.append(time.monotonic() - begun)
                left = told[0] * (count - 1) / 60
                note(f"about {count} evaluations of the text, {left:.1f} minutes or less")

        told: list[float] = []
        trials = Trials(task, folder, started, lambda done: bar.advance(at, done))
        count = evaluations(streaming=trials.streaming, blocks=len(task.blocks))
        bar.update(at, total=count * len(task.windows))
        return trials, choose(trials)


def _deliver(found: Plan, choice: Choice, trials: Trials, file: Path | None, *, json: bool) -> None:
    """Write the plan, and show it."""
    written = json_text(found.model_dump(mode="json"))
    if file is not None:
        write_file(file, written)
    if json:
        stream(written)
    else:
        _show(found, choice, trials)
    if file is not None:
        note(f"saved {file}, for --plan of dipnet run")


def _show(found: Plan, choice: Choice, trials: Trials) -> None:
    """The candidates, the reason, and what is promised."""
    from rich.table import Table

    from dipnet.adapt.plan_report import reason, summary, table

    text = found.text
    out.print(
        f"{found.model.source} in {found.weights}, {text.name}: {text.windows} windows of "
        f"{text.window} tokens, perplexity at most {found.max_increase:+.2%}",
        style="bold",
        markup=False,
        soft_wrap=True,
    )
    out.print(table(choice, trials))
    out.print(reason(choice, found.max_increase), markup=False, soft_wrap=True)
    grid = Table.grid(padding=(0, 2))
    for name, value in summary(found).items():
        grid.add_row(f"[dim]{name}[/]", value)
    out.print()
    out.print(grid)
