"""The options that several commands share, and what they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dipnet.registry import METHODS

FLAG = ""
"""The metavar of an option that takes no value: none."""
METHOD_HELP = f"NAME or NAME:key=value,... of {', '.join(METHODS)} (docs/methods.md)"
DENSITY_HELP = "Share of the MLP's weights to read (teal: of all the block's)"
MAX_SEED = 2**32 - 1

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Hub id, local folder, or a store; default: the bundled demo-swiglu",
        show_default=False,
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Hub id, local folder, or a bundled model; default: demo-swiglu",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps; auto: a GPU if there is one")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: the checkpoint's")]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of everything random")]
Json = Annotated[
    bool,
    typer.Option("--json", metavar=FLAG, help="Print one JSON object, and nothing else on stdout"),
]
Backend = Annotated[
    str,
    typer.Option(
        help="What computes a step: reference (all of it, with masks), skip (what is kept, on a "
        "CPU), gpu (kernels), or auto: the fastest that serves"
    ),
]
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
    typer.Option("--density", help=f"{DENSITY_HELP}; repeatable", show_default=False),
]
OutFile = Annotated[Path, typer.Option("--out", metavar="FILE", help="The file to write")]
TextToFit = Annotated[
    Path, typer.Option("--text", metavar="FILE", help="Text to fit on; not the one to measure on")
]
LearnedText = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Text to fit on, not the one to be measured on; the bundled models bring one",
        show_default=False,
    ),
]
Tokens = Annotated[int, typer.Option(min=1, help="Use at most so many tokens of the text")]
Rate = Annotated[float, typer.Option(help="The highest learning rate")]
DividedMethod = Annotated[str, typer.Option(help="dip or wina, with options")]
