"""A store's own allocation: which methods it divides, and what tells them that it is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dipnet
from dipnet.errors import InputError
from dipnet.methods.base import Method
from dipnet.models.attach import attached_method
from dipnet.models.recording import method_text
from dipnet.pack.packing import pack
from dipnet.store.index import ALLOCATION_NAME, read_index
from dipnet.streaming.methods import fitted_method, takes_allocation
from tests.families import shared, tiny
from tests.matrix import allocated
from tests.streaming.decoding import decode, load

SPEC = dipnet.describe(shared("llama"))
ALLOCATION = allocated(SPEC).allocation
WITH_ATTENTION = allocated(SPEC, attention=True).allocation


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores of one model: without an allocation, and with either of two."""
    made = tmp_path_factory.mktemp("allocated")
    tiny("llama").float().save_pretrained(made / "llama")
    each = {"plain": None, "divided": ALLOCATION, "attention": WITH_ATTENTION}
    for name, allocation in each.items():
        pack(str(made / "llama"), made / name, "int8", 1, allocation=allocation)
    return made


def on(store: Path, method: Method) -> Method:
    return fitted_method(method, store, read_index(store), SPEC)


@pytest.mark.parametrize("density", [0.3, 0.5, 1.0])
@pytest.mark.parametrize("store", ["divided", "attention"])
def test_it_is_the_allocation_named(folder: Path, store: str, density: float) -> None:
    """The bits of a store without one, under the method that names its file."""
    file = folder / store / ALLOCATION_NAME
    found = load(folder / store, dipnet.DIP(density), 0.5)
    named = load(folder / "plain", dipnet.DIP(density, allocation=file), 0.5)
    assert torch.equal(decode(found), decode(named))
    assert dipnet.usage(found).density() == dipnet.usage(named).density()
    assert method_text(attached_method(found)) == f"dip:density={density},allocation={file}"
    if density < 1:
        usual = load(folder / "plain", dipnet.DIP(density), 0.5)
        decode(usual)
        assert dipnet.usage(found).density().sites != dipnet.usage(usual).density().sites


@pytest.mark.parametrize(
    "method",
    [
        dipnet.Dense(),
        dipnet.GLUPruning(0.8),
        dipnet.DIP(0.5, split=1.4),
        dipnet.DIP(input_density=0.5, hidden_density=0.4),
        dipnet.DIP(0.5, allocation="none"),
        dipnet.DIP(0.5, allocation="none", attention_density=0.5),
        dipnet.DIP(0.5, allocation=WITH_ATTENTION),
    ],
)
def test_what_says_how_it_is_divided_is_as_it_says(folder: Path, method: Method) -> None:
    assert not takes_allocation(method, read_index(folder / "divided"))
    assert on(folder / "divided", method) == on(folder / "plain", method) == method


def test_attention_is_divided_once(folder: Path) -> None:
    method = dipnet.DIP(0.5, attention_density=0.5)
    found = on(folder / "divided", method)
    densities = {site.density for site in found.sites(SPEC) if site.name == "attn.in"}
    assert densities == {0.5}
    with pytest.raises(InputError, match=r"attention_density, or .* allocation=none"):
        dipnet.load(folder / "attention", method)


@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_a_damaged_one(folder: Path, tmp_path: Path, content: bytes | None) -> None:
    store = tmp_path / "store"
    pack(str(folder / "llama"), store, "int8", allocation=ALLOCATION)
    file = store / ALLOCATION_NAME
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=r"allocation\.json") as caught:
        dipnet.load(store, dipnet.DIP(0.5))
    assert "\n" not in str(caught.value)
    dipnet.load(store, dipnet.DIP(0.5, allocation="none"))
