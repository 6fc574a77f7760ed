"""The plain data: shapes, sites, densities."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dipnet.errors import InputError
from dipnet.units import ModelSpec, Operand, check_density, kept_units

ATTENTION = {"q": (12, 8), "k": (4, 8), "v": (4, 8), "o": (8, 12)}
GATED = ModelSpec(
    family="toy",
    layers=3,
    activation="silu",
    matrices={**ATTENTION, "gate": (20, 8), "up": (20, 8), "down": (8, 20)},
    other_weights=100,
    heads=3,
)
UNGATED = ModelSpec(
    family="toy",
    layers=3,
    activation="relu",
    matrices={**ATTENTION, "up": (20, 8), "down": (8, 20)},
    other_weights=100,
    heads=3,
)


@given(st.floats() | st.integers())
def test_check_density_takes_what_lies_in_0_1(value: float) -> None:
    if 0 < value <= 1:
        assert check_density(value) == value
    else:
        with pytest.raises(InputError, match=r"must be in \(0, 1\]"):
            check_density(value)


@pytest.mark.parametrize("value", [True, "x", "0.5", None, [0.5], 0.5 + 0j])
def test_check_density_takes_numbers_only(value: object) -> None:
    with pytest.raises(InputError, match="input_density must be"):
        check_density(value, "input_density")


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 10_000))
def test_kept_units_is_the_nearest_number_but_never_none(density: float, units: int) -> None:
    kept = kept_units(density, units)
    assert 1 <= kept <= units
    assert kept == 1 or math.isclose(kept, density * units, abs_tol=0.5)


def test_weights() -> None:
    assert GATED.mlp_weights == 3 * 20 * 8
    assert UNGATED.mlp_weights == 2 * 20 * 8
    assert GATED.attention_weights == 12 * 8 + 4 * 8 + 4 * 8 + 8 * 12
    assert GATED.weights_per_token == 3 * (480 + 256) + 100


def test_matrices_of_the_mlp() -> None:
    assert GATED.gated
    assert GATED.mlp_matrices == ("gate", "up", "down")
    assert GATED.input_matrices == ("gate", "up")
    assert not UNGATED.gated
    assert UNGATED.input_matrices == ("up",)


def test_an_input_channel_is_a_column_of_every_matrix_that_reads_it() -> None:
    site = GATED.input_site(1, "mlp.in", 0.5, "gate", "up")
    assert (site.layer, site.units) == (1, 8)
    assert site.operands == (Operand("gate", 20), Operand("up", 20))
    assert site.weights_per_unit == 40


def test_the_head_outputs_are_the_inputs_of_o() -> None:
    assert GATED.input_site(0, "attn.out", 0.5, "o").units == 12


@pytest.mark.parametrize(
    ("spec", "rows", "name", "weights_per_unit"),
    [
        (GATED, (), "mlp.hidden", 8),
        (GATED, ("up",), "mlp.hidden", 16),
        (GATED, ("gate", "up"), "mlp.neuron", 24),
        (UNGATED, (), "mlp.hidden", 8),
        (UNGATED, ("up",), "mlp.neuron", 16),
    ],
)
def test_a_neuron_is_a_column_of_down_and_rows_of_others(
    spec: ModelSpec, rows: tuple[str, ...], name: str, weights_per_unit: int
) -> None:
    site = spec.neuron_site(0, 0.5, "hidden", *rows)
    assert (site.name, site.units) == (name, 20)
    assert site.weights_per_unit == weights_per_unit


@pytest.mark.parametrize(("block", "units"), [(1, 20), (4, 5), (20, 1)])
def test_neurons_in_blocks(block: int, units: int) -> None:
    site = GATED.neuron_site(0, 0.5, "hidden", block=block)
    assert (site.units, site.block, site.channels) == (units, block, 20)
    assert site.weights_per_unit == 8 * block
    whole = GATED.neuron_site(0, 0.5, "hidden", "gate", "up", block=block)
    assert whole.units * whole.weights_per_unit == GATED.mlp_weights


def test_a_block_divides_the_neurons() -> None:
    with pytest.raises(InputError, match="a block of 3 does not divide the 20 neurons") as raised:
        GATED.neuron_site(0, 0.5, "hidden", block=3)
    assert str(raised.value).endswith("take one of 1, 2, 4, 5, 10, 20")
