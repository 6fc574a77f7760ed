"""Names to classes, loaded when asked for: the command line lists methods without torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING

from dipnet.errors import InputError

if TYPE_CHECKING:
    from dipnet.methods.base import Method

METHODS = {
    "dense": "dipnet.methods.dense:Dense",
    "dip": "dipnet.methods.dip:DIP",
    "dip-threshold": "dipnet.methods.dip_threshold:DIPThreshold",
    "glu": "dipnet.methods.glu:GLUPruning",
    "gate": "dipnet.methods.glu:GatePruning",
    "up": "dipnet.methods.glu:UpPruning",
    "glu-oracle": "dipnet.methods.glu:GLUOracle",
    "cats": "dipnet.methods.cats:CATS",
    "teal": "dipnet.methods.teal:TEAL",
    "wina": "dipnet.methods.wina:WINA",
    "wanda": "dipnet.methods.wanda:Wanda",
    "cett": "dipnet.methods.cett:CETT",
    "dejavu": "dipnet.methods.dejavu:DejaVu",
    "dejavu-oracle": "dipnet.methods.dejavu_oracle:DejaVuOracle",
    "random": "dipnet.methods.random:RandomMasks",
}


def unknown(kind: str, name: str, known: Iterable[str], hint: str = "") -> InputError:
    """The error for a name that does not exist: the closest match, then all that exist."""
    names = sorted(known)
    lower = {each.lower(): each for each in names}
    close = difflib.get_close_matches(name.lower(), lower, n=1)
    guess = f" Did you mean {lower[close[0]]!r}?" if close else ""
    return InputError(f"unknown {kind} {name!r}.{guess} Known: {', '.join(names)}.{hint}")


def method_class(name: str) -> type[Method]:
    """The class registered under ``name``; InputError lists the names that exist."""
    if name not in METHODS:
        raise unknown("method", name, METHODS, " To add one: docs/adding-a-method.md.")
    module, _, attribute = METHODS[name].partition(":")
    cls: type[Method] = getattr(import_module(module), attribute)
    return cls
