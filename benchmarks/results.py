"""The tables and plots of docs/results.md: every method on both bundled models and two texts.

    python benchmarks/results.py --data FOLDER [--device auto] [--windows N]

FOLDER holds gutenberg/valid.txt, gutenberg/test.txt and wikitext2/wiki.test.tokens, plain or as
.xz. What is fitted (DIP's and WINA's split, thresholds, Wanda's masks; Deja Vu's predictors, once
for all densities) is fitted on the validation books, once for each model and density, and measured
on the two test texts. Writes docs/results/:
a JSON file for each model and text, a plot for each text, and tables.md. The last line is JSON.
The physical limit of an evaluation is the dense model's arithmetic at the rate of a large matrix
product, which is measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import lzma
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

import dipnet
from dipnet.adapt.ready import CALIBRATION_TOKENS, Fitter
from dipnet.cli.methods import MethodRequest, parse_method
from dipnet.errors import InputError
from dipnet.eval.plot import Panel, draw
from dipnet.eval.report import Report, as_json
from dipnet.eval.sweep import DENSE, Job, Row, Setting, sweep
from dipnet.eval.texts import Text, TokenText, tokenize
from dipnet.files import make_folder, write_file
from dipnet.models.load import DEMO_MODELS, LoadedModel, load_model
from dipnet.registry import METHODS

DENSITIES = (0.8, 0.67, 0.5, 0.4, 0.3)
VARIANTS = ("teal:attention=false", "wanda:pattern=2:4", "dejavu:allocation=scores")
TEXTS = {"gutenberg": "gutenberg/test.txt", "wikitext2": "wikitext2/wiki.test.tokens"}
VALIDATION = "gutenberg/valid.txt"
WINDOW = 512
PREDICTOR_TOKENS = 400_000
PREDICTED = 0.5
"""The density that predictors are fitted for, in the middle of those that are measured."""
OUT = Path(__file__).parent.parent / "docs" / "results"
console = Console(stderr=True)


@dataclass(frozen=True)
class Run:
    """What is the same for all measurements."""

    data: Path
    windows: int | None
    batch_size: int
    split_windows: int


def read(path: Path) -> Text:
    """The text of a file, plain or with .xz added to its name."""
    packed = path.with_name(path.name + ".xz")
    try:
        data = path.read_bytes() if path.is_file() else lzma.decompress(packed.read_bytes())
    except FileNotFoundError:
        raise SystemExit(f"there is neither {path} nor {packed}: see --help for --data") from None
    return Text(path.name, data.decode("utf-8"))


def methods() -> list[MethodRequest]:
    """Every registered method but the dense one, and the variants."""
    names = [name for name in METHODS if name != "dense"]
    return [parse_method(name) for name in (*names, *VARIANTS)]


@dataclass(frozen=True)
class Fitting:
    """The texts that methods are fitted on, the first tokens of the validation books."""

    calibration: TokenText
    split: TokenText
    predictors: TokenText

    @classmethod
    def of(cls, loaded: LoadedModel, run: Run) -> Fitting:
        """The model's tokens of both."""
        text = read(run.data / VALIDATION)
        whole = TokenText(text, tokenize(loaded.tokenizer, text.content))
        return cls(
            whole.first(CALIBRATION_TOKENS),
            whole.first(run.split_windows * WINDOW),
            whole.first(PREDICTOR_TOKENS),
        )

    def predicting(self, loaded: LoadedModel) -> dipnet.Predictors:
        """Predictors of the model's neurons."""
        settings = {"mlp_density": PREDICTED, "head_density": None, "window": WINDOW}
        return dipnet.fit_predictors(loaded.model, self.predictors.tokens, **settings)


def fitted_jobs(loaded: LoadedModel, fitting: Fitting, run: Run) -> Iterator[Job]:
    """Each method at each density, fitted on the validation text, or why it cannot be had."""
    yield DENSE
    fitter = Fitter(
        loaded.model,
        WINDOW,
        calibration=fitting.calibration.tokens,
        split_text=fitting.split.tokens,
        batch_size=run.batch_size,
    )
    predictors = fitting.predicting(loaded)
    grid = [(request, density) for request in methods() for density in DENSITIES]
    for request, density in track(grid, f"{loaded.name}: fitting", console=console):
        try:
            method = request.build(density)
            if isinstance(method, dipnet.DejaVu):
                method = replace(method, predictors=predictors)
            yield Job(request.label, density, fitter(method))
        except InputError as error:
            yield Job(request.label, density, None, str(error))


def measure(loaded: LoadedModel, jobs: list[Job], fitting: Fitting, name: str, run: Run) -> Report:
    """All jobs on one text."""
    setting = Setting(window=WINDOW, stride=WINDOW, batch_size=run.batch_size)
    text = read(run.data / TEXTS[name])
    tokens = setting.first(tokenize(loaded.tokenizer, text.content), run.windows)
    rows = sweep(loaded.model, jobs, tokens, setting, ready=lambda method: method)
    measured = list(track(rows, f"{loaded.name} on {name}", total=len(jobs), console=console))
    used = TokenText(text, tokens)
    windows = setting.count(tokens)
    return Report(loaded, used, setting, windows, 0, measured, fitting.calibration, fitting.split)


@dataclass(frozen=True)
class ModelResults:
    """One model's results, without the model: they cross from one process to another."""

    model: str
    machine: str
    limit_share: float
    splits: str
    rows: dict[str, list[Row]]
    tables: dict[str, str]
    json: dict[str, dict[str, object]]


def measure_model(model: str, run: Run, device: str, threads: int) -> ModelResults:
    """Everything on one bundled model."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    loaded = load_model(model, device=device)
    fitting = Fitting.of(loaded, run)
    jobs = list(fitted_jobs(loaded, fitting, run))
    reports = {name: measure(loaded, jobs, fitting, name, run) for name in TEXTS}
    return ModelResults(
        model,
        machine(loaded.model.device),
        limit_share(reports["wikitext2"]),
        splits(jobs),
        {name: list(report.rows) for name, report in reports.items()},
        {name: table(report) for name, report in reports.items()},
        {name: as_json(report) for name, report in reports.items()},
    )


def limit_share(report: Report) -> float:
    """The share of the arithmetic limit that the dense evaluation reached."""
    device = report.loaded.model.device
    weights = dipnet.describe(report.loaded.model).weights_per_token
    limit = 2 * weights * len(report.text.tokens) / matrix_rate(device)
    return limit / report.dense.seconds


def table(report: Report) -> str:
    """A markdown table: perplexity and its ratio to dense, one line a method."""
    dense = report.dense.perplexity
    head = " | ".join(f"{density:g}" for density in DENSITIES)
    lines = [
        f"dense perplexity **{dense.perplexity:.2f}** ({dense.tokens} tokens scored)",
        "",
        f"| method | {head} |",
        "|---" * (len(DENSITIES) + 1) + "|",
    ]
    by_label: dict[str, dict[float | None, Row]] = {}
    for row in report.rows[1:]:
        by_label.setdefault(row.label, {})[row.density] = row
    for label, rows in by_label.items():
        cells = [cell(rows[density], dense.perplexity) for density in DENSITIES]
        if any(row.measured for row in rows.values()):
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(row: Row, dense: float) -> str:
    """Perplexity, its change in percent, and the MLP density where it is not the one asked."""
    if row.measured is None:
        return "–"
    perplexity = row.measured.perplexity.perplexity
    shown = f"{perplexity:.2f} (+{100 * (perplexity / dense - 1):.1f} %)".replace("+-", "−")
    density = row.measured.density.mlp
    off = row.density is not None and abs(density - row.density) > 0.005
    return f"{shown} at {density:.2f}" if off else shown


def splits(jobs: list[Job]) -> str:
    """A markdown line for each method whose split was fitted."""
    lines = ["| fitted split | " + " | ".join(f"{d:g}" for d in DENSITIES) + " |"]
    lines.append("|---" * (len(DENSITIES) + 1) + "|")
    for label in dict.fromkeys(job.label for job in jobs if hasattr(job.method, "split")):
        found = {
            job.density: getattr(job.method, "split", None) for job in jobs if job.label == label
        }
        lines.append(f"| {label} | " + " | ".join(f"{found[d]:g}" for d in DENSITIES) + " |")
    return "\n".join(lines)


def matrix_rate(device: torch.device) -> float:
    """Floating-point operations per second of a large float32 matrix product: best of five."""
    a = torch.randn(4096, 4096, device=device)
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])
        rates.append(2 * 4096**3 / (time.perf_counter() - start))
    return max(rates)


def machine(device: torch.device) -> str:
    """What the figures were measured on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


def main() -> None:
    """Measure everything, write docs/results/, end with one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default="auto", help="auto takes a GPU for each model")
    parser.add_argument("--windows", type=int, help="of each test text; all of it by default")
    parser.add_argument("--split-windows", type=int, default=64, help="to fit DIP's split on")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    run = Run(args.data, args.windows, args.batch_size, args.split_windows)
    start = time.perf_counter()
    results = measure_all(run, devices(args.device))
    sections = write(results, make_folder(args.out))
    print("\n\n".join(sections))
    print(json.dumps(summarise(results, time.perf_counter() - start)))


def devices(asked: str) -> list[str]:
    """The device of each model's process."""
    gpus = torch.cuda.device_count() if asked == "auto" else 0
    if gpus:
        return [f"cuda:{number % gpus}" for number in range(len(DEMO_MODELS))]
    return ["cpu" if asked == "auto" else asked] * len(DEMO_MODELS)


def measure_all(run: Run, places: list[str]) -> list[ModelResults]:
    """Every model in a process of its own, side by side, with its share of the cores."""
    threads = max(1, (os.cpu_count() or 1) // len(places))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=len(places), mp_context=spawn) as pool:
        return list(pool.map(measure_model, DEMO_MODELS, repeat(run), places, repeat(threads)))


def write(results: list[ModelResults], out: Path) -> list[str]:
    """The JSON files, the plots and the tables; returns the tables' sections."""
    sections = []
    for result in results:
        sections.append(f"### {result.model}\n\n{result.splits}")
        for name in TEXTS:
            sections.append(f"#### {result.model}, {name} test\n\n{result.tables[name]}")
            whole = json.dumps(result.json[name], indent=1) + "\n"
            write_file(out / f"{result.model}-{name}.json", whole)
    for name in TEXTS:
        panels = [Panel(f"{result.model}, {name} test", result.rows[name]) for result in results]
        write_file(out / f"{name}.png", draw(panels))
    write_file(out / "tables.md", "\n\n".join(sections) + "\n")
    return sections


def summarise(results: list[ModelResults], seconds: float) -> dict[str, object]:
    """The last line: dense and DIP at one half, and the share of the physical limit."""
    return {
        "benchmark": "results",
        "machine": results[0].machine,
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
        "dense_evaluation_share_of_limit": {r.model: r.limit_share for r in results},
        "perplexity": {
            f"{result.model} {name}": {
                "dense": find(rows, "dense", None),
                "dip at 0.5": find(rows, "dip", 0.5),
            }
            for result in results
            for name, rows in result.rows.items()
        },
    }


def find(rows: list[Row], label: str, density: float | None) -> float | None:
    """The perplexity of one row."""
    for row in rows:
        if (row.label, row.density) == (label, density) and row.measured:
            return row.measured.perplexity.perplexity
    return None


if __name__ == "__main__":
    main()
