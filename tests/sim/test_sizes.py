"""Sizes are those of stores that exist; a budget is divided as the engine divides it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from dipnet.errors import InputError
from dipnet.methods.random import RandomMasks
from dipnet.models.families import Decoder
from dipnet.models.recording import trace_sites
from dipnet.pack.packing import pack
from dipnet.sim.shape import ModelShape
from dipnet.sim.sizes import divide_bytes, divide_slots, kv_bytes, pinned_bytes, unit_bytes
from dipnet.sim.trace import TraceSite
from dipnet.store.geometry import WEIGHTS, Weights
from dipnet.store.index import REST_NAME, Group, read_index
from dipnet.streaming import budget
from dipnet.streaming.engine import Reader
from dipnet.streaming.load import _skeleton, needs
from tests.families import VOCABULARY, tiny
from tests.sim.masked import site

FAMILIES = ["llama", "llama-tied", "qwen2", "phi3", "gemma2", "opt"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=WEIGHTS)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, family: str):
    folder = tmp_path_factory.mktemp("store")
    tiny(family).float().save_pretrained(folder / "model")
    pack(str(folder / "model"), folder / "store", request.param, 4)
    return folder / "store"


def shape_of(family: str) -> ModelShape:
    spec = Decoder(tiny(family)).spec
    return ModelShape(
        name=family,
        family=spec.family,
        activation=spec.activation,
        layers=spec.layers,
        matrices=spec.matrices,
        other_weights=spec.other_weights,
        vocabulary=VOCABULARY,
        kv_width=spec.matrices["k"][0] + spec.matrices["v"][0],
    )


def site_of(group: Group, density: float = 1.0) -> TraceSite:
    weights = {matrix: rows * group.block for matrix, rows in group.matrices.items()}
    return TraceSite(group.layer or 0, group.name, group.units, group.block, density, weights)


def test_a_unit_is_a_record(store: Path) -> None:
    index = read_index(store)
    for group in index.groups[:-1]:
        assert unit_bytes(site_of(group), index.weights) == group.record_bytes


def test_pinned_is_what_is_never_streamed(store: Path, family: str) -> None:
    """Its records, and the tensors of the rest, with a row of the tables."""
    index = read_index(store)
    rest = 0
    with safe_open(store / REST_NAME, framework="pt") as tensors:
        for name in tensors.offset_keys():
            found = tensors.get_slice(name)
            table = found.get_dtype() == "BF16"
            rows, *columns = found.get_shape()
            rest += 4 * (columns[0] if table else rows * (columns[0] if columns else 1))
    expected = budget.pinned_bytes(index) + rest
    assert pinned_bytes(shape_of(family), index.weights) == expected


def test_keys_and_values(store: Path, family: str) -> None:
    index = read_index(store)
    model, _ = _skeleton(store)
    assert kv_bytes(shape_of(family), 37) == needs(index, model, Reader(), 37).keys


def test_a_narrower_head_is_no_wider_than_the_rest() -> None:
    """OPT 350M: the head's width is not in the shape, and what follows from it is no nonsense."""
    shape = shape_of("opt-350m")
    assert pinned_bytes(shape, "bf16") > 4 * (shape.other_weights - VOCABULARY * shape.width)


@pytest.mark.parametrize(
    ("weights", "size"), [("int4", 128 // 2 + 4), ("int8", 128 + 4), ("bf16", 2 * 128)]
)
def test_a_neuron_that_is_skipped_whole(weights: Weights, size: int) -> None:
    """Its rows of gate and up and its column of down, one beside the other."""
    whole = TraceSite(0, "mlp.neuron", 9, 2, 0.5, dict.fromkeys(("gate", "up", "down"), 2 * 128))
    stride = -(-size // 64) * 64
    assert unit_bytes(whole, weights) == -(-(2 * 3 * stride + 8) // 512) * 512


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_neuron_is_a_record(tmp_path: Path, family: str, weights: Weights) -> None:
    tiny(family).float().save_pretrained(tmp_path / "model")
    index = pack(str(tmp_path / "model"), tmp_path / "store", weights, unit="neuron")
    sites = trace_sites(RandomMasks(mlp_density=0.3).sites(Decoder(tiny(family)).spec))
    assert [unit_bytes(site, weights) for site in sites] == [index.neurons.record_bytes] * 2
    size = index.neurons.bytes
    shares = {group.key: 0.3 if group.name == "mlp.neuron" else 1.0 for group in index.groups}
    slots = budget.divide(index, size, shares)
    assert divide_slots(sites, weights, size) == [slots[site.key] for site in sites]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.8, 0.97, 1.0, 2.0])
def test_divided_as_the_engine_divides(store: Path, share: float) -> None:
    index = read_index(store)
    densities = {group.key: 0.3 if group.name == "mlp.in" else 0.6 for group in index.groups}
    size = int(share * sum(g.bytes for g in index.groups if g.name in budget.CACHED))
    groups = index.groups[:-1]
    sites = [site_of(group, densities[group.key]) for group in groups]
    slots = budget.divide(index, size, densities)
    assert divide_slots(sites, index.weights, size) == [slots[group.key] for group in groups]
    assert divide_slots(sites[::-1], index.weights, size)[::-1] == [slots[g.key] for g in groups]


def test_no_bound_holds_everything(store: Path) -> None:
    index = read_index(store)
    sites = [site_of(group) for group in index.groups[:-1]]
    assert divide_slots(sites, index.weights, None) == [each.units for each in sites]


SITES = [site(0, "mlp.in", 100, 0.25), site(0, "mlp.hidden", 60, 0.75), site(0, "attn.out", 7)]


@pytest.mark.parametrize(
    ("records", "wanted", "even"),
    [
        (0, [0, 0], [0, 0]),
        (7, [2, 4], [3, 3]),
        (70, [25, 45], [35, 35]),
        (100, [40, 60], [50, 50]),  # of 36 and 64 records, 60 are all that there are
        (140, [80, 60], [80, 60]),
        (160, [100, 60], [100, 60]),
    ],
)
def test_divided_by_hand(records: int, wanted: list[int], even: list[int]) -> None:
    """Records of 512 bytes, of which a token wants 25 and 45; attention takes nothing of it."""
    size = unit_bytes(SITES[0], "int8")
    assert size == unit_bytes(SITES[1], "int8") == 512
    assert divide_slots(SITES, "int8", records * size) == [*wanted, 7]
    assert divide_slots(SITES, "int8", records * size, "even") == [*even, 7]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 10**9), st.floats(1e-3, 1e9)), max_size=20),
    budget=st.integers(0, 10**10),
)
def test_a_budget_is_kept_and_used(sizes: list[tuple[int, float]], budget: int) -> None:
    whole = {at: size for at, (size, _) in enumerate(sizes)}
    given = divide_bytes(whole, {at: share for at, (_, share) in enumerate(sizes)}, budget)
    assert all(0 <= given[at] <= whole[at] for at in whole)
    usable = min(budget, sum(whole.values()))
    assert usable - len(sizes) - 1e-6 * budget <= sum(given.values()) <= usable


def test_unknown_words() -> None:
    with pytest.raises(InputError, match=r"kind of weights 'int3'.*Known: bf16, int4, int8"):
        unit_bytes(SITES[0], "int3")
    with pytest.raises(InputError, match=r"split of a cache 'fair'.*Known: even, wanted"):
        divide_slots(SITES, "int4", 1, "fair")
