"""What is fitted on text, each by an independent path: exact quantiles, sorts, the whole model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import dipnet
from dipnet.adapt.calibration import TextCalibration
from dipnet.adapt.histogram import ScoreHistogram
from tests.families import every_family, gated_family, shared, tiny
from tests.matrix import CALIBRATION, WINDOW, calibrated
from tests.reference import linear_layers, top

SITES = dict.fromkeys("qkv", "attn.in") | {
    "o": "attn.out",
    "gate": "mlp.in",
    "up": "mlp.in",
    "down": "mlp.hidden",
}
"""The site of each matrix under TEAL."""


def linears(model: PreTrainedModel, layer: int) -> dict[str, nn.Module]:
    """The linear layers of one block by the first of the matrices stacked in each."""
    modules = linear_layers(model.get_decoder().layers[layer], model.config)
    return {matrices[0][0]: module for module, matrices in modules.items()}


@torch.no_grad()
def seen_by(model: PreTrainedModel, modules: list[nn.Module], output: bool = False) -> list[Tensor]:
    """The (tokens, n) input (or output) of each module over the calibration text."""
    seen: list[list[Tensor]] = [[] for _ in modules]
    handles = []
    for module, calls in zip(modules, seen, strict=True):

        def keep(_: Any, args: Any, result: Tensor, calls: list[Tensor] = calls) -> None:
            calls.append((result if output else args[0]).flatten(0, -2))

        handles.append(module.register_forward_hook(keep))
    for window in CALIBRATION.view(-1, WINDOW):
        model(window[None])
    for handle in handles:
        handle.remove()
    return [torch.cat(calls) for calls in seen]


@gated_family
def test_cats_thresholds_are_quantiles_of_the_activated_gate(family: str) -> None:
    model = shared(family)
    blocks = model.get_decoder().layers
    modules = [getattr(b.mlp, "act_fn", None) or b.mlp.activation_fn for b in blocks]
    for layer, gates in enumerate(seen_by(model, modules, output=True)):
        ranked = gates.abs().flatten().sort(descending=True).values
        # Density 0.5 of the MLP leaves (3 * 0.5 - 1) / 2 of the neurons.
        quantile = float(ranked[len(ranked) // 4 - 1])
        threshold = calibrated(family, "cats").thresholds[layer, "mlp.hidden"]
        assert threshold == pytest.approx(quantile, rel=2**-8)  # the width of a histogram's bin


# --- TEAL: algorithm 1 of the paper, over again ---


@every_family
@pytest.mark.parametrize("name", ["teal", "teal-mlp"])
def test_teal_divides_the_budget_greedily(family: str, name: str) -> None:
    method = calibrated(family, name)
    expected = {
        (layer, site): threshold
        for layer in range(2)
        for site, threshold in greedy_thresholds(family, layer, method).items()
    }
    assert method.thresholds == pytest.approx(expected, rel=1e-6)


def greedy_thresholds(family: str, layer: int, method: dipnet.TEAL) -> dict[str, float]:
    """Give up 5 % of the block's weights at a time, where its output changes least."""
    model = shared(family)
    weights: dict[str, int] = {}
    for matrix, module in linears(model, layer).items():
        if method.attention or SITES[matrix].startswith("mlp"):
            weights[SITES[matrix]] = weights.get(SITES[matrix], 0) + module.weight.numel()
    total = sum(weights.values())
    densities = dict.fromkeys(weights, 1.0)
    threshold = partial(site_threshold, family, layer)
    spent = 0.0
    while spent < 1 - method.density - 1e-9:
        step = min(0.05, 1 - method.density - spent)
        errors = {}
        for site in weights:
            trial = densities | {site: densities[site] - step * total / weights[site]}
            if trial[site] > 0:
                cuts = {name: threshold(name, density) for name, density in trial.items()}
                errors[site] = (block_error(family, layer, cuts), trial)
        _, densities = min(errors.values(), key=lambda scored: scored[0])
        spent += step
    return {site: threshold(site, density) for site, density in densities.items()}


@cache
def site_threshold(family: str, layer: int, site: str, density: float) -> float:
    """By the histogram, which has its own tests: exact quantiles would break near ties."""
    histogram = ScoreHistogram()
    histogram.add(site_scores(family, layer)[site])
    return histogram.threshold(density)


@cache
def site_scores(family: str, layer: int) -> dict[str, Tensor]:
    """The magnitudes that reach each site of a block in the dense model."""
    modules = linears(shared(family), layer)
    inputs = seen_by(shared(family), list(modules.values()))
    return {SITES[matrix]: x.abs() for matrix, x in zip(modules, inputs, strict=True)}


@torch.no_grad()
def block_error(family: str, layer: int, thresholds: dict[str, float]) -> float:
    """The relative error of the block's output when inputs below the thresholds are zero."""
    runs, dense = block_runs(family, layer)
    handles = []
    for matrix, module in linears(shared(family), layer).items():
        if SITES[matrix] in thresholds:
            cut = partial(cut_below, thresholds[SITES[matrix]])
            handles.append(module.register_forward_pre_hook(cut))
    pruned = torch.cat([run() for run in runs])
    for handle in handles:
        handle.remove()
    return float((pruned - dense).norm() / dense.norm())


def cut_below(threshold: float, _module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (torch.where(args[0].abs() > threshold, args[0], 0.0),)


@cache
@torch.no_grad()
def block_runs(family: str, layer: int) -> tuple[list[Callable[[], Tensor]], Tensor]:
    """The block's forward on the dense inputs of every window, and its dense outputs."""
    model = shared(family)
    block = model.get_decoder().layers[layer]
    runs: list[Callable[[], Tensor]] = []
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: runs.append(partial(block.forward, *args, **kwargs)),
        with_kwargs=True,
    )
    for window in CALIBRATION.view(-1, WINDOW):
        model(window[None], use_cache=False)
    handle.remove()
    return runs, torch.cat([run() for run in runs])


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("density", [0.05, 0.3, 0.8])
def test_teal_spends_its_budget(density: float, attention: bool) -> None:
    method = dipnet.TEAL(density, attention=attention)
    thresholds = dipnet.calibrate(shared("llama"), method, CALIBRATION, window=WINDOW).thresholds
    read = total = 0.0
    for layer in range(2):
        for matrix, module in linears(shared("llama"), layer).items():
            if attention or SITES[matrix].startswith("mlp"):
                scores = site_scores("llama", layer)[SITES[matrix]]
                share = (scores > thresholds[layer, SITES[matrix]]).double().mean()
                read += float(share) * module.weight.numel()
                total += module.weight.numel()
    assert read / total == pytest.approx(density, abs=0.005)


# --- Wanda: prune the whole model layer by layer ---


@every_family
@pytest.mark.parametrize("name", ["wanda", "wanda-2:4"])
def test_wanda_prunes_each_layer_on_what_the_pruned_ones_before_it_produce(
    family: str, name: str
) -> None:
    method = calibrated(family, name)
    model = tiny(family)
    for layer in range(2):
        masks: dict[str, list[list[bool]]] = {}
        modules = linear_layers(model.get_decoder().layers[layer], model.config)
        inputs = seen_by(model, list(modules))
        for (module, matrices), x in zip(modules.items(), inputs, strict=True):
            parts = module.weight.data.split([rows for _, rows in matrices])
            for (matrix, _), part in zip(matrices, parts, strict=True):
                if matrix in ("gate", "up", "down"):
                    masks[matrix] = [pruned_row(row * x.norm(dim=0), method) for row in part]
                    part *= torch.tensor(masks[matrix])
        for matrix, mask in masks.items():
            assert method.masks[layer, matrix].tolist() == mask


def pruned_row(scores: Tensor, method: dipnet.Wanda) -> list[bool]:
    """The largest magnitudes of a row, or two of every four."""
    size, density = (4, 0.5) if method.pattern == "2:4" else (len(scores), method.density)
    kept: list[bool] = []
    for group in scores.abs().split(size):
        chosen = top(group, density)
        kept += [i in chosen for i in range(size)]
    return kept


# --- the calibration itself ---


def test_text_is_cut_into_whole_windows() -> None:
    windows = TextCalibration(shared("llama"), torch.arange(2, 25), window=10, bos=None).windows
    assert [window.tolist() for window in windows] == [
        [list(range(2, 12))],
        [list(range(12, 22))],
    ]


def test_a_short_text_is_one_shorter_window() -> None:
    (window,) = TextCalibration(shared("llama"), torch.arange(2, 9), window=10, bos=None).windows
    assert window.tolist() == [list(range(2, 9))]


def test_every_window_begins_with_the_token_that_begins_a_text() -> None:
    windows = TextCalibration(shared("llama"), torch.arange(2, 14), window=5, bos=1).windows
    assert [window.tolist() for window in windows] == [
        [[1, 2, 3, 4, 5]],
        [[1, 6, 7, 8, 9]],
        [[1, 10, 11, 12, 13]],
    ]


def test_a_batch_of_one_is_the_same_text() -> None:
    one = dipnet.calibrate(shared("llama"), dipnet.CATS(0.5), CALIBRATION[None], window=WINDOW)
    assert one.thresholds == calibrated("llama", "cats").thresholds


@pytest.mark.parametrize("method", [dipnet.DIP(0.5), dipnet.GLUPruning(0.8), dipnet.WINA(0.5)])
def test_a_method_with_nothing_to_fit_comes_back(method: Any) -> None:
    assert dipnet.calibrate(shared("llama"), method, CALIBRATION, window=WINDOW) is method


@pytest.mark.parametrize("name", ["cats", "teal", "wanda"])
def test_the_method_that_was_given_is_left_unfitted(name: str) -> None:
    fitted = calibrated("llama", name)
    assert not fitted.needs_calibration
    given = {"cats": dipnet.CATS(0.5), "teal": dipnet.TEAL(0.7), "wanda": dipnet.Wanda(0.6)}[name]
    dipnet.calibrate(shared("llama"), given, CALIBRATION, window=WINDOW)
    assert given.needs_calibration
