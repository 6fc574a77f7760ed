"""``dipnet fit allocation`` and ``dipnet fit scores``: where a budget of weights is best spent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dipnet.cli.console import err, note, out, print_json, quiet_libraries, titled_table
from dipnet.cli.inputs import calibration_text, check_window, load
from dipnet.cli.methods import parse_method, unique
from dipnet.cli.options import FLAG, Checkpoint, Densities, Device, Dtype, Json, Seed, Window
from dipnet.errors import InputError
from dipnet.files import check_writable

if TYPE_CHECKING:
    from dipnet.eval.texts import TokenText
    from dipnet.methods.allocation import Allocation
    from dipnet.methods.dip import DIP
    from dipnet.models.load import LoadedModel

ALLOCATION_SCHEMA = "dipnet.fit-allocation/1"
SCORES_SCHEMA = "dipnet.fit-scores/1"
DEFAULT_DENSITY = 0.5
TOKENS = 131_072
MOST_CHARACTERS = 16
"""Characters of a text that are read for every token that is wanted of it: four are usual."""

OutFile = Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write")]
LearnedText = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text to fit on, not the one to be measured on; the bundled models bring one",
        show_default=False,
    ),
]
Tokens = Annotated[int, typer.Option(min=1, help="Use at most so many tokens of the text")]
Steps = Annotated[int, typer.Option(min=1, help="Passes there and back, for each density")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Windows of one pass")]


class Kind(StrEnum):
    """What scores are made of."""

    NORM = "norm"
    LEARNED = "learned"


def fit_allocation(
    file: OutFile,
    model: Checkpoint = None,
    text: LearnedText = None,
    method: Annotated[str, typer.Option(help="dip or wina, with options")] = "dip",
    density: Densities = None,
    attention: Annotated[
        bool,
        typer.Option(
            "--attention",
            metavar=FLAG,
            help="Prune attention's inputs too: the density is of all linear weights",
        ),
    ] = False,
    tokens: Tokens = TOKENS,
    steps: Steps = 40,
    batch_size: Batch = 8,
    window: Window = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Divide a budget of weights among the layers' sites, by what they are worth on a text.

    It is used as --method dip:allocation=FILE in the other commands, at any density. An interrupted
    fit writes nothing.

    Example: dipnet fit allocation --text valid.txt --density 0.5 --density 0.4 --out half.json
    """
    check_writable(file)
    request = parse_method(method)
    densities = unique(density or [DEFAULT_DENSITY])
    built = _method(request.build(densities[0]), request.label)
    loaded, used = fit_inputs(model, text, tokens, device, dtype)
    from dipnet.adapt.allocation import fit_allocation as fit
    from dipnet.eval.texts import bos_token

    with _interruptible(file), _progress("dividing") as progress:
        made = fit(
            loaded.model,
            built,
            densities,
            used.tokens,
            attention=attention,
            window=check_window(loaded, window),
            bos=bos_token(loaded.tokenizer),
            batch_size=batch_size,
            steps=steps,
            seed=seed,
            progress=progress,
        )
    about = {"source": loaded.name, "method": request.label, "text": used.as_json()}
    made = made.model_copy(update={"fit": {**about, **made.fit}})
    made.save(file)
    if json:
        said = made.model_dump(mode="json")
        print_json({"schema": ALLOCATION_SCHEMA, "out": str(file), **said})
    else:
        _show_allocation(made, file)


def fit_scores(
    file: OutFile,
    model: Checkpoint = None,
    text: LearnedText = None,
    kind: Annotated[
        Kind, typer.Option(help="norm: of the columns; learned: from there, on a text")
    ] = Kind.LEARNED,
    method: Annotated[str, typer.Option(help="dip, with options")] = "dip",
    density: Annotated[float, typer.Option(help="Share of the MLP's weights to read")] = 0.5,
    tokens: Tokens = TOKENS,
    steps: Steps = 100,
    batch_size: Batch = 8,
    window: Window = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Fit what DIP multiplies magnitudes with before it compares them: a factor for each channel.

    They are used as --method dip:scores=FILE in the other commands, on packed models too. An
    interrupted fit writes nothing.

    Example: dipnet fit scores --kind norm --out norms.safetensors
    """
    check_writable(file)
    request = parse_method(method)
    built = _method(request.build(density if request.takes_density else None), request.label)
    if kind is Kind.NORM:
        from dipnet.adapt.scores import norm_scores

        quiet_libraries()
        made = norm_scores(_checkpoint(model, device, dtype).model, built)
    else:
        loaded, used = fit_inputs(model, text, tokens, device, dtype)
        from dipnet.adapt.scores import fit_scores as fit
        from dipnet.eval.texts import bos_token

        with _interruptible(file), _progress("learning") as progress:
            made = fit(
                loaded.model,
                built,
                used.tokens,
                window=check_window(loaded, window),
                bos=bos_token(loaded.tokenizer),
                batch_size=batch_size,
                steps=steps,
                seed=seed,
                progress=progress,
            )
    made.save(file)
    if json:
        print_json({"schema": SCORES_SCHEMA, "out": str(file), **made.fit})
        return
    found = made.fit.get("divergence", {})
    said = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
    out.print(f"{file}: {made.fit['kind']}", markup=False, soft_wrap=True)
    if said:
        out.print(f"KL to the dense model, nats a token: {said}", markup=False, soft_wrap=True)


def _method(method: object, label: str) -> DIP:
    from dipnet.methods.dip import DIP

    if not isinstance(method, DIP):
        raise InputError(f"{label} has no division or scores to fit: use dip or wina")
    return method


def fit_inputs(
    model: str | None, text: Path | None, count: int, device: str, dtype: str
) -> tuple[LoadedModel, TokenText]:
    """The model, and the first tokens of the text that is fitted on."""
    quiet_libraries()
    from dipnet.eval.texts import TokenText, tokenize

    content = calibration_text(model, text)
    if content is None:
        raise InputError(f"what shall be fitted on for {model!r}? give --text")
    loaded = _checkpoint(model, device, dtype)
    read = tokenize(loaded.tokenizer, content.content[: count * MOST_CHARACTERS])
    return loaded, TokenText(content, read).first(count)


def _checkpoint(model: str | None, device: str, dtype: str) -> LoadedModel:
    """The model; InputError for a store, which never holds the dense one."""
    from dipnet.streaming.packed import is_store

    if model is not None and is_store(model):
        raise InputError(
            f"{model!r} is a packed model: fit on the checkpoint that it was packed from; the "
            "packed model takes the file, too"
        )
    return load(model, device, dtype)


@contextmanager
def _interruptible(file: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        note(f"nothing was written to {file}")
        raise


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int, float], None]]:
    """A bar on a terminal: steps, and the divergence of the last."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn(title),
        BarColumn(),
        TextColumn("{task.completed:,} of {task.total:,} steps, KL {task.fields[value]:.4f}"),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=0, value=0.0)
        yield lambda done, total, value: bar.update(task, completed=done, total=total, value=value)


def _show_allocation(made: Allocation, file: Path) -> None:
    """Print the densities of every layer, and what they won."""
    found: list[Any] = made.fit["points"]  # type: ignore[assignment]
    for point in made.points:
        won = next(each for each in found if each["density"] == point.density)
        table = titled_table(
            f"density {point.density:g}: KL {won['uniform']:.4f} alike in all layers, "
            f"{won['allocated']:.4f} divided",
            [],
            ["layer", *made.names],
        )
        for layer in range(made.model.layers):
            shares = (shares[layer] for shares in point.sites.values())
            table.add_row(str(layer), *(f"{share:.3f}" for share in shares))
        out.print(table)
    out.print(f"{file}: use it as --method dip:allocation={file}", markup=False, soft_wrap=True)
