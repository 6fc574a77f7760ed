"""The commands together, and what becomes of their errors."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dipnet import __version__
from dipnet.cli.console import complain, err
from dipnet.cli.demo import demo
from dipnet.cli.evaluate import evaluate
from dipnet.cli.fit import fit_split
from dipnet.cli.info import info
from dipnet.cli.run import run
from dipnet.errors import DipnetError

ABOUT = (
    "Sparse LLM inference on Hugging Face models: a token reads only the weights it needs.\n\n"
    "MODEL is a hub id or a local folder; without it, the bundled demo-swiglu (the other bundled "
    "one is demo-relu). A method is written NAME or NAME:key=value,key=value."
)


class Commands(TyperGroup):
    """Runs a command, and turns the errors that dipnet raises on purpose into one line each."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; 2 after an error, 130 after an interruption, 1 after a closed pipe."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except DipnetError as error:
            complain("error", str(error))
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            err.print("\ndipnet: interrupted")
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # Nobody reads any more; the interpreter's own flush at exit must not complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Commands,
    help=ABOUT,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dipnet {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version"),
    ] = False,
) -> None:
    """Take the options that come before a command."""


app.command("run")(run)
app.command("eval")(evaluate)
app.command("info")(info)
app.command("fit-split")(fit_split)
app.command("demo")(demo)


def main() -> None:
    """Run the command line on the process's arguments and exit."""
    app(prog_name="dipnet")
