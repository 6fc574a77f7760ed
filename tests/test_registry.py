"""Names to methods and families; the test matrix knows all of them."""

import pytest

from dipnet.errors import InputError
from dipnet.models import families
from dipnet.registry import METHODS, method_class
from tests.families import FAMILIES
from tests.matrix import METHODS as CASES


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_registered_under_its_own_name(name: str) -> None:
    assert method_class(name).name == name


def test_the_matrix_has_every_method() -> None:
    assert {case.method.name for case in CASES.values()} == set(METHODS)


def test_the_matrix_has_every_family() -> None:
    assert {name.split("-")[0] for name in FAMILIES} == set(families.FAMILIES)


@pytest.mark.parametrize(
    ("name", "meant"), [("dpi", "dip"), ("glu_oracle", "glu-oracle"), ("Wanda", "wanda")]
)
def test_a_misspelt_method(name: str, meant: str) -> None:
    with pytest.raises(InputError, match=f"unknown method '{name}'. Did you mean '{meant}'"):
        method_class(name)


def test_a_method_like_no_other_lists_them_all() -> None:
    with pytest.raises(InputError) as caught:
        method_class("zzz")
    message = str(caught.value)
    assert "Did you mean" not in message
    assert all(name in message for name in METHODS)
    assert "docs/adding-a-method.md" in message
