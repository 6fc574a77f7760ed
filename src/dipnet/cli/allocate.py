"""``dipnet fit allocation`` and ``dipnet fit scores``: where a budget of weights is best spent."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dipnet.cli.console import interruptible, out, print_json, quiet_libraries, titled_table
from dipnet.cli.inputs import check_window, fit_inputs, load_checkpoint
from dipnet.cli.methods import parse_method, unique
from dipnet.cli.options import (
    FLAG,
    Checkpoint,
    Densities,
    Device,
    DividedMethod,
    Dtype,
    Json,
    LearnedText,
    OutFile,
    Seed,
    Tokens,
    Window,
)
from dipnet.cli.progress import step_progress
from dipnet.errors import InputError
from dipnet.files import check_writable

if TYPE_CHECKING:
    from dipnet.methods.allocation import Allocation
    from dipnet.methods.dip import DIP

ALLOCATION_SCHEMA = "dipnet.fit-allocation/1"
SCORES_SCHEMA = "dipnet.fit-scores/1"
DEFAULT_DENSITY = 0.5
TOKENS = 131_072

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
    method: DividedMethod = "dip",
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

    with interruptible(file), step_progress("dividing") as moved:
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
            progress=_with_divergence(moved),
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
        made = norm_scores(load_checkpoint(model, device, dtype).model, built)
    else:
        loaded, used = fit_inputs(model, text, tokens, device, dtype)
        from dipnet.adapt.scores import fit_scores as fit
        from dipnet.eval.texts import bos_token

        with interruptible(file), step_progress("learning") as moved:
            made = fit(
                loaded.model,
                built,
                used.tokens,
                window=check_window(loaded, window),
                bos=bos_token(loaded.tokenizer),
                batch_size=batch_size,
                steps=steps,
                seed=seed,
                progress=_with_divergence(moved),
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


def _with_divergence(moved: Callable[[int, int, str], None]) -> Callable[[int, int, float], None]:
    """What moves a bar, and tells the divergence of the last step."""
    return lambda done, total, value: moved(done, total, f", KL {value:.4f}")


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
