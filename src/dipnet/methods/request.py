"""Methods as they are written, in commands and plans: ``NAME`` or ``NAME:key=value,key=value``."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

from dipnet.errors import InputError
from dipnet.registry import method_class

if TYPE_CHECKING:
    from dipnet.methods.base import Method

OWN_DENSITY = ("density", "input_density", "hidden_density", "mlp_density", "head_density")
FLAGS = {"true": True, "false": False}
KINDS = {float: "a number", int: "a whole number", bool: "true or false", str: "a word"}


@dataclass(frozen=True)
class MethodRequest:
    """A method by name with its options; ``label`` is how the user wrote it."""

    label: str
    name: str
    options: Mapping[str, Any]

    @property
    def takes_density(self) -> bool:
        """Whether a density belongs to it: it has one, and does not bring its own."""
        cls = method_class(self.name)
        has_one = any(field.name == cls.swept for field in fields(cls))
        return has_one and not any(name in self.options for name in OWN_DENSITY)

    @property
    def wants_split(self) -> bool:
        """Whether it is DIP-like and does not say how its density is divided."""
        from dipnet.methods.dip import DIP

        dip = issubclass(method_class(self.name), DIP)
        told = {"split", "input_density", "hidden_density", "allocation"}
        return dip and not told & set(self.options)

    def build(self, density: float | None) -> Method:
        """The method at a density; InputError when it takes none or cannot have that one."""
        cls = method_class(self.name)
        if density is None:
            return cls(**self.options)
        if not self.takes_density:
            raise InputError(f"{self.label} takes no other density: leave out --density")
        return cls(**{cls.swept: density, **self.options})


def parse_method(text: str) -> MethodRequest:
    """Read ``NAME[:key=value,...]``; InputError lists the names or keys that exist."""
    name, colon, rest = text.partition(":")
    known = _option_types(method_class(name))
    options: dict[str, Any] = {}
    for part in rest.split(",") if colon else ():
        key, equals, value = part.partition("=")
        if key not in known or not equals or key in options:
            raise InputError(f"in {text!r}, {part!r} is no option of {name}; {_usage(name, known)}")
        options[key] = _read(text, key, value, known[key])
    return MethodRequest(text, name, options)


def _option_types(cls: type[Method]) -> dict[str, type]:
    """The method's fields that are a number, a flag or a word, and their types."""
    hints = get_type_hints(cls)
    kinds = {field.name: _plain(hints[field.name]) for field in fields(cls)}
    return {name: kind for name, kind in kinds.items() if kind is not None}


def _plain(hint: Any) -> type | None:
    """The plain one of the types that a field may have: ``float`` for ``float | None``; or None."""
    union = get_origin(hint) in (Union, types.UnionType)
    plain = [kind for kind in (get_args(hint) if union else (hint,)) if kind in KINDS]
    return plain[0] if len(plain) == 1 else None


def _read(text: str, key: str, value: str, kind: type) -> Any:
    try:
        return FLAGS[value.lower()] if kind is bool else kind(value)
    except (ValueError, KeyError):
        raise InputError(f"in {text!r}, {key} takes {KINDS[kind]}, not {value!r}") from None


def _usage(name: str, known: Mapping[str, type]) -> str:
    if not known:
        return f"{name} has none"
    keys = ", ".join(f"{key} ({KINDS[kind]})" for key, kind in known.items())
    return f"write {name}:key=value,... with: {keys}"
