"""What Airflow's XComs really carry: finds, before Airflow does, what would be lost or come back as something else.

Airflow serializes a value (its module `serde`), sends it as msgpack to its supervisor, as JSON to the API server, and
stores it in a JSON column. Each step has its own exceptions. Pure: nothing is stored here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from flow_airflow.compat import deserialize, serialize
from flow_core import ObjectRef

_SMALLEST_INT, _LARGEST_INT = -(2**63), 2**64 - 1  # what msgpack has a form for
_DEEPEST = 100  # each level takes a few frames in Airflow

#: Keys by which Airflow knows values that it has serialized, also in an earlier form of it.
_RESERVED = frozenset({"__classname__", "__id__"})
_OLD_FORM = frozenset({"__type", "__var"})

_WAYS_OUT = {
    "builtins.bytes": "base64.b64encode(value).decode()",
    "builtins.bytearray": "base64.b64encode(value).decode()",
    "builtins.complex": "[value.real, value.imag]",
    "builtins.generator": "list(value)",
    "builtins.range": "list(value)",
    "datetime.time": "value.isoformat()",
    "numpy.ndarray": "value.tolist()",
    "torch.Tensor": "value.tolist()",
}


class Flaw(NamedTuple):
    """The first thing in a value that an XCom cannot carry: where it is, what is wrong, what to write instead."""

    path: str
    wrong: str
    way_out: str = ""
    is_nan: bool = False

    def __str__(self) -> str:
        return f"result{self.path} {self.wrong}" + (f"; return {self.way_out}" if self.way_out else "")


def flaw(value: Any) -> Flaw | None:
    """Return what keeps `value` from arriving in the next task equal and of the same type; None when nothing does."""
    return _flaw(value, "", 0)


def _flaw(value: Any, path: str, depth: int) -> Flaw | None:
    kind = type(value)
    if kind in (type(None), bool, ObjectRef):
        return None
    look = _LOOKS.get(kind)
    if look is not None:
        return look(value, path)
    if kind not in (dict, list, tuple, set, frozenset):
        return _flaw_of_object(value, path)
    if depth > _DEEPEST:
        return Flaw(path[:80] + "…", f"is nested more than {_DEEPEST} deep")
    if kind is dict and (wrong := _flaw_of_keys(value, path)):
        return wrong
    parts = value.items() if kind is dict else enumerate(value)
    return next((found for at, part in parts if (found := _flaw(part, f"{path}[{at!r}]", depth + 1))), None)


def _flaw_of_int(number: int, path: str) -> Flaw | None:
    if _SMALLEST_INT <= number <= _LARGEST_INT:
        return None
    return Flaw(path, f"is an int of {number.bit_length()} bits, and 64 can be sent", "hex(value)")


def _flaw_of_float(number: float, path: str) -> Flaw | None:
    return None if math.isfinite(number) else _nan(number, path)


def _nan(value: float, path: str) -> Flaw:
    return Flaw(path, f"is {value!r}, for which JSON has no form", is_nan=True)


def _flaw_of_text(text: str, path: str) -> Flaw | None:
    if "\0" in text:
        return Flaw(
            path, "holds the character \\0, which PostgreSQL does not store", r'value.replace("\0", "")'
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        broken = text[error.start]
        return Flaw(
            path, f"holds half of a character ({broken!a})", 'value.encode("utf-8", "replace").decode()'
        )
    return None


_LOOKS: Mapping[type, Callable[[Any, str], Flaw | None]] = {
    int: _flaw_of_int,
    float: _flaw_of_float,
    str: _flaw_of_text,
}


def _flaw_of_keys(value: Mapping[Any, Any], path: str) -> Flaw | None:
    for key in value:
        if type(key) is not str:
            # Airflow writes str(key), and the next task looks for the key in vain.
            shown = f"{_short(key)} ({_name(type(key))})"
            return Flaw(
                path, f"has a key that is no text: {shown}", "{str(key): one for key, one in value.items()}"
            )
        wrong = _flaw_of_text(key, f"{path}'s key")
        if wrong is not None:
            return wrong
    if _RESERVED & value.keys() or value.keys() >= _OLD_FORM:
        taken = ", ".join(sorted((_RESERVED | _OLD_FORM) & value.keys()))
        return Flaw(path, f"has a key that Airflow keeps for itself: {taken}", "it under another name")
    return None


def _flaw_of_object(value: Any, path: str) -> Flaw | None:
    """Send one object of any other type through Airflow's own serializers and look at what comes back."""
    name = _name(type(value))
    try:
        back = deserialize(json.loads(json.dumps(serialize(value), allow_nan=False)))
    except Exception as error:  # noqa: BLE001  # whatever the type's own serializer raises
        if isinstance(value, float):
            return _nan(value, path)
        return Flaw(
            path, f"is {_a(name)}, which Airflow does not store ({_reason(error)})", _way_out(value, name)
        )
    if type(back) is type(value) and _equal(back, value):
        return None
    became = _name(type(back)) if type(back) is not type(value) else _short(back)
    return Flaw(
        path, f"is {_a(name)}, {_short(value)}, and Airflow makes {became} of it", _way_out(value, name)
    )


def _equal(one: Any, other: Any) -> bool:
    equals = getattr(one, "equals", None)  # of pandas, whose == compares each cell
    try:
        return bool(equals(other)) if callable(equals) else bool(one == other)
    except Exception:  # noqa: BLE001  # an == of the user's, or one that has no single answer
        return False


def _way_out(value: Any, name: str) -> str:
    if name in _WAYS_OUT:
        return _WAYS_OUT[name]
    bases = {_name(base) for base in type(value).__mro__}
    if "enum.Enum" in bases:
        return "value.value"
    if "pathlib.PurePath" in bases or "decimal.Decimal" in bases or "builtins.BaseException" in bases:
        return "str(value)"
    if hasattr(value, "_asdict"):
        return "value._asdict()"
    if hasattr(type(value), "__dataclass_fields__"):
        return "dataclasses.asdict(value)"
    if hasattr(type(value), "model_dump"):
        return "value.model_dump()"
    plain = next((one for one in (str, int, float, list, dict, tuple, set) if isinstance(value, one)), None)
    return f"{plain.__name__}(value)" if plain is not None else ""


def _reason(error: Exception) -> str:
    return _short(f"{type(error).__name__}: {error}".partition(". ")[0].partition("\n")[0], 120)


def _name(kind: type) -> str:
    module = kind.__module__
    # From 3.13 on, pathlib's classes live in a module of their own.
    return f"{'pathlib' if module.startswith('pathlib.') else module}.{kind.__qualname__}"


def _a(name: str) -> str:
    short = name.removeprefix("builtins.")
    return f"{'an' if short[0] in 'aeiouAEIOU' else 'a'} {short}"


def _short(value: object, most: int = 60) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= most else f"{text[: most - 12]}…{text[-10:]}"


def without_nan(value: Any) -> tuple[Any, list[str]]:
    """Return `value` with None for each nan and infinity in its lists, tuples and dicts, and where those were."""
    found: list[str] = []
    return _without_nan(value, "result", found), found


def _without_nan(value: Any, path: str, found: list[str]) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        found.append(path)
        return None
    if type(value) in (list, tuple):
        return type(value)(_without_nan(part, f"{path}[{at}]", found) for at, part in enumerate(value))
    if type(value) is dict:
        return {key: _without_nan(part, f"{path}[{key!r}]", found) for key, part in value.items()}
    return value
