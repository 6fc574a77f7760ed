"""``dipnet fit thresholds``: how large a score must be, where no top-k decides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dipnet.cli.console import interruptible, out, print_json
from dipnet.cli.inputs import check_window, fit_inputs
from dipnet.cli.methods import parse_method, unique
from dipnet.cli.options import (
    Checkpoint,
    Densities,
    Device,
    Dtype,
    Json,
    LearnedText,
    OutFile,
    Tokens,
    Window,
)
from dipnet.cli.progress import step_progress
from dipnet.errors import InputError
from dipnet.files import check_writable

if TYPE_CHECKING:
    from dipnet.methods.dip_threshold import DIPThreshold

SCHEMA = "dipnet.fit-thresholds/1"
DEFAULT_DENSITY = 0.5
TOKENS = 65_536


def fit_thresholds(
    file: OutFile,
    model: Checkpoint = None,
    text: LearnedText = None,
    method: Annotated[str, typer.Option(help="dip-threshold, with options")] = "dip-threshold",
    density: Densities = None,
    tokens: Tokens = TOKENS,
    window: Window = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Fit the thresholds that keep a share of the MLP's weights in the mean over a text.

    They are used as --method dip-threshold:fitted=FILE in the other commands, on packed models too,
    with the scores that they were fitted with. An interrupted fit writes nothing.

    Example: dipnet fit thresholds --text valid.txt --density 0.5 --density 0.4 --out above.json
    """
    check_writable(file)
    request = parse_method(method)
    densities = unique(density or [DEFAULT_DENSITY])
    built = _method(request.build(densities[0]), request.label)
    loaded, used = fit_inputs(model, text, tokens, device, dtype)
    from dipnet.adapt.thresholds import fit_thresholds as fit
    from dipnet.eval.texts import bos_token

    with interruptible(file), step_progress("fitting") as moved:
        made = fit(
            loaded.model,
            built,
            densities,
            used.tokens,
            window=check_window(loaded, window),
            bos=bos_token(loaded.tokenizer),
            progress=moved,
        )
    about = {"source": loaded.name, "method": request.label, "text": used.as_json()}
    made = made.model_copy(update={"fit": {**about, **made.fit}})
    made.save(file)
    if json:
        print_json({"schema": SCHEMA, "out": str(file), **made.model_dump(mode="json")})
        return
    listed = ", ".join(f"{each.point.density:g}" for each in made.fitted)
    out.print(f"thresholds for density {listed}", markup=False, soft_wrap=True)
    out.print(
        f"{file}: use it as --method dip-threshold:fitted={file}", markup=False, soft_wrap=True
    )


def _method(method: object, label: str) -> DIPThreshold:
    from dipnet.methods.dip_threshold import DIPThreshold

    if not isinstance(method, DIPThreshold):
        raise InputError(f"{label} has no thresholds to fit before: use dip-threshold")
    return method
