"""How DIP divides its density between the input mask and the hidden mask."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dipnet import DIP, WINA
from dipnet.errors import InputError
from dipnet.methods.dip import RELU_SPLIT, SMOOTH_SPLIT, split_density
from dipnet.models.families import describe
from tests.families import every_family, shared

densities = st.floats(0.01, 1)
splits = st.floats(1, 8)
input_matrices = st.sampled_from([1, 2])


@given(densities, st.floats(0.1, 8), input_matrices)
def test_the_two_masks_read_what_density_says(density: float, split: float, inputs: int) -> None:
    try:
        input_density, hidden_density = split_density(density, split, inputs)
    except InputError:
        assert density**split >= density * (inputs + 1) * (1 - 1e-9)  # the neurons want it all
        return
    assert 0 < input_density <= 1
    assert 0 < hidden_density <= 1
    read = (inputs * input_density + hidden_density) / (inputs + 1)
    assert read == pytest.approx(density)


@given(densities, densities, splits, input_matrices)
def test_more_density_takes_from_neither_mask(
    one: float, other: float, split: float, inputs: int
) -> None:
    low, high = (split_density(density, split, inputs) for density in sorted((one, other)))
    assert low[0] <= high[0] + 1e-12
    assert low[1] <= high[1] + 1e-12


@given(densities, input_matrices)
def test_split_1_prunes_both_alike(density: float, inputs: int) -> None:
    assert split_density(density, 1.0, inputs) == pytest.approx((density, density))


@given(st.floats(1, 8), input_matrices)
def test_density_1_is_everything(split: float, inputs: int) -> None:
    assert split_density(1.0, split, inputs) == (1.0, 1.0)


def test_a_larger_split_spends_more_on_the_input() -> None:
    inputs = [split_density(0.5, split, 2)[0] for split in (0.8, 1.0, 1.3, 2.0, 4.0)]
    assert inputs == sorted(set(inputs))


def test_the_budget_beyond_every_input_channel_goes_to_the_neurons() -> None:
    assert split_density(0.9, 8.0, 2) == pytest.approx((1.0, 0.7))


def test_a_split_that_leaves_nothing_for_the_input() -> None:
    with pytest.raises(InputError, match=r"split 0\.2 leaves nothing for the input mask"):
        split_density(0.1, 0.2, 2)


@every_family
def test_the_split_without_one(family: str) -> None:
    spec = describe(shared(family))
    split = RELU_SPLIT if spec.activation == "relu" else SMOOTH_SPLIT
    assert DIP(0.5).densities(spec) == DIP(0.5, split=split).densities(spec)


def test_explicit_densities_are_taken_as_they_are() -> None:
    spec = describe(shared("llama"))
    assert DIP(input_density=0.7, hidden_density=0.2).densities(spec) == (0.7, 0.2)


@pytest.mark.parametrize("method", [DIP, WINA])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"input_density": 0.5},
        {"hidden_density": 0.5},
        {"density": 0.5, "input_density": 0.5},
        {"density": 0.5, "input_density": 0.5, "hidden_density": 0.5},
        {"attention_density": 0.5},
    ],
)
def test_either_density_or_both_parts(method: type[DIP], arguments: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"{method.name} takes either density, or input_density"):
        method(**arguments)


@pytest.mark.parametrize("split", [0, -1, float("nan"), float("inf"), "x", True])
def test_a_split_is_a_positive_number(split: object) -> None:
    with pytest.raises(InputError, match="split must be"):
        DIP(0.5, split=split)


def test_a_split_goes_with_density() -> None:
    with pytest.raises(InputError, match="goes with density"):
        DIP(input_density=0.5, hidden_density=0.5, split=1.3)


@pytest.mark.parametrize("name", ["input_density", "hidden_density", "attention_density"])
def test_every_density_is_checked(name: str) -> None:
    given = {"input_density": 0.5, "hidden_density": 0.5, name: 1.5}
    with pytest.raises(InputError, match=rf"{name} must be in \(0, 1\], got 1.5"):
        DIP(**given)
