"""``dipnet fit predictors``: what Deja Vu needs of a model, learned from a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from dipnet.cli.console import interruptible, out, print_json, quiet_libraries, titled_table
from dipnet.cli.inputs import check_window, fit_inputs
from dipnet.cli.options import (
    Checkpoint,
    Device,
    Dtype,
    Json,
    LearnedText,
    OutFile,
    Rate,
    Seed,
    Tokens,
    Window,
)
from dipnet.cli.progress import progress_bar
from dipnet.errors import InputError
from dipnet.files import check_writable
from dipnet.units import parse_size, size_text

SCHEMA = "dipnet.fit-predictors/1"
KINDS = {"mlp": "MLP neurons", "head": "attention heads"}


class Fitted(StrEnum):
    """Which predictors are fitted."""

    BOTH = "both"
    MLP = "mlp"
    HEADS = "heads"


class Measure(StrEnum):
    """What makes a unit matter to a token."""

    MAGNITUDE = "magnitude"
    GRADIENT = "gradient"


class Between(StrEnum):
    """What stands between a predictor's two matrices."""

    NONE = "none"
    RELU = "relu"


def fit_predictors(
    file: OutFile,
    model: Checkpoint = None,
    text: LearnedText = None,
    kind: Annotated[Fitted, typer.Option(help="What to predict: both, mlp or heads")] = Fitted.BOTH,
    mlp_density: Annotated[float, typer.Option(help="Share of neurons that will be kept")] = 0.2,
    head_density: Annotated[float, typer.Option(help="Share of heads that will be kept")] = 0.5,
    look_ahead: Annotated[int, typer.Option(help="Blocks ahead that they read: 0, 1 or 2")] = 1,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="Default: a quarter of the width, at most 1000", show_default=False
        ),
    ] = None,
    activation: Annotated[
        Between, typer.Option(help="Between their two matrices: none or relu")
    ] = Between.NONE,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="active|SHARE",
            help="Neurons that a token wants: not zero (default for ReLU), or a top share of them "
            "(default for others: the density)",
            show_default=False,
        ),
    ] = None,
    head_share: Annotated[
        float | None,
        typer.Option(help="Top share of heads that it wants; default: the density"),
    ] = None,
    magnitude: Annotated[
        float, typer.Option(help="Power of their magnitude by which wanted units count")
    ] = 1.0,
    positive_weight: Annotated[
        float, typer.Option(help="How much more a wanted unit counts than another")
    ] = 1.0,
    criterion: Annotated[
        Measure,
        typer.Option(help="A unit's magnitude, or that times the loss's gradient (ShadowLLM)"),
    ] = Measure.MAGNITUDE,
    tokens: Tokens = 400_000,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Default: 2 to 10, fewer for a long text", show_default=False),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Tokens of a step")] = 512,
    rate: Rate = 3e-3,
    buffer: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for activations; default: 1GiB, or what 8192 tokens need",
            show_default=False,
        ),
    ] = None,
    window: Window = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Fit predictors of the neurons and heads that a token will need, for dejavu.

    They are used as --method dejavu:mlp_density=0.2,predictors=FILE in the other commands. An
    interrupted fit writes nothing.

    Example: dipnet fit predictors demo-relu --text books.txt --out relu.predictors
    """
    settings: dict[str, Any] = {
        "mlp_density": None if kind is Fitted.HEADS else mlp_density,
        "head_density": None if kind is Fitted.MLP else head_density,
        "look_ahead": look_ahead,
        "rank": rank,
        "activation": activation.value,
        "target": _target(target),
        "head_share": head_share,
        "magnitude": magnitude,
        "positive_weight": positive_weight,
        "criterion": criterion.value,
        "epochs": epochs,
        "batch": batch,
        "rate": rate,
        "seed": seed,
        "buffer": parse_size(buffer) if buffer else None,
    }
    check_writable(file)
    quiet_libraries()
    import dipnet
    from dipnet.adapt.fit_settings import FitSettings
    from dipnet.eval.texts import bos_token

    FitSettings(**settings)
    loaded, used = fit_inputs(model, text, tokens, device, dtype)
    with interruptible(file), _progress() as progress:
        predictors = dipnet.fit_predictors(
            loaded.model,
            used.tokens,
            window=check_window(loaded, window),
            bos=bos_token(loaded.tokenizer),
            out=file,
            text=used.as_json(),
            progress=progress,
            **settings,
        )
    card = dict(predictors.card)
    if json:
        print_json({"schema": SCHEMA, "model": loaded.name, "out": str(file), **card})
    else:
        _show(card, file)


def _target(value: str | None) -> str | float | None:
    """``active`` or a share; InputError for anything else."""
    if value is None or value == "active":
        return value
    try:
        return float(value)
    except ValueError:
        raise InputError(f"--target is active or a share such as 0.2, not {value!r}") from None


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal for what is being done."""
    from rich.progress import TextColumn, TimeElapsedColumn, TimeRemainingColumn

    bar = progress_bar(
        TextColumn("{task.completed:,} of {task.total:,} {task.fields[unit]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    units = {"collecting": "tokens", "training": "steps"}
    with bar:
        tasks = {
            what: bar.add_task(what, total=0, unit=unit, start=False)
            for what, unit in units.items()
        }

        def update(what: str, done: int, total: int) -> None:
            bar.start_task(tasks[what])
            bar.update(tasks[what], completed=done, total=total)

        yield update


def _show(card: dict[str, Any], file: Path) -> None:
    """Print how good each layer's predictors are, and what they cost."""
    for kind, layers in card["held_out"].items():
        made = titled_table(
            f"{KINDS[kind]}, {layers[0]['density']:.3f} of them kept, on held-out text",
            [],
            ["layer", "wanted", "recall", "at most", "precision", "recall by weight"],
        )
        for row in layers:
            shown = (row[key] for key in ("wanted", "recall", "bound", "precision", "captured"))
            made.add_row(str(row["layer"]), *(f"{value:.3f}" for value in shown))
        out.print(made)
    tokens, seconds = card["tokens"]["trained"], card["seconds"]["total"]
    peaks = ", ".join(
        f"{size_text(size)} ({name})" for name, size in card["peak_memory_bytes"].items()
    )
    out.print(
        f"{file}: fitted on {tokens:,} tokens in {seconds:,.0f} s, at most {peaks} of memory",
        markup=False,
        soft_wrap=True,
    )
