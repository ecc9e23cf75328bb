"""Strict JSON: what comes out is equal to what went in, or the error names the path of what cannot travel.

Standard library only, Python 3.8+: it runs on both ends of a call. Tuples become lists; nothing else changes silently.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing takes longer than all of this
    from collections.abc import Iterable, Sequence
    from typing import Any, NoReturn

JSON_LIMIT_BYTES = 10 * 1024 * 1024
"""The most that the arguments of a call, or its result, may take as JSON."""

_MAX_DEPTH = 400
_MAX_INT_BITS = (
    14_284  # an int with more may have over 4300 digits, the most that Python reads back by default
)
_PLAIN: frozenset[type] = frozenset((str, bool, type(None)))
_TRUSTED: frozenset[type] = _PLAIN | {int, float}
_WHOLE: frozenset[type] = frozenset((int, bool))
_TOO_BIG = 1 << _MAX_INT_BITS
_in_c: dict[str, Any] = {}
"""The encoder and the scanner, made when needed: `import json` takes as long as starting Python, it loads `re`."""


class NotSerializable(TypeError):
    """A value that cannot travel; the text says where in it and why."""


class TooLarge(NotSerializable):
    """A value that takes more bytes than may travel."""


def to_json(value: Any, name: str, limit_bytes: int = JSON_LIMIT_BYTES, *, nan: bool = False) -> bytes:
    """Return `value` as JSON in ASCII. What is read back is equal to it, but tuples have become lists.

    Raises NotSerializable with the path from `name` to the first thing that JSON has no form for, or that would
    silently change (keys that are no strings); TooLarge above `limit_bytes`. nan and infinities, for which Python alone
    has a form, are among what is refused unless `nan` says that Python reads this.
    """
    kind = type(value)  # what most calls take and return is told at a glance
    if kind not in _TRUSTED and not (kind is list and _TRUSTED.issuperset(map(type, value))):
        _check(value, name, limit_bytes, _TRUSTED, nan=nan)
    try:
        data = encode(value, nan=nan).encode("ascii")
    except (TypeError, ValueError, RecursionError):
        _check(value, name, limit_bytes, _PLAIN, nan=nan)  # look at every number: one is nan, or too long
        raise
    if len(data) > limit_bytes:
        raise TooLarge(f"{name} takes {len(data):,} bytes as JSON; at most {limit_bytes:,} can travel")
    return data


def are_exact(values: Sequence[Any]) -> bool:
    """Whether all are plain values that JSON gives back as they are, at a glance: then any other form does as well."""
    kinds = set(map(type, values))
    if kinds <= _PLAIN:
        return True
    if kinds <= _WHOLE:
        from struct import error, pack

        try:
            pack(
                f"{len(values)}q", *values
            )  # a third of the time that looking for the least and the most takes
        except error:
            return bool(min(values) > -_TOO_BIG and max(values) < _TOO_BIG)
        return True
    if kinds == {float}:
        from math import isfinite

        return all(map(isfinite, values))
    return False


def from_json(data: bytes, *, nan: bool = False) -> Any:
    """Return the value that `to_json` wrote. Raises ValueError for anything else."""
    text = data.decode("ascii")
    scan = _in_c.get("scan nan" if nan else "scan") or _scanner(nan)
    try:
        value, end = scan(text, 0)
    except StopIteration:
        raise ValueError("no JSON at its beginning") from None
    if end != len(text):
        raise ValueError(f"more than one JSON value: the first one ends at {end} of {len(text)}")
    return value


def _scanner(nan: bool) -> Any:
    rules = _PythonScanner if nan else _Scanner
    try:
        from _json import make_scanner
    except ImportError:
        import json

        scan: Any = json.JSONDecoder(parse_constant=rules.parse_constant).raw_decode
    else:
        scan = make_scanner(rules())  # type: ignore[arg-type]  # typed as one of its own
    _in_c["scan nan" if nan else "scan"] = scan
    return scan


class _Scanner:
    """What the scanner in C asks a `json.JSONDecoder` for."""

    strict = True
    object_hook = object_pairs_hook = array_hook = None
    parse_float = float
    parse_int = int

    @staticmethod
    def parse_constant(name: str) -> float:
        raise ValueError(f"{name} is not JSON")


class _PythonScanner(_Scanner):
    """Takes Python's words for the numbers that JSON lacks: NaN, Infinity, -Infinity."""

    parse_constant = float  # type: ignore[assignment]  # which knows these words


def encode(value: Any, *, nan: bool = False) -> str:
    """Return `value`, which consists of what JSON has, as text in ASCII. Raises TypeError or ValueError elsewhere."""
    return "".join((_in_c.get("encode nan" if nan else "encode") or _encoder(nan))(value, 0))


def _encoder(nan: bool) -> Any:
    try:
        from _json import encode_basestring_ascii, make_encoder

        # markers (nothing contains itself: that is looked for before), default, encoder, indent, key separator,
        # item separator, sort_keys, skipkeys, allow_nan
        encoder: Any = make_encoder(None, _refuse, encode_basestring_ascii, None, ":", ",", False, False, nan)
    except (ImportError, TypeError):
        import json

        def encoder(value: Any, _: int) -> str:
            return json.dumps(value, separators=(",", ":"), allow_nan=nan)

    _in_c["encode nan" if nan else "encode"] = encoder
    return encoder


def _refuse(value: object) -> NoReturn:
    raise TypeError(f"no JSON for {type(value)}")


def _check(value: Any, name: str, limit_bytes: int, trusted: frozenset[type], *, nan: bool) -> None:
    flaw = _Walk(trusted, limit_bytes // 2, nan).flaw(value)
    if flaw is None:
        return
    path, text = flaw
    if len(path) > 300:
        path = f"{path[:100]}…{path[-100:]}"
    if text:
        raise NotSerializable(f"{name}{path} {text}")
    raise TooLarge(f"{name} takes more than {limit_bytes:,} bytes as JSON, which is the most that can travel")


class _Walk:
    """The search for the first thing in a value that JSON cannot carry unchanged.

    Values whose exact type is in `trusted` are not looked at: the encoder does that, faster. `room` is how many
    values fit into the limit, two bytes each, so that the walk ends even where lists share lists.
    """

    def __init__(self, trusted: frozenset[type], room: int, nan: bool) -> None:
        self.trusted = trusted
        self.room = room
        self.nan = nan
        self.parents: set[int] = set()

    def flaw(self, value: Any, depth: int = 0) -> tuple[str, str] | None:
        """Return (path below `value`, what is wrong there), or None. No text means too large."""
        if type(value) in self.trusted or isinstance(value, str):
            return None
        if isinstance(value, (int, float)):
            return _number_flaw(value, self.nan)
        values: Any
        parts: Any
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    return "", f"has a key that is no string: {short(key)} ({_type_name(key)}); use str(key)"
            values, parts = value.values(), value.items()
        elif isinstance(value, (list, tuple)):
            values, parts = value, enumerate(value)
        else:
            return "", describe(value)
        self.room -= len(value)
        if self.room < 0:
            return "", ""
        return None if self.trusted.issuperset(map(type, values)) else self._flaw_inside(value, parts, depth)

    def _flaw_inside(
        self, value: Any, parts: Iterable[tuple[Any, Any]], depth: int
    ) -> tuple[str, str] | None:
        if id(value) in self.parents:
            return "", "contains itself"
        if depth >= _MAX_DEPTH:
            return "", f"is nested more than {_MAX_DEPTH} deep"
        self.parents.add(id(value))
        for key, part in parts:
            found = self.flaw(part, depth + 1)
            if found is not None:
                return f"[{short(key)}]{found[0]}", found[1]
        self.parents.discard(id(value))
        return None


def _number_flaw(value: float, nan: bool) -> tuple[str, str] | None:
    if isinstance(value, int):
        if int(value).bit_length() > _MAX_INT_BITS:
            return "", "is an int of more than 4300 digits; send it as text, such as hex(value)"
    elif not nan and float(value) - float(value) != 0:  # nan or an infinity
        return "", f"is {float(value)}, which JSON cannot carry; use None or text"
    return None


_WAYS_OUT = {
    "numpy.ndarray": "use .tolist(), or numpy.save() it and pass the path",
    "torch.Tensor": "use .tolist(), or torch.save() it and pass the path",
    "set": "use sorted(value)",
    "frozenset": "use sorted(value)",
    "bytes": "write it to a file and pass the path",
    "bytearray": "write it to a file and pass the path",
    "complex": "use [value.real, value.imag]",
    "generator": "use list(value)",
    "range": "use list(value)",
    "datetime.datetime": "use .isoformat()",
    "datetime.date": "use .isoformat()",
    "decimal.Decimal": "use str(value)",
    "uuid.UUID": "use str(value)",
}


def describe(value: Any) -> str:
    """Say what a value is that cannot travel, and what to do instead."""
    name = _type_name(value)
    way_out = _WAYS_OUT.get(name)
    if way_out is None:
        bases = [base.__name__ for base in type(value).__mro__]
        if hasattr(type(value), "__dataclass_fields__"):
            way_out = "use dataclasses.asdict(value)"
        elif "Enum" in bases:
            way_out = "use .value"
        elif "PurePath" in bases:
            way_out = "use str(value)"
        elif "DataFrame" in bases:
            way_out = "save it as Parquet and pass the path"
        elif hasattr(type(value), "item") and hasattr(type(value), "dtype"):
            way_out = "use .item()"
    return f"is {'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}" + (f"; {way_out}" if way_out else "")


def _type_name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def short(value: object) -> str:
    """Return `repr(value)` in a length that fits a message."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - the user's own __repr__
        text = f"<{_type_name(value)}>"
    return text if len(text) <= 60 else f"{text[:40]}…{text[-10:]}"
