"""Methods as they are written on the command line."""

import pytest

import dipnet
from dipnet.cli.methods import parse_method
from dipnet.errors import InputError
from dipnet.methods.base import Method
from dipnet.registry import METHODS


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_name(name: str) -> None:
    request = parse_method(name)
    assert request.build(0.5 if request.takes_density else None).name == name


@pytest.mark.parametrize(
    ("text", "density", "method"),
    [
        ("dip", 0.4, dipnet.DIP(0.4)),
        ("dip:split=1.4", 0.5, dipnet.DIP(0.5, split=1.4)),
        ("dip:density=0.3", None, dipnet.DIP(0.3)),
        (
            "dip:input_density=0.55,hidden_density=0.4",
            None,
            dipnet.DIP(input_density=0.55, hidden_density=0.4),
        ),
        ("teal:attention=false", 0.5, dipnet.TEAL(0.5, attention=False)),
        ("teal:attention=True", 0.5, dipnet.TEAL(0.5)),
        ("wanda:pattern=2:4", 0.5, dipnet.Wanda(0.5, pattern="2:4")),
        ("dense", None, dipnet.Dense()),
    ],
)
def test_options(text: str, density: float | None, method: Method) -> None:
    request = parse_method(text)
    assert request.takes_density == (density is not None)
    assert request.build(density) == method


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dpi", "unknown method 'dpi'. Did you mean 'dip'\\? Known: cats, cett, dejavu"),
        ("DIP", "unknown method 'DIP'. Did you mean 'dip'"),
        ("dip:splt=1", r"'splt=1' is no option of dip; .* split \(a number\)"),
        ("dip:split", "'split' is no option of dip; write dip:key=value"),
        ("dip:", "'' is no option of dip"),
        ("dip:split=1,split=2", "'split=2' is no option"),
        ("dip:split=much", "split takes a number, not 'much'"),
        ("teal:attention=7", "attention takes true or false, not '7'"),
        ("wina:norms=1", "'norms=1' is no option of wina"),
        ("dense:x=1", "dense has none"),
    ],
)
def test_what_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_method(text)


@pytest.mark.parametrize("text", ["dense", "dip:density=0.5"])
def test_a_second_density(text: str) -> None:
    with pytest.raises(InputError, match="takes no other density: leave out --density"):
        parse_method(text).build(0.5)
