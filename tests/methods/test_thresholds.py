"""Thresholds: what their file says, what is refused, and what dip-threshold makes of them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import dipnet
from dipnet import DIPThreshold, Thresholds
from dipnet.errors import InputError
from dipnet.methods.request import parse_method
from tests.families import shared
from tests.matrix import CALIBRATION, WINDOW, logits, scored
from tests.methods.changed import changed

SPEC = dipnet.describe(shared("llama"))
TOKENS = torch.arange(1, 25)[None]


@cache
def fitted(*, scores: bool = False) -> Thresholds:
    method = DIPThreshold(0.5, scores=scored(SPEC).scores if scores else None)
    model = shared("llama")
    return dipnet.fit_thresholds(model, method, (0.5, 0.3), CALIBRATION, window=WINDOW)


def test_a_file_is_what_was_saved(tmp_path: Path) -> None:
    file = tmp_path / "above.json"
    fitted().save(file)
    method = parse_method(f"dip-threshold:fitted={file}").build(0.5)
    assert isinstance(method, DIPThreshold)
    assert method.thresholds == fitted().at(0.5)
    expected = [site.density for site in dipnet.DIP(0.5).sites(SPEC)]
    assert [site.density for site in method.sites(SPEC)] == pytest.approx(expected, abs=1e-6)
    assert method == DIPThreshold(0.5, fitted=file)  # a path, or its name
    assert hash(DIPThreshold(0.5, fitted=fitted())) == hash(DIPThreshold(0.5, fitted=fitted()))


def test_what_is_fitted_is_what_calibration_finds() -> None:
    model = shared("llama")
    found = dipnet.calibrate(model, DIPThreshold(0.3), CALIBRATION, window=WINDOW)
    with dipnet.sparsify(model, found) as sparse:
        expected = logits(sparse, TOKENS)
    with dipnet.sparsify(model, DIPThreshold(0.3, fitted=fitted())) as sparse:
        assert torch.equal(logits(sparse, TOKENS), expected)


@pytest.mark.parametrize("density", [0.3, 0.5])
@pytest.mark.parametrize("scores", [False, True])
def test_the_text_reads_what_was_asked(density: float, scores: bool) -> None:
    """Under the masks, site by site: not only in the dense model."""
    model, made = shared("llama"), fitted(scores=scores)
    method = DIPThreshold(density, scores=scored(SPEC).scores if scores else None, fitted=made)
    with dipnet.sparsify(model, method) as sparse:
        logits(sparse, CALIBRATION.view(-1, WINDOW))
        kept = dipnet.usage(sparse).density().sites
    for site in method.sites(SPEC):
        found = kept[f"{site.layer}.{site.name}"]
        assert found == pytest.approx(site.density, abs=0.02), (site.layer, site.name)


BAD: list[tuple[list[Any], Any, str]] = [
    (["format"], "dipnet-allocation", "has no format 'dipnet-thresholds'"),
    (["version"], 2, "of version 2 and this dipnet reads 1"),
    (["extra"], 1, "extra"),
    (["fitted"], [], "fitted"),
    (["fitted", 0, "point", "density"], 0.4, "the sites read"),
    (["fitted", 0, "above", "mlp.in"], None, "a threshold a layer"),
    (["fitted", 0, "above", "mlp.in"], [1.0], "a threshold a layer"),
    (["fitted", 0, "above", "mlp.in", 0], -2.0, "greater than or equal to -1"),
    (["scores_sha256"], "none", "scores_sha256"),
]


@pytest.mark.parametrize(("path", "value", "complaint"), BAD)
def test_a_bad_file_is_one_line(
    tmp_path: Path, path: list[Any], value: Any, complaint: str
) -> None:
    file = tmp_path / "above.json"
    file.write_text(json.dumps(changed(fitted(), path, value)))
    with pytest.raises(InputError) as caught:
        DIPThreshold(0.5, fitted=file)
    message = str(caught.value)
    assert "\n" not in message
    assert complaint in message
    assert "dipnet fit thresholds" in message


def test_what_does_not_go_together() -> None:
    with pytest.raises(InputError, match=r"fitted at a density of 0\.3, 0\.5, not of 0\.4"):
        DIPThreshold(0.4, fitted=fitted())
    with pytest.raises(InputError, match="leave out split, allocation and hidden_block"):
        DIPThreshold(0.5, split=1.3, fitted=fitted())
    with pytest.raises(InputError, match="fitted with other scores"):
        dipnet.sparsify(shared("llama"), DIPThreshold(0.5, fitted=fitted(scores=True)))
    with pytest.raises(InputError, match=r"for a llama .* and this model is a qwen2"):
        dipnet.sparsify(shared("qwen2"), DIPThreshold(0.5, fitted=fitted()))
    method = DIPThreshold(0.5, fitted=fitted())
    with pytest.raises(InputError, match="fitted already"):
        dipnet.fit_thresholds(shared("llama"), method, (0.5,), CALIBRATION, window=WINDOW)
    for densities, complaint in (((0.5, 1.0), "at density 1"), ((), "from 1 to 100 densities")):
        with pytest.raises(InputError, match=complaint):
            dipnet.fit_thresholds(shared("llama"), DIPThreshold(0.5), densities, CALIBRATION)
    with pytest.raises(InputError, match="has to be calibrated"):
        dipnet.sparsify(shared("llama"), DIPThreshold(0.5))
