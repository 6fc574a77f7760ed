"""Fit the thresholds of `dip-threshold` on a text, for one density or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor
from transformers import PreTrainedModel

from dipnet.adapt.calibration import TextCalibration, calibrate
from dipnet.errors import InputError
from dipnet.methods.dip_threshold import DIPThreshold
from dipnet.methods.thresholds import Thresholds
from dipnet.models.families import default_window
from dipnet.units import check_density

MOST = 100
"""Densities that a file holds."""

Progress = Callable[[int, int, str], object]
"""Called with the densities that are done, how many there are, and what there is to say."""


def fit_thresholds(
    model: PreTrainedModel,
    method: DIPThreshold,
    densities: Sequence[float],
    tokens: Tensor,
    *,
    window: int | None = None,
    bos: int | None = None,
    progress: Progress | None = None,
) -> Thresholds:
    """The thresholds under which ``method`` keeps its sites' shares of (n,) ``tokens``.

    Each of the ``densities`` is fitted alone. Windows are as for `dipnet.calibrate`. Raises
    InputError when the text is too short or the method cannot work on the model.
    """
    if method.read is not None:
        raise InputError("these thresholds are fitted already: leave out fitted")
    if not 1 <= len(set(densities)) <= MOST:
        raise InputError(f"give from 1 to {MOST} densities")
    for density in densities:
        if check_density(density) == 1:
            raise InputError("at density 1 there is nothing to fit: give a lower density")
    spec = TextCalibration(model, tokens, window or default_window(model), bos).spec
    found = []
    wanted = sorted(set(densities))
    for number, density in enumerate(wanted):
        if progress is not None:
            progress(number, len(wanted), f", density {density:g}")
        made = calibrate(model, replace(method, density=density), tokens, window, bos)
        assert made.thresholds is not None
        shares = {(site.layer, site.name): site.density for site in made.sites(spec)}
        found.append((density, shares, made.thresholds))
    block, fit = method.hidden_block or 1, {"tokens": tokens.numel()}
    return Thresholds.of(spec, method.plain.factors, block, found, fit)
