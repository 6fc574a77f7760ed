"""The grid of methods × densities, its report and its picture."""

import json
from functools import partial

import pytest
import torch
from rich.console import Console

import dipnet
from dipnet.adapt.ready import Fitter
from dipnet.cache import CacheSettings
from dipnet.eval.perplexity import perplexity
from dipnet.eval.plot import Panel, Point, draw, pareto
from dipnet.eval.report import Report, as_json, reasons, table
from dipnet.eval.sweep import DENSE, Job, Row, Setting, plan, sweep
from dipnet.eval.texts import Text, TokenText, tokenize
from dipnet.models.load import LoadedModel
from tests.checkpoints import WORDS

SETTING = Setting(window=16, stride=16, batch_size=2)


@pytest.fixture(scope="module")
def text(loaded: LoadedModel) -> TokenText:
    words = Text("words", WORDS * 5)
    return TokenText(words, tokenize(loaded.tokenizer, words.content))


@pytest.fixture(scope="module")
def jobs(loaded: LoadedModel) -> list[Job]:
    spec = dipnet.describe(loaded.model)
    methods = {"dip": dipnet.DIP, "glu": dipnet.GLUPruning, "cats": dipnet.CATS}
    grid = [
        plan(label, density, partial(cls, density), spec)
        for label, cls in methods.items()
        for density in (0.8, 0.5)
    ]
    return [DENSE, *grid]


@pytest.fixture(scope="module")
def rows(loaded: LoadedModel, jobs: list[Job], text: TokenText) -> list[Row]:
    fitter = Fitter(loaded.model, 16, text.tokens)
    return list(sweep(loaded.model, jobs, text.tokens, SETTING, ready=fitter))


@pytest.fixture(scope="module")
def report(loaded: LoadedModel, text: TokenText, rows: list[Row]) -> Report:
    return Report(loaded, text, SETTING, SETTING.count(text.tokens), 0, rows)


def test_each_row_is_a_plain_evaluation(
    loaded: LoadedModel, text: TokenText, rows: list[Row]
) -> None:
    with dipnet.sparsify(loaded.model, dipnet.DIP(0.5)) as model:
        alone = perplexity(model, text.tokens, window=16, batch_size=2)
        density = dipnet.usage(model).density()
    row = next(row for row in rows if (row.label, row.density) == ("dip", 0.5))
    assert row.measured is not None
    assert row.measured.perplexity == alone
    assert row.measured.density == density


def test_the_impossible_is_a_row_with_its_reason(rows: list[Row]) -> None:
    missing = [(row.label, row.density) for row in rows if row.measured is None]
    assert missing == [("glu", 0.5)]
    assert reasons(rows)[0].startswith("glu at 0.5: glu reads 0.667 of the MLP's weights")


def test_calibration_reaches_the_rows_that_need_it(rows: list[Row]) -> None:
    cats = [row.measured for row in rows if row.label == "cats"]
    assert all(measured is not None for measured in cats)


def test_without_a_calibration_text_the_row_says_so(loaded: LoadedModel, text: TokenText) -> None:
    job = Job("cats", 0.5, dipnet.CATS(0.5))
    fitter = Fitter(loaded.model, 16)
    row = next(sweep(loaded.model, [job], text.tokens, SETTING, ready=fitter))
    assert "--calibration" in str(row.reason)


def test_a_dense_prompt_counts_bos(loaded: LoadedModel, text: TokenText) -> None:
    setting = Setting(window=16, stride=16, prompt=6, bos=0)
    job = Job("dip", 0.5, dipnet.DIP(0.5))
    measured = next(sweep(loaded.model, [job], text.tokens, setting, ready=lambda m: m)).measured
    assert measured is not None
    assert measured.density.tokens == measured.perplexity.tokens


def test_fitted_splits_are_reported(loaded: LoadedModel, text: TokenText) -> None:
    fitter = Fitter(loaded.model, 16, split_text=text.tokens[:32])
    fitted = fitter(dipnet.DIP(0.5))
    assert isinstance(fitted, dipnet.DIP)
    assert fitted.split is not None
    assert fitter(dipnet.DIP(0.5, split=1.1)).split == 1.1  # type: ignore[attr-defined]
    assert fitter(dipnet.GLUOracle(0.5)) == dipnet.GLUOracle(0.5)


def test_the_model_is_restored_when_an_evaluation_stops(
    loaded: LoadedModel, text: TokenText
) -> None:
    def stop(_windows: int) -> None:
        raise KeyboardInterrupt

    job = Job("dip", 0.5, dipnet.DIP(0.5))
    with pytest.raises(KeyboardInterrupt):
        list(sweep(loaded.model, [job], text.tokens, SETTING, ready=lambda m: m, progress=stop))
    with dipnet.sparsify(loaded.model, dipnet.DIP(0.5)):
        pass


def test_json_holds_everything(report: Report, text: TokenText) -> None:
    found = json.loads(json.dumps(as_json(report), allow_nan=False))
    assert found["schema"] == "dipnet.eval/1"
    assert found["versions"]["torch"] == torch.__version__
    assert found["text"]["sha256"] == text.text.sha256
    assert found["text"]["tokens"] == len(text.tokens)
    dense, *others = found["rows"]
    assert dense["ratio_to_dense"] == 1
    assert dense["density"]["mlp"] == dense["density"]["total"] == 1
    assert [row["method"] for row in others] == ["dip", "dip", "glu", "glu", "cats", "cats"]
    assert len(others[0]["density"]["mlp_by_layer"]) == 2
    assert others[0]["parameters"]["density"] == 0.8
    assert set(others[0]["parameters"]["site_densities"]) == {"mlp.in", "mlp.hidden"}
    assert "perplexity" not in others[3]


def test_the_table_has_a_dash_for_what_is_missing(report: Report) -> None:
    console = Console(width=120, record=True)
    console.print(table(report))
    lines = console.export_text().splitlines()
    glu = next(line for line in lines if line.split()[:2] == ["glu", "0.5"])
    assert set(glu.split()[2:]) == {"–"}
    assert sum(len(line.split()) == 9 for line in lines) == 7


def test_the_picture_is_a_png(report: Report) -> None:
    image = draw([Panel("a", report.rows), Panel("b", report.rows)])
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    assert image == draw([Panel("a", report.rows), Panel("b", report.rows)])


def test_pareto_keeps_what_nothing_beats() -> None:
    figures = [("a", 0.5, 30), ("b", 0.5, 40), ("a", 0.8, 20), ("b", 0.7, 35)]
    points = [Point(*figure, comparable=True) for figure in figures]
    assert pareto(points) == [points[0], points[2]]


def test_a_cache_is_reported(loaded: LoadedModel, text: TokenText) -> None:
    setting = Setting(window=16, stride=16, cache=CacheSettings(0.5, "lfu"))
    tokens = setting.first(text.tokens, 2)
    jobs = [DENSE, Job("dip", 0.5, dipnet.DIP(0.5, cache_aware=0.3))]
    rows = list(sweep(loaded.model, jobs, tokens, setting, ready=lambda m: m))
    with dipnet.sparsify(
        loaded.model, dipnet.DIP(0.5, cache_aware=0.3), cache=setting.cache
    ) as model:
        alone = perplexity(model, tokens, window=16)
        cached = dipnet.usage(model).cache()
    dense, dip = (row.measured for row in rows)
    assert dense is not None
    assert dip is not None
    assert (dip.perplexity, dip.cache) == (alone, cached)
    report = Report(loaded, text, setting, 2, 0, rows)
    assert report.title.endswith(", lfu cache of 0.5")
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table(report))
    assert f"{cached.hit_rate:.3f}" in captured.get()
    found = as_json(report)
    assert found["cache"] == {"share": 0.5, "policy": "lfu"}
    assert found["rows"][0]["cache"]["hit_rate"] is None
    assert found["rows"][1]["cache"]["hits"] == cached.hits
