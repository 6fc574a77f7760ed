"""Deja Vu on both bundled models: perplexity against everything that a token reads.

    python benchmarks/deja_vu.py --data FOLDER [--model NAME] [--device auto] [--windows N]

FOLDER holds gutenberg/valid.txt and gutenberg/test.txt, plain or as .xz. Predictors are fitted on
the validation books for look-ahead 0, 1 and 2, by ShadowLLM's criterion, and with smaller ranks; so
are the densities of the layers. Measured are the first windows of the test books, with the MLPs
pruned, the heads, and both, against oracles, random masks and DIP with the split that it has
unfitted. Every total counts what the predictors themselves read. Writes docs/results/deja_vu.json
and .png (with one model, the other one's figures stay), prints the tables, and ends with one JSON
line. The physical limit is that of results.py.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from deja_vu_lines import CAUSES, DEPLOYED, Line, lines
from deja_vu_report import ModelResults, draw, summary, tables
from results import OUT, machine, matrix_rate, read
from rich.console import Console
from rich.progress import track
from torch import Tensor

import dipnet
from dipnet.adapt.calibration import TextCalibration
from dipnet.adapt.histogram import ScoreHistogram
from dipnet.errors import InputError
from dipnet.eval.texts import tokenize
from dipnet.files import make_folder, write_file
from dipnet.methods.base import Method, SiteKey
from dipnet.models.load import DEMO_MODELS, load_model

WINDOW = 512
CALIBRATION = 8192
"""Tokens behind the fitted ones, on which the layers' densities are found."""
RECALL_WINDOWS = 32
"""Of the test text, the windows on which recall is measured."""
SHARED = f"{DEPLOYED}, densities by score"
MOST_CHARACTERS = 6
"""Read of a text for each of its tokens: the demo models' tokens have four and a half."""


@dataclass(frozen=True)
class Run:
    """What is the same for both models."""

    data: Path
    windows: int
    batch_size: int
    tokens: int
    coarse: int


@dataclass(frozen=True)
class Texts:
    """(n,) tokens of each purpose; none is part of another."""

    fitted: Tensor
    calibration: Tensor
    test: Tensor

    @classmethod
    def of(cls, tokenizer: Any, run: Run) -> Texts:
        """The first tokens of the validation books, those behind them, and the test's first."""

        def first(name: str, count: int) -> Tensor:
            content = read(run.data / "gutenberg" / name).content
            tokens = tokenize(tokenizer, content[: count * MOST_CHARACTERS])
            if len(tokens) < count:
                raise SystemExit(f"{name} has {len(tokens)} tokens, and {count} are asked for")
            return tokens[:count]

        valid = first("valid.txt", run.tokens + CALIBRATION)
        return cls(
            valid[: run.tokens], valid[run.tokens :], first("test.txt", run.windows * WINDOW)
        )


class Observed(TextCalibration):
    """A calibration text on which predictors' scores are observed once for all densities."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        super().__init__(model, tokens, WINDOW)
        self._known: dict[Any, Mapping[SiteKey, ScoreHistogram]] = {}

    def scores(self, method: Method) -> Mapping[SiteKey, ScoreHistogram]:
        sites = {site.name for site in method.sites(self.spec)}
        key = id(getattr(method, "fitted", method)), tuple(sorted(sites))
        if key not in self._known:
            self._known[key] = super().scores(method)
        return self._known[key]


def fit(model: Any, tokens: Tensor, densities: dict[str, float]) -> dict[str, dipnet.Predictors]:
    """Predictors by what makes them differ: a look-ahead, or the criterion."""
    return {
        name: dipnet.fit_predictors(model, tokens, window=WINDOW, epochs=1, **densities, **settings)
        for name, settings in CAUSES.items()
    }


def recalls(
    model: Any,
    fitted: Mapping[str, dipnet.Predictors],
    tokens: Tensor,
    densities: dict[str, float],
    observed: Observed,
) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Every fit's quality on the test text by kind and layer; the deployed one's also by score."""
    deployed = fitted[DEPLOYED]
    method = dipnet.DejaVu(**densities, predictors=deployed, allocation="scores")
    asked = {name: (each, None) for name, each in fitted.items()}
    asked[SHARED] = deployed, method.calibrated(observed).layer_densities
    found = {}
    for name, (predictors, own) in asked.items():
        qualities = dipnet.measure_predictors(
            model, predictors, tokens, window=WINDOW, layer_densities=own, **densities
        )
        found[name] = {kind: [one.as_json() for one in each] for kind, each in qualities.items()}
    return found


def measure(
    model: Any, line: Line, run: Run, test: Tensor, observed: Observed
) -> Iterator[dict[str, Any]]:
    """The figures of a line at each of its densities; those that it cannot have are left out."""
    for mlp, heads in line.densities[:: run.coarse]:
        try:
            method = line.method(mlp, heads)
            method.check_model(observed.spec)
        except InputError:
            continue
        with dipnet.sparsify(model, method.calibrated(observed), backend="reference"):
            found = dipnet.perplexity(model, test, window=WINDOW, batch_size=run.batch_size)
            density = dipnet.usage(model).density()
        asked = {"part": line.part, "line": line.name, "mlp": mlp, "heads": heads}
        yield {**asked, "perplexity": found.perplexity, "density": asdict(density)}


def measure_model(name: str, run: Run, device: str) -> ModelResults:
    """Everything on one bundled model."""
    loaded = load_model(name, device=device)
    model, texts = loaded.model, Texts.of(loaded.tokenizer, run)
    observed = Observed(model, texts.calibration)
    spec = observed.spec
    densities = {"mlp_density": 0.5 if spec.gated else 0.2, "head_density": 0.5}
    fitted = fit(model, texts.fitted, densities)
    rows = [
        row
        for line in track(lines(spec, fitted), name, console=Console(stderr=True))
        for row in measure(model, line, run, texts.test, observed)
    ]
    began = time.perf_counter()
    dense = dipnet.perplexity(model, texts.test, window=WINDOW, batch_size=run.batch_size)
    seconds = time.perf_counter() - began
    limit = 2 * spec.weights_per_token * len(texts.test) / matrix_rate(model.device)
    return ModelResults(
        model=name,
        machine=machine(model.device),
        dense=asdict(dense) | {"perplexity": dense.perplexity},
        limit_share=limit / seconds,
        fits={each: dict(predictors.card) for each, predictors in fitted.items()},
        recalls=recalls(model, fitted, texts.test[: RECALL_WINDOWS * WINDOW], densities, observed),
        rows=rows,
    )


def earlier(file: Path) -> dict[str, ModelResults]:
    """What an earlier run found, by the model's name."""
    if not file.exists():
        return {}
    names = {each.name for each in fields(ModelResults)}
    models = json.loads(file.read_text())["models"]
    kept = [{name: value for name, value in model.items() if name in names} for model in models]
    return {model["model"]: ModelResults(**model) for model in kept}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", action="append", choices=DEMO_MODELS, help="default: both")
    parser.add_argument("--device", default="auto", help="auto takes a GPU if there is one")
    parser.add_argument("--windows", type=int, default=64, help="of the test text")
    parser.add_argument("--tokens", type=int, default=600_000, help="to fit predictors on")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--coarse", type=int, default=1, help="one density in so many")
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


def main() -> None:
    """Measure both models, write docs/results/, end with one JSON line."""
    args = parse()
    run = Run(args.data, args.windows, args.batch_size, args.tokens, args.coarse)
    began = time.perf_counter()
    out = make_folder(args.out)
    names = args.model or DEMO_MODELS
    known = {} if set(names) == set(DEMO_MODELS) else earlier(out / "deja_vu.json")
    for name in names:
        known[name] = measure_model(name, run, args.device)
        print(tables(known[name]), end="\n\n", flush=True)
        results = [known[each] for each in DEMO_MODELS if each in known]
        whole = {"benchmark": "deja_vu", "models": [asdict(result) for result in results]}
        write_file(out / "deja_vu.json", json.dumps(whole) + "\n")
    write_file(out / "deja_vu.png", draw(results))
    print(json.dumps(summary(results) | {"seconds": round(time.perf_counter() - began, 1)}))


if __name__ == "__main__":
    main()
