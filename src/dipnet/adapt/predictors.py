"""Fit predictors of neurons and heads on text, and measure them on another.

The method of Deja Vu (https://arxiv.org/abs/2310.17157): for every layer a small network that reads
the residual stream some blocks before, trained with weighted binary cross-entropy on what the dense
model's tokens wanted. docs/predictors.md tells it whole.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import dipnet
from dipnet.adapt.calibration import TextCalibration
from dipnet.adapt.collect import Collector, calls
from dipnet.adapt.fit_settings import FitSettings
from dipnet.adapt.fitting import FEW_TOKENS, TOKENS_A_CALL, Fit, Progress
from dipnet.adapt.quality import Measured, Quality
from dipnet.errors import InputError
from dipnet.files import check_writable
from dipnet.methods.base import SiteKey
from dipnet.methods.dejavu import KIND_OF
from dipnet.methods.predictors import Kind, PredictedModel, Predictors
from dipnet.models.attach import check_dense
from dipnet.models.families import default_window
from dipnet.models.load import check_device
from dipnet.streaming.stats import process_bytes
from dipnet.units import kept_units


def fit_predictors(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    window: int | None = None,
    bos: int | None = None,
    device: str | torch.device | None = None,
    out: str | Path | None = None,
    text: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Predictors:
    """Fit predictors of ``model``'s neurons and heads on (n,) ``tokens``; the model stays as it is.

    ``settings`` are those of `FitSettings`: densities, look-ahead, rank, and how to train. The text
    is read in windows of ``window`` tokens (by default the context, at most 2048), each beginning
    with ``bos`` if given. Predictors are trained on ``device``, by default the model's. They are
    written to ``out`` when all is done: an interrupted fit leaves nothing there and starts anew.
    ``text`` is what the card says of the text.

    Raises InputError when a setting makes no sense, the text is too short, a layer has nothing to
    predict, activations or losses are not finite, or ``out`` cannot be written.
    """
    chosen = FitSettings(**settings)
    check_dense(model)
    if out is not None:
        check_writable(Path(out))
    began = time.perf_counter()
    calibration = _calibration(model, tokens, window, bos)
    trained_on = _trained_on(model, device)
    if trained_on.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trained_on)
    fit = Fit(calibration, chosen, trained_on, progress or (lambda *_: None))
    shape = PredictedModel.of(calibration.spec)
    layers = fit.run()

    def made(card: Mapping[str, Any]) -> Predictors:
        return Predictors(shape, chosen.look_ahead, layers, chosen.activation, card=card)

    kept = {kind: [k] * shape.layers for kind, k in fit.kept.items()}
    measured = _measured(made({}), fit.collector, kept)
    measured.add(fit.held)
    predictors = made(_card(fit, measured, text, time.perf_counter() - began))
    if out is not None:
        predictors.save(out)
    return predictors


def measure_predictors(
    model: PreTrainedModel,
    predictors: Predictors,
    tokens: Tensor,
    *,
    window: int | None = None,
    bos: int | None = None,
    layer_densities: Mapping[SiteKey, float] | None = None,
    **settings: Any,
) -> dict[Kind, list[Quality]]:
    """How good predictors are on (n,) ``tokens``, by kind and layer.

    ``settings`` are those of `FitSettings` that say what is wanted, and how much is kept;
    ``layer_densities`` those of a `DejaVu`, where a layer keeps a share of its own. Raises
    InputError when the predictors are those of another model.
    """
    check_dense(model)
    calibration = _calibration(model, tokens, window, bos)
    spec = calibration.spec
    predictors.check_model(spec)
    chosen = FitSettings(**{**settings, "look_ahead": predictors.look_ahead})
    rules = {kind: rule for kind, rule in chosen.rules(spec).items() if kind in predictors.kinds}
    collector = Collector(calibration.decoder, rules, chosen.look_ahead, model.device)
    kept = {kind: [k] * spec.layers for kind, k in chosen.kept(spec).items() if kind in rules}
    for (layer, name), density in (layer_densities or {}).items():
        if (kind := KIND_OF[name]) in kept:
            kept[kind][layer] = kept_units(density, predictors.model.units(kind))
    measured = _measured(predictors, collector, kept)
    for call in calls(calibration.windows, TOKENS_A_CALL.get(model.device.type, FEW_TOKENS)):
        measured.add(collector.see(call))
    return measured.qualities()


def _trained_on(model: PreTrainedModel, device: str | torch.device | None) -> torch.device:
    """The device to train on; InputError where that is neither a CPU nor a CUDA GPU."""
    chosen = check_device(str(device)) if device else model.device
    for each in (chosen, model.device):
        if each.type not in ("cpu", "cuda"):
            raise InputError(
                f"predictors are fitted on a CPU or a CUDA GPU, not on {each.type!r}: move the "
                "model there, or use --device cpu"
            )
    return chosen


def _calibration(
    model: PreTrainedModel, tokens: Tensor, window: int | None, bos: int | None
) -> TextCalibration:
    return TextCalibration(model, tokens, default_window(model) if window is None else window, bos)


def _measured(
    predictors: Predictors, collector: Collector, kept: Mapping[Kind, Sequence[int]]
) -> Measured:
    return Measured(predictors, kept, {kind: collector.rows(kind) for kind in kept})


def _card(
    fit: Fit, measured: Measured, text: Mapping[str, Any] | None, seconds: float
) -> dict[str, Any]:
    """What is known of a fit, as JSON."""
    course, settings = fit.course, asdict(fit.settings)
    epochs = fit.settings.passes(fit.tokens)
    ranks = {kind: fit.settings.rank_of(kind, fit.spec) for kind in fit.kept}
    targets = {kind: rule.target for kind, rule in fit.collector.rules.items()}
    return {
        "made_by": f"dipnet {dipnet.__version__}",
        "text": dict(text or {}),
        "tokens": {"trained": fit.tokens, "held_out": fit.held.tokens, "window": fit.window},
        "settings": {**settings, "epochs": epochs, "ranks": ranks, "targets": targets},
        "steps": {"made": course.steps, "planned": course.planned},
        "device": _device_name(fit.device),
        "seconds": {
            "collecting": round(course.collecting, 2),
            "training": round(course.training, 2),
            "total": round(seconds, 2),
        },
        "peak_memory_bytes": _peak_memory(fit.device),
        "held_out": {
            kind: [each.as_json() for each in layers]
            for kind, layers in measured.qualities().items()
        },
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} {device.type}, {torch.get_num_threads()} threads"


def _peak_memory(device: torch.device) -> dict[str, int]:
    """The most that the process held so far, and the GPU since the fit began."""
    peaks = {"process": process_bytes("VmHWM")}
    if device.type == "cuda":
        peaks["gpu"] = torch.cuda.max_memory_allocated(device)
    return peaks
