"""Types of JSON fields as tables, and one check for all of them; messages name the place and the field."""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from graphs.errors import GraphError

_SURROGATE = re.compile("[\ud800-\udfff]")


def is_number(value: object) -> bool:
    """A JSON number that is finite as a double."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 1 << 1023
    return isinstance(value, float) and math.isfinite(value)


def is_whole(value: object) -> bool:
    """A JSON number without fraction: also 1.0, as JSON Schema has it."""
    return is_number(value) and value == int(value)  # type: ignore[call-overload]


def is_text(value: object) -> bool:
    """A text that can be written as UTF-8."""
    return isinstance(value, str) and _SURROGATE.search(value) is None


def is_texts(value: object) -> bool:
    """A list of texts."""
    return isinstance(value, list) and all(map(is_text, value))


def is_named_texts(value: object) -> bool:
    """An object of texts."""
    return isinstance(value, dict) and all(is_text(name) and is_text(text) for name, text in value.items())


class Kind(NamedTuple):
    """What a field may hold."""

    name: str
    fits: Callable[[object], bool]


TEXT = Kind("a text", is_text)
NUMBER = Kind("a finite number", is_number)
WHOLE = Kind("a whole number", is_whole)
LARGEST_INDEX = 2**31 - 1
INDEX_OR_NONE = Kind(
    f"a whole number from -1, which is none, to {LARGEST_INDEX}",
    lambda value: is_whole(value) and -1 <= value <= LARGEST_INDEX,  # type: ignore[operator]
)
SIZE = Kind("a number of 0 or more", lambda value: is_number(value) and value >= 0)  # type: ignore[operator]
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
TEXTS = Kind("a list of texts", is_texts)
NAMED_TEXTS = Kind("an object of texts", is_named_texts)
LIST = Kind("a list", lambda value: isinstance(value, list))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
LAYER = Kind("a text or a whole number", lambda value: is_text(value) or is_whole(value))


def or_null(kind: Kind) -> Kind:
    """The same, or null."""
    return Kind(f"{kind.name} or null", lambda value: value is None or kind.fits(value))


Fields = Mapping[str, Kind]


def check_object(where: str, value: object, required: Fields, optional: Fields) -> dict[str, Any]:
    """The value, if it is an object whose fields have their types; others may be there."""
    if not isinstance(value, dict):
        raise GraphError(f"{where} is {shown(value)}; expected an object.")
    for name, kind in required.items():
        if name not in value:
            raise GraphError(f"{where} has no {name}; expected {kind.name}.")
        check_field(where, name, value[name], kind)
    for name, kind in optional.items():
        if name in value:
            check_field(where, name, value[name], kind)
    return value


def check_field(where: str, name: str, value: object, kind: Kind) -> None:
    """Raise if the field's value is of another type."""
    if not kind.fits(value):
        raise GraphError(f"{where}: {name} is {shown(value)}; expected {kind.name}.")


def shown(value: object) -> str:
    """A value as an error message shows it: short, in one line, whatever it is."""
    if isinstance(value, str):
        return ascii(value[:40]) + ("…" if len(value) > 40 else "")
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a huge number"
    return json.dumps(value)
