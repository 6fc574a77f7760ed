"""Which sites a simulated model has: its own, or those of a trace stretched over its shape."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dipnet.errors import InputError
from dipnet.sim.shape import ModelShape, load_shape
from dipnet.sim.target import own_target, same_depth, stretched
from dipnet.sim.trace import TraceSite
from tests.sim.recorded import SHAPE, SITES

UNGATED = replace(
    SHAPE, matrices={name: size for name, size in SHAPE.matrices.items() if name != "gate"}
)


def deeper(layers: int, neurons: int = 20) -> ModelShape:
    sizes = {"gate": (neurons, 8), "up": (neurons, 8), "down": (8, neurons)}
    return replace(SHAPE, name="other", layers=layers, matrices={**SHAPE.matrices, **sizes})


def test_the_model_itself() -> None:
    target = own_target(SHAPE, SITES)
    assert target.sites == target.cached == SITES
    assert target.sources == (0, 1, 2, 3)
    assert target.whole == ()


def test_stretching_over_the_same_shape_changes_nothing() -> None:
    assert stretched(SHAPE, SITES, SHAPE) == own_target(SHAPE, SITES)


def test_what_a_method_adds_is_the_same_share_of_the_mlp() -> None:
    assert own_target(SHAPE, SITES, 30).added_bytes == 120
    target = stretched(SHAPE, SITES, deeper(SHAPE.layers * 2, neurons=60), added=30)
    assert target.added == 30 * 2 * 3


def test_layers_get_the_statistics_of_their_depth() -> None:
    assert [same_depth(layer, 6, 3) for layer in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [same_depth(layer, 3, 6) for layer in range(3)] == [1, 3, 5]
    target = stretched(SHAPE, SITES, deeper(4))
    assert [site.key for site in target.sites] == [
        (layer, name) for layer in range(4) for name in ("mlp.in", "mlp.hidden")
    ]
    assert target.sources == (0, 1, 0, 1, 2, 3, 2, 3)


def test_units_and_weights_are_the_shapes_own() -> None:
    target = stretched(SHAPE, SITES, deeper(1, neurons=60))
    assert target.sites == (
        TraceSite(0, "mlp.in", 8, 1, 0.6, {"gate": 60, "up": 60}),
        TraceSite(0, "mlp.hidden", 30, 2, 0.3, {"down": 16}),
    )


def test_what_no_mask_thins_is_wanted_whole() -> None:
    rows = TraceSite(0, "mlp.hidden", 20, 1, 0.5, {"up": 8, "down": 8})  # gate pruning
    target = own_target(replace(SHAPE, layers=1), [rows])
    assert target.whole == (TraceSite(0, "mlp.in", 8, 1, 1.0, {"gate": 20}),)
    assert [site.name for site in target.cached] == ["mlp.in", "mlp.hidden"]
    dense = own_target(replace(SHAPE, layers=1), [])
    assert [(site.name, site.units, dict(site.matrices)) for site in dense.whole] == [
        ("mlp.in", 8, {"gate": 20, "up": 20}),
        ("mlp.hidden", 20, {"down": 8}),
    ]


def test_neurons_that_are_skipped_whole_stay_so() -> None:
    neuron = TraceSite(0, "mlp.neuron", 20, 1, 0.5, {"up": 8, "down": 8})
    target = stretched(replace(UNGATED, layers=1), [neuron], deeper(1, neurons=60))
    assert target.sites[0].matrices == {"gate": 8, "up": 8, "down": 8}
    assert target.whole == ()


def test_an_mlp_without_a_gate_stands_for_one_with() -> None:
    sites = [TraceSite(0, "mlp.in", 8, 1, 0.5, {"up": 20})]
    target = stretched(replace(UNGATED, layers=1), sites, deeper(1))
    assert target.sites[0].matrices == {"gate": 20, "up": 20}


def test_attention_is_not_streamed() -> None:
    sites = [TraceSite(0, "attn.in", 8, 1, 0.5, {"q": 8, "k": 4, "v": 4})]
    target = stretched(replace(SHAPE, layers=1), sites, load_shape("llama-3-8b"))
    assert target.sites[0].units == 4096
    assert target.sites[0].matrices == {"q": 4096, "k": 1024, "v": 1024}
    assert all(site.name.startswith("mlp.") for site in target.cached)


def test_blocks_that_do_not_divide() -> None:
    with pytest.raises(InputError, match="blocks of 2 neurons do not divide the 21 of other"):
        stretched(SHAPE, SITES, deeper(2, neurons=21))


def test_a_matrix_that_is_not_there() -> None:
    gate = [TraceSite(0, "mlp.hidden", 20, 1, 0.5, {"gate": 8, "down": 8})]
    with pytest.raises(InputError, match="'gate', which small does not have"):
        stretched(replace(SHAPE, layers=1), gate, UNGATED)
