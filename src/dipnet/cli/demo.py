"""``dipnet demo``: what sparse inference is, shown on the bundled models in two minutes."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dipnet.cli.console import json_text, out, stream, titled_table
from dipnet.cli.demo_streamed import show_streamed
from dipnet.cli.inputs import calibration_text, calibration_tokens, load, tokens_of
from dipnet.cli.methods import parse_method
from dipnet.cli.sweeping import measure, needs_calibration, plan_jobs, show
from dipnet.files import check_writable, make_folder, write_file

if TYPE_CHECKING:
    from dipnet.eval.generate import Generation
    from dipnet.eval.report import Report
    from dipnet.eval.sweep import Measured
    from dipnet.methods.base import Method
    from dipnet.models.load import LoadedModel

SCHEMA = "dipnet.demo/1"
PICTURE, FIGURES = "perplexity.png", "demo.json"
PROMPT = "The old man looked out at the sea, and"
NEW_TOKENS = 100
TEMPERATURE = 0.8
SEED = 0
DENSITY = 0.5
DENSITIES = (0.8, 0.67, 0.5, 0.4, 0.3)
SWEEPS = {
    "demo-swiglu": ("glu-oracle", "dip", "gate", "cats"),
    "demo-relu": ("glu-oracle", "dip"),
}
"""Methods measured on each model; the ReLU model has no gate for gate and cats to look at."""
WINDOWS = 8
CALIBRATION_TOKENS = 8192
"""Few windows and a short calibration, so that two cores are done in two minutes."""

INTRODUCTION = """\
A dense model reads every weight for every token. With Dynamic Input Pruning (DIP) a token reads
only the weights that matter to it: those of the largest inputs of each MLP matrix, chosen anew for
each token, without any training. You will see a small model ({parameters:.0f} M parameters, trained
on old books) continue a text with all its weights, then with half of its MLP weights; what that
does to its perplexity on text it has never seen; how DIP compares with other methods; and then the
same model again, read from disk while it writes.
"""
SPEED = """\
The tokens/s are those of the reference backend. It computes the masks and the exact result, but
still reads every weight of a model that fits in memory: so DIP saves no time here. Its densities
are what an engine saves that skips the dropped weights; there is one below.
"""


def demo(
    out_folder: Annotated[
        Path, typer.Option("--out", metavar="DIR", help=f"Where {PICTURE} and {FIGURES} go")
    ] = Path("out/demo"),
) -> None:
    """Show sparse inference on the bundled models: text, figures and a picture.

    Example: dipnet demo --out out/demo
    """
    folder = make_folder(out_folder)
    check_writable(folder / PICTURE)
    loaded = load("demo-swiglu", "auto", "auto")
    parameters = loaded.model.num_parameters() / 1e6
    out.print("\n[bold]dipnet: sparse inference on a small language model[/]\n")
    out.print(INTRODUCTION.format(parameters=parameters), soft_wrap=True, markup=False)
    texts = {label: _continue(loaded, label) for label in ("dense", "dip")}
    reports = [_measure(loaded), _measure(load("demo-relu", "auto", "auto"))]
    _print_comparison(reports, texts)
    for report in reports:
        show(report)
    streamed = show_streamed(PROMPT)
    _save(folder, reports, texts, streamed)
    _print_next(folder)


def _method(label: str) -> Method:
    request = parse_method(label)
    return request.build(DENSITY if request.takes_density else None)


def _continue(loaded: LoadedModel, label: str) -> Generation:
    """Continue the prompt with a method; the text streams under a heading."""
    from dipnet.eval.generate import Sampling, encode_prompt, generate
    from dipnet.models.attach import sparsify

    heading = "all weights" if label == "dense" else f"{label}, {DENSITY:.0%} of the MLP's weights"
    out.rule(f"[bold]{heading}[/]", align="left")
    out.print(PROMPT, style="dim", end="", soft_wrap=True)
    with sparsify(loaded.model, _method(label), prefill="dense"):
        made = generate(
            loaded,
            encode_prompt(loaded, PROMPT),
            max_new_tokens=NEW_TOKENS,
            sampling=Sampling(TEMPERATURE, seed=SEED),
            write=stream,
        )
    stream("\n\n")
    return made


def _measure(loaded: LoadedModel) -> Report:
    """The model's methods at every density, on the bundled held-out text."""
    from dipnet.eval.report import Report
    from dipnet.eval.sweep import Setting
    from dipnet.eval.texts import bundled_text

    setting = Setting(loaded.context, loaded.context, batch_size=WINDOWS)
    text = tokens_of(loaded, bundled_text("heldout"))
    used = setting.first(text.tokens, WINDOWS)
    jobs = plan_jobs(loaded, map(parse_method, SWEEPS[loaded.name]), DENSITIES)
    calibration = None
    if needs_calibration(jobs):
        calibration = calibration_tokens(loaded, calibration_text(loaded.name, None))
    if calibration:
        calibration = calibration.first(CALIBRATION_TOKENS)
    rows = measure(loaded, jobs, used, setting, calibration)
    return Report(loaded, text, setting, setting.count(used), SEED, rows, calibration)


def _print_comparison(reports: list[Report], texts: dict[str, Generation]) -> None:
    """Dense against DIP at half of the MLP's weights, for both models."""
    made = titled_table(
        "All weights against half of the MLP's",
        ["model", "method"],
        ["MLP density", "all weights", "held-out perplexity", "× dense", "tokens/s"],
    )
    for report in reports:
        for label in texts:
            figures = _row(report, label)
            ratio = figures.perplexity.perplexity / report.dense.perplexity.perplexity
            speed = texts[label].tokens_per_second if report is reports[0] else None
            made.add_row(
                report.loaded.name,
                label,
                f"{figures.density.mlp:.3f}",
                f"{figures.density.total:.3f}",
                f"{figures.perplexity.perplexity:.2f}",
                f"{ratio:.3f}",
                f"{speed:.1f}" if speed else "–",
            )
    out.print(made)
    out.print(SPEED, style="dim", soft_wrap=True)


def _row(report: Report, label: str) -> Measured:
    """The figures of the dense model, or of a method at the demo's density."""
    rows = (row for row in report.rows if row.label == label)
    figures = next(row.measured for row in rows if row.density in (None, DENSITY))
    assert figures is not None, "dense and DIP can always be measured"
    return figures


def _save(
    folder: Path,
    reports: list[Report],
    texts: dict[str, Generation],
    streamed: list[dict[str, Any]],
) -> None:
    from dipnet.eval.plot import Panel, draw
    from dipnet.eval.report import as_json

    panels = [Panel(f"{report.loaded.name}, held-out text", report.rows) for report in reports]
    write_file(folder / PICTURE, draw(panels))
    figures = {
        "schema": SCHEMA,
        "prompt": PROMPT,
        "temperature": TEMPERATURE,
        "seed": SEED,
        "generated": [_generation_json(label, made) for label, made in texts.items()],
        "evaluations": [as_json(report) for report in reports],
        "streamed": streamed,
    }
    write_file(folder / FIGURES, json_text(figures))


def _generation_json(label: str, made: Generation) -> dict[str, Any]:
    return {
        "method": label,
        "density_asked": None if label == "dense" else DENSITY,
        "text": made.text,
        "new_tokens": made.new_tokens,
        "tokens_per_second": made.tokens_per_second,
    }


def _print_next(folder: Path) -> None:
    program = _program()
    out.print(f"\nThe picture: {folder / PICTURE}", markup=False, soft_wrap=True)
    out.print(f"All figures: {folder / FIGURES}", markup=False, soft_wrap=True)
    out.print("\n[bold]Try next[/]")
    for command in (
        'run --prompt "The ship" --density 0.4 --temperature 0.8',
        "eval --method dip --method wina --density 0.5 --windows 32",
        "info demo-relu",
        'run --weights int4 --cache 4MiB --prompt "The ship"',
    ):
        out.print(f"  {program} {command}", markup=False, soft_wrap=True)


def _program() -> str:
    """How the user calls this program: by its name when that is found, else by its path."""
    if shutil.which("dipnet"):
        return "dipnet"
    return os.path.relpath(Path(sys.executable).with_name("dipnet"))
