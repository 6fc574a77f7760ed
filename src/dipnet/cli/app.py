"""The commands together, and what becomes of their errors."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from dipnet import __version__
from dipnet.cli.adapt import adapt
from dipnet.cli.allocate import fit_allocation, fit_scores
from dipnet.cli.check import check
from dipnet.cli.console import complain, err
from dipnet.cli.demo import demo
from dipnet.cli.evaluate import evaluate
from dipnet.cli.fit import fit_split
from dipnet.cli.fit_predictors import fit_predictors
from dipnet.cli.info import info
from dipnet.cli.options import FLAG
from dipnet.cli.pack import pack
from dipnet.cli.plan import plan
from dipnet.cli.probe import probe
from dipnet.cli.rotate import rotate
from dipnet.cli.run import run
from dipnet.cli.simulate import simulate
from dipnet.cli.thresholds import fit_thresholds
from dipnet.errors import DipnetError

ABOUT = (
    "Sparse LLM inference on Hugging Face models: a token reads only the weights it needs.\n\n"
    "MODEL is a hub id or a local folder; without it, the bundled demo-swiglu (the other bundled "
    "one is demo-relu). A method is written NAME or NAME:key=value,key=value."
)


UsageError: Any = typer.BadParameter.__base__
"""What a command line that cannot be read raises: click's, or Typer's own copy of click's."""


class Command(TyperCommand):
    """A command whose ``--help`` is a flag like ours, and whose usage errors know it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments; some of Typer's errors do not say of which command they are."""
        try:
            return super().parse_args(ctx, args)
        except UsageError as error:
            error.ctx = error.ctx or ctx
            raise

    def get_help_option(self, ctx: Any) -> Any:
        """The help option."""
        return _as_flag(super().get_help_option(ctx))


class Commands(TyperGroup):
    """Runs a command, and turns the errors that dipnet raises on purpose into one line each."""

    def get_help_option(self, ctx: Any) -> Any:
        """The help option."""
        return _as_flag(super().get_help_option(ctx))

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


def _as_flag(option: Any) -> Any:
    if option is not None:
        option.metavar = FLAG
    return option


app = typer.Typer(
    cls=Commands,
    help=ABOUT,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


fit = typer.Typer(
    cls=Commands,
    help="Fit on a text what methods need: DIP's split, allocation, scores and thresholds, "
    "Deja Vu's predictors",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
fit.command("split", cls=Command)(fit_split)
fit.command("allocation", cls=Command)(fit_allocation)
fit.command("scores", cls=Command)(fit_scores)
fit.command("thresholds", cls=Command)(fit_thresholds)
fit.command("predictors", cls=Command)(fit_predictors)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dipnet {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar=FLAG,
            callback=_print_version,
            is_eager=True,
            help="Print the version",
        ),
    ] = False,
) -> None:
    """Take the options that come before a command."""


app.command("run", cls=Command)(run)
app.command("eval", cls=Command)(evaluate)
app.command("info", cls=Command)(info)
app.command("pack", cls=Command)(pack)
app.command("check", cls=Command)(check)
app.add_typer(fit, name="fit")
app.command("adapt", cls=Command)(adapt)
app.command("rotate", cls=Command)(rotate)
app.command("simulate", cls=Command)(simulate)
app.command("probe", cls=Command)(probe)
app.command("plan", cls=Command)(plan)
app.command("demo", cls=Command)(demo)


def main() -> None:
    """Run the command line on the process's arguments, or show the help, and exit."""
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="dipnet", standalone_mode=False)
    except UsageError as error:
        code = _usage(error)
    sys.exit(code)


def _usage(error: Any) -> int:
    """Say in one line what is wrong with the command line."""
    command = error.ctx.command_path if error.ctx else "dipnet"
    complain("error", f"{error.format_message().rstrip('.')} (see {command} --help)")
    return 2
