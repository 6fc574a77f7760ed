"""Allocations and scores: what their files say, what is refused, and what DIP makes of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import dipnet
from dipnet import DIP, WINA, Allocation, Factors
from dipnet.errors import InputError
from dipnet.methods.allocation import Shapes
from dipnet.methods.request import parse_method
from dipnet.units import ModelSpec
from tests.families import shared
from tests.matrix import allocated, scored
from tests.methods.changed import changed

SPEC = dipnet.describe(shared("llama"))


def read_share(method: DIP, spec: ModelSpec) -> float:
    """The share of its sites' weights that a method reads."""
    sites = method.sites(spec)
    weights = [site.units * site.weights_per_unit for site in sites]
    read = sum(site.density * weight for site, weight in zip(sites, weights, strict=True))
    return read / sum(weights)


@given(st.floats(0.01, 1), st.booleans())
def test_every_density_is_met(density: float, attention: bool) -> None:
    given_ = allocated(SPEC, attention=attention)
    method = DIP(density, allocation=given_.allocation)
    assert read_share(method, SPEC) == pytest.approx(density, abs=1e-5)
    assert all(0 < site.density <= 1 for site in method.sites(SPEC))
    assert method.attention_density is None
    assert {site.name for site in method.sites(SPEC) if site.name.startswith("attn")} == (
        {"attn.in", "attn.out"} if attention else set()
    )


def test_between_two_budgets_it_is_linear() -> None:
    points = {}
    for density, shift in ((0.3, 0.1), (0.6, -0.2)):
        shares = {(s.layer, s.name): density for s in DIP(0.5).sites(SPEC)}
        weight = {s.name: s.units * s.weights_per_unit for s in DIP(0.5).sites(SPEC)}
        shares[0, "mlp.in"] += shift
        shares[1, "mlp.hidden"] -= shift * weight["mlp.in"] / weight["mlp.hidden"]
        points[density] = shares
    found = Allocation.of(SPEC, points, {}).densities(0.5)
    assert found[0, "mlp.in"] == pytest.approx((0.4 + 2 * 0.4) / 3, abs=1e-6)
    assert found[1, "mlp.in"] == pytest.approx(0.5, abs=1e-6)


def test_a_file_is_what_was_saved(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    made = allocated(SPEC).allocation
    assert isinstance(made, Allocation)
    made.save(file)
    assert Allocation.load(file) == made
    assert hash(Allocation.load(file)) == hash(made)
    method = parse_method(f"dip:allocation={file}").build(0.5)
    assert method.sites(SPEC) == DIP(0.5, allocation=made).sites(SPEC)
    assert DIP(0.5, allocation=file) == method  # a path, or its name


def test_scores_in_a_file_are_what_was_saved(tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    made = scored(SPEC).scores
    assert isinstance(made, Factors)
    made.save(file)
    method = parse_method(f"dip:scores={file}").build(0.5)
    assert isinstance(method, DIP)
    assert method.factors is not None
    for key, values in made.values.items():
        assert torch.equal(method.factors.values[key], values)
    assert method.added_weights(SPEC) == sum(site.channels for site in DIP(0.5).sites(SPEC))


def test_norms_as_scores_are_wina() -> None:
    """The mean of a site's factors is 1, which changes no mask."""
    model, tokens = shared("llama"), torch.arange(1, 25)[None]
    norms = dipnet.norm_scores(model, DIP(0.5))
    with torch.no_grad():
        with dipnet.sparsify(model, DIP(0.5, scores=norms)) as sparse:
            by_file = sparse(tokens).logits
        with dipnet.sparsify(model, WINA(0.5)) as sparse:
            assert torch.equal(by_file, sparse(tokens).logits)


BAD: list[tuple[list[Any], Any, str]] = [
    (["format"], "dipnet-plan", "has no format 'dipnet-allocation'"),
    (["version"], 2, "of version 2 and this dipnet reads 1"),
    (["extra"], 1, "extra"),
    (["points"], [], "points"),
    (["points", 0, "density"], 0.9, "the sites read"),
    (["points", 0, "density"], 1.5, "less than 1"),
    (["points", 0, "sites", "mlp.in"], None, "mlp.in and mlp.hidden"),
    (["points", 0, "sites", "mlp.in"], [0.5], "one a layer"),
    (["points", 0, "sites", "mlp.in", 0], 0.0, "greater than 0"),
    (["points", 0, "sites", "mlp.neuron"], [0.5, 0.5], "mlp.neuron"),
    (["model", "matrices", "down"], None, "no site 'mlp.hidden'"),
]


@pytest.mark.parametrize(("path", "value", "complaint"), BAD)
def test_a_bad_file_is_one_line(
    tmp_path: Path, path: list[Any], value: Any, complaint: str
) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(changed(allocated(SPEC).allocation, path, value)))
    with pytest.raises(InputError) as caught:
        DIP(0.5, allocation=file)
    message = str(caught.value)
    assert "\n" not in message
    assert complaint in message
    assert "dipnet fit allocation" in message


def test_files_that_are_none(tmp_path: Path) -> None:
    for method in ("dip:allocation=", "dip:scores="):
        with pytest.raises(InputError, match="dipnet fit"):
            parse_method(f"{method}{tmp_path / 'missing'}").build(0.5)
        noise = tmp_path / "noise"
        noise.write_bytes(b"\x00\x01 noise")
        with pytest.raises(InputError, match="dipnet fit"):
            parse_method(f"{method}{noise}").build(0.5)


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"0.mlp.in": torch.ones(3)}, "positive, finite numbers"),
        ({"0.mlp.in": -torch.ones(SPEC.width)}, "positive, finite numbers"),
        ({"0.mlp.in": torch.full((SPEC.width,), torch.nan)}, "positive, finite numbers"),
        ({"9.mlp.in": torch.ones(SPEC.width)}, "of no layer"),
        ({"0.mlp.out": torch.ones(SPEC.width)}, "no site 'mlp.out'"),
        ({"mlp.in": torch.ones(SPEC.width)}, "is no site"),
    ],
)
def test_bad_scores(tmp_path: Path, tensors: dict[str, torch.Tensor], complaint: str) -> None:
    file = tmp_path / "s.safetensors"
    said = {"format": "dipnet-scores", "version": 1, "fit": {}}
    said["model"] = Shapes.of(SPEC).model_dump(mode="json")
    save_file(tensors, file, metadata={"dipnet": json.dumps(said)})
    with pytest.raises(InputError, match=complaint) as caught:
        DIP(0.5, scores=file)
    assert "\n" not in str(caught.value)


def test_scores_of_something_else(tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    save_file({"0.mlp.in": torch.ones(4)}, file)
    with pytest.raises(InputError, match="no file of scores, it has no format 'dipnet-scores'"):
        DIP(0.5, scores=file)


@pytest.mark.parametrize("made", [allocated, scored])
def test_another_model(made: Any) -> None:
    with pytest.raises(InputError, match=r"for a llama .* and this model is a qwen2") as caught:
        dipnet.sparsify(shared("qwen2"), made(SPEC))
    assert "\n" not in str(caught.value)


ALLOCATION = allocated(SPEC).allocation
WITH_ATTENTION = allocated(SPEC, attention=True).allocation
SCORES = scored(SPEC).scores


@pytest.mark.parametrize(
    ("method", "options", "complaint"),
    [
        (DIP, {"allocation": ALLOCATION}, "takes either density"),
        (DIP, {"density": 0.5, "split": 1.2, "allocation": ALLOCATION}, "and no split"),
        (
            DIP,
            {"input_density": 0.5, "hidden_density": 0.5, "allocation": ALLOCATION},
            "divides one density",
        ),
        (
            DIP,
            {"density": 0.5, "attention_density": 0.5, "allocation": WITH_ATTENTION},
            "leave out attention_density",
        ),
        (DIP, {"density": 0.5, "allocation": 0.5}, "allocation is a file"),
        (DIP, {"density": 0.5, "scores": [1.0]}, "scores is a file"),
        (WINA, {"density": 0.5, "scores": SCORES}, "wina has scores of its own"),
    ],
)
def test_options_that_contradict(method: Any, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        method(**options)


def test_none_is_the_usual_division() -> None:
    method = parse_method("dip:allocation=none").build(0.5)
    assert isinstance(method, DIP)
    assert method.sites(SPEC) == DIP(0.5).sites(SPEC)
    assert method.has_own_division
    assert DIP(0.5, split=1.2, allocation="none").sites(SPEC) == DIP(0.5, split=1.2).sites(SPEC)


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (DIP(0.5), False),
        (DIP(0.5, attention_density=0.5, cache_aware=0.2, hidden_block=2), False),
        (WINA(0.5), False),
        (DIP(0.5, split=1.2), True),
        (DIP(input_density=0.5, hidden_density=0.4), True),
        (DIP(0.5, allocation=ALLOCATION), True),
    ],
)
def test_whether_a_method_says_how_it_is_divided(method: DIP, told: bool) -> None:
    assert method.has_own_division == told
