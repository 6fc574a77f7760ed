"""``dipnet rotate``: a checkpoint whose residual stream is in a basis that suits masks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dipnet.cli.console import err, out, print_json
from dipnet.cli.inputs import check_window, fit_inputs
from dipnet.cli.options import Checkpoint, Device, Dtype, Json, LearnedText, Tokens, Window
from dipnet.errors import InputError

SCHEMA = "dipnet.rotate/1"


def rotate(
    folder: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="The new folder of the checkpoint")
    ],
    model: Checkpoint = None,
    text: LearnedText = None,
    tokens: Tokens = 32_768,
    window: Window = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Rotate a checkpoint: the same function, with MLP inputs of which fewer channels matter.

    What is written is an ordinary checkpoint, for every command and for plain transformers.

    Example: dipnet rotate --text valid.txt --out rotated
    """
    if folder.exists():
        raise InputError(f"{folder} exists already: name a new folder")
    loaded, used = fit_inputs(model, text, tokens, device, dtype)
    from dipnet.adapt.rotation import rotate as turn
    from dipnet.adapt.rotation import save
    from dipnet.eval.texts import bos_token

    with err.status("rotating"):
        found = turn(
            loaded.model,
            used.tokens,
            window=check_window(loaded, window),
            bos=bos_token(loaded.tokenizer),
        )
        save(folder, loaded.model, loaded.tokenizer)
    said = {"before": found.before, "after": found.after}
    if json:
        about = {"schema": SCHEMA, "model": loaded.name, "out": str(folder)}
        print_json({**about, "text": used.as_json(), "held_by_half_the_channels": said})
    else:
        out.print(
            f"{folder}: half of an input's channels hold {found.after:.1%} of it, before "
            f"{found.before:.1%}",
            markup=False,
            soft_wrap=True,
        )
