"""The options that several commands share, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Hub id or local folder; default: the bundled demo-swiglu",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: the checkpoint's")]
Seed = Annotated[int, typer.Option(help="Seed of everything random")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead")]
Calibration = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text that methods with thresholds or static masks are fitted on; "
        "the bundled models bring one",
        show_default=False,
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        min=2, help="Tokens of a window; default: the context, at most 2048", show_default=False
    ),
]
Densities = Annotated[
    list[float] | None,
    typer.Option("--density", help="Share of the MLP's weights to read; repeatable"),
]
