"""Where each method decides its masks, and what of the MLP its density leaves: by hand."""

import pytest

from dipnet import CATS, DIP, TEAL, WINA, GatePruning, GLUOracle, GLUPruning, UpPruning, Wanda
from dipnet.errors import InputError
from dipnet.methods.base import Method
from tests.test_units import GATED, UNGATED

GATED_SITES = [
    # method, what a unit brings along, the density of the units
    (DIP(input_density=0.7, hidden_density=0.2), "mlp.in", ("gate", "up"), 0.7),
    (DIP(input_density=0.7, hidden_density=0.2), "mlp.hidden", ("down",), 0.2),
    (DIP(0.5, attention_density=0.6), "attn.in", ("q", "k", "v"), 0.6),
    (DIP(0.5, attention_density=0.6), "attn.out", ("o",), 0.6),
    (WINA(0.5, split=1.0), "mlp.in", ("gate", "up"), 0.5),
    (GLUPruning(0.8), "mlp.hidden", ("down",), 0.4),
    (GatePruning(0.5), "mlp.hidden", ("up", "down"), 0.25),
    (UpPruning(0.5), "mlp.hidden", ("gate", "down"), 0.25),
    (GLUOracle(0.3), "mlp.neuron", ("gate", "up", "down"), 0.3),
    (CATS(0.8), "mlp.hidden", ("up", "down"), 0.7),
    (TEAL(0.5), "attn.in", ("q", "k", "v"), 0.5),
]


@pytest.mark.parametrize(("method", "name", "matrices", "density"), GATED_SITES)
def test_a_gated_mlp(method: Method, name: str, matrices: tuple[str, ...], density: float) -> None:
    sites = [site for site in method.sites(GATED) if site.name == name]
    assert [site.layer for site in sites] == [0, 1, 2]
    for site in sites:
        assert tuple(operand.matrix for operand in site.operands) == matrices
        assert site.density == pytest.approx(density)


@pytest.mark.parametrize(
    ("method", "name", "matrices", "density"),
    [
        (GLUPruning(0.8), "mlp.hidden", ("down",), 0.6),
        (GLUOracle(0.3), "mlp.neuron", ("up", "down"), 0.3),
        (DIP(0.5, split=1.0), "mlp.in", ("up",), 0.5),
    ],
)
def test_an_mlp_without_a_gate(
    method: Method, name: str, matrices: tuple[str, ...], density: float
) -> None:
    (site,) = (s for s in method.sites(UNGATED) if s.name == name and s.layer == 0)
    assert tuple(operand.matrix for operand in site.operands) == matrices
    assert site.density == pytest.approx(density)


def test_attention_is_pruned_only_on_demand() -> None:
    for method in (DIP(0.5), WINA(0.5), TEAL(0.5, attention=False), GLUPruning(0.8)):
        assert all(site.name.startswith("mlp") for site in method.sites(GATED))


@pytest.mark.parametrize(
    ("method", "lowest"),
    [
        (GLUPruning(0.5), "0.667"),
        (GLUPruning(2 / 3), "0.667"),
        (GatePruning(0.3), "0.333"),
        (UpPruning(1 / 3), "0.333"),
        (CATS(0.2), "0.333"),
    ],
)
def test_the_lowest_density_of_a_gated_mlp(method: Method, lowest: str) -> None:
    with pytest.raises(InputError, match=f"reads {lowest} of the MLP's .* dip has no such limit"):
        method.sites(GATED)


def test_the_lowest_density_without_a_gate() -> None:
    with pytest.raises(InputError, match=r"glu reads 0\.500 of the MLP's weights"):
        GLUPruning(0.5).sites(UNGATED)
    assert GLUPruning(0.51).sites(UNGATED)[0].density == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("method", "added"),
    [
        (DIP(0.5), 0),
        (GLUPruning(0.8), 0),
        (CATS(0.5), 3),  # a threshold a layer
        (TEAL(0.5), 3 * 4),  # a threshold a site
        (TEAL(0.5, attention=False), 3 * 2),
        (WINA(0.5), 3 * (8 + 20)),  # a norm a column
        (WINA(0.5, attention_density=0.5), 3 * (8 + 12 + 8 + 20)),
        (Wanda(0.5), 3 * 480 // 16),  # a bit a weight
        (Wanda(1.0), 0),
    ],
)
def test_what_a_method_adds(method: Method, added: int) -> None:
    assert method.added_weights(GATED) == added
