"""ObjectRef: a value that lies somewhere else, as something small. Pure: opens nothing.

A ref is the dict ``{"flow/ref": 1, "uri": …, "size_bytes": …, "sha256": …, "codec": …, "expires_at": …}``. So every
JSON, an XCom, a Dagster output or a Prefect result takes it as it is, and what comes back, by then a plain dict, is
still recognized. Addresses:

    flow+task://<provider>/<task id>/<file>     the result of a call, where it was written
    <storage>/<lifetime>/<xx>/<sha256>.<codec>  an object in a storage: file:///a/folder, s3://bucket/prefix …
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, NoReturn, get_args

from flow_core.errors import ValidationError
from flow_core.runner.objects import MARK

Codec = Literal["json", "pickle", "bytes"]

_VERSION = 1
_CODECS = frozenset(get_args(Codec))
_FIELDS = ("uri", "size_bytes", "sha256", "codec", "expires_at")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TASK = re.compile(
    r"flow\+task://(?P<provider>[a-z][a-z0-9_-]*)/(?P<task_id>[A-Za-z0-9_-]+)"
    r"/(?P<file>result(\.data)?|calls/[0-9a-f]{1,32}-[0-9]{1,20}(\.data)?)"
)
_STORED = re.compile(
    r"(?P<root>[a-z][a-z0-9+.-]*://.+)"
    r"/(?P<name>(?P<lifetime>for-ever|for-[0-9]{1,12}s)/[0-9a-f]{2}/(?P<sha256>[0-9a-f]{64})\.(?P<codec>[a-z]+))"
)
_pickled: ContextVar[list[ObjectRef] | None] = ContextVar("_pickled", default=None)


class TaskFile(NamedTuple):
    """A file in a task's folder; with `tail` the value is its last bytes, after a header."""

    provider: str
    task_id: str
    file: str

    @property
    def tail(self) -> bool:
        """Whether something stands before the value."""
        return not self.file.endswith(".data")


class StoredFile(NamedTuple):
    """An object in a storage: the storage's address, and the name in it."""

    root: str
    name: str


class ObjectRef(dict[str, Any]):
    """Where a value lies, how large it is, and the hash that it must have; small enough for any host's database.

    Pass it to a later call, also inside lists and dicts: the function receives the value. `flow_core.get(ref)` reads it
    here. `codec` is json, pickle or bytes; `expires_at` (seconds since 1970) is until when it is kept at least, None
    where that is not known. Equal to its own JSON form, immutable, hashable.
    """

    def __init__(
        self,
        *,
        uri: str,
        size_bytes: int,
        sha256: str,
        codec: Codec,
        expires_at: float | None = None,
    ) -> None:
        dict.__init__(
            self,
            {
                MARK: _VERSION,
                "uri": uri,
                "size_bytes": size_bytes,
                "sha256": sha256,
                "codec": codec,
                "expires_at": expires_at,
            },
        )
        self._check()

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> ObjectRef:
        """Return the ref that a mapping stands for, whatever it has been through. Raises ValidationError."""
        if isinstance(value, ObjectRef):
            return value
        if not is_ref(value):
            raise ValidationError(
                f"{str(value)[:80]!r} is no reference to an object",
                suggestions=["Give what put() or task.ref() returned, or its JSON form."],
            )
        if value[MARK] != _VERSION:
            raise ValidationError(
                f"the reference is written in version {value[MARK]!r}; this release reads version {_VERSION}"
            )
        if set(value) != {MARK, *_FIELDS}:
            wrong = ", ".join(sorted(map(str, set(value) ^ {MARK, *_FIELDS})))
            raise ValidationError(f"the reference {str(dict(value))[:200]} is damaged: see {wrong}")
        return cls(**{name: value[name] for name in _FIELDS})

    @staticmethod
    def stands_in(value: object) -> bool:
        """Whether a value is a ref or the JSON form of one, which `of` takes."""
        return is_ref(value)

    def _check(self) -> None:
        """Look at every field: a ref may come from an XCom that somebody else wrote."""
        expires, size = self["expires_at"], self["size_bytes"]
        wrong = ""
        if type(size) is not int or size < 0:
            wrong = "size_bytes"
        elif not isinstance(self["sha256"], str) or not _SHA256.fullmatch(self["sha256"]):
            wrong = "sha256"
        elif self["codec"] not in _CODECS:
            wrong = "codec"
        elif expires is not None and type(expires) not in (int, float):
            wrong = "expires_at"
        elif not isinstance(self["uri"], str) or self.place is None:
            wrong = "uri"
        if wrong:
            raise ValidationError(
                f"the reference's {wrong} cannot be right: {str(self[wrong])[:200]!r}",
                suggestions=["Give what put() or task.ref() returned, unchanged."],
            )

    @property
    def uri(self) -> str:
        """Where the value lies."""
        return str(self["uri"])

    @property
    def size_bytes(self) -> int:
        """How many bytes it takes there."""
        return int(self["size_bytes"])

    @property
    def sha256(self) -> str:
        """The hash of these bytes."""
        return str(self["sha256"])

    @property
    def codec(self) -> Codec:
        """What the bytes are: json, pickle or bytes."""
        codec: Codec = self["codec"]
        return codec

    @property
    def expires_at(self) -> float | None:
        """Until when it is kept at least, in seconds since 1970; None where that is not known."""
        expires: float | None = self["expires_at"]
        return expires

    @property
    def place(self) -> TaskFile | StoredFile | None:
        """The address in its parts; None for one that no ref can have, such as one that contradicts the hash."""
        found = _TASK.fullmatch(self["uri"])
        if found:
            return TaskFile(found["provider"], found["task_id"], found["file"])
        found = _STORED.fullmatch(self["uri"])
        if not found or "\0" in found["root"] or ".." in found["root"].split("/"):
            return None
        if found["name"] != stored_name(found["lifetime"], self["sha256"], self["codec"]):
            return None
        return StoredFile(found["root"], found["name"])

    def __repr__(self) -> str:
        return f"<ObjectRef {self.uri} {self.size_bytes:,} bytes>"

    def __hash__(self) -> int:  # type: ignore[override]  # a dict has none, and this one never changes
        return hash((self.uri, self.sha256))

    def __reduce__(self) -> tuple[Any, ...]:
        known = _pickled.get()
        if known is not None:
            known.append(self)
        return restore, (dict(self),)

    def __copy__(self) -> ObjectRef:
        return self

    def __deepcopy__(self, memo: object) -> ObjectRef:
        return self

    def _frozen(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a reference to an object never changes; make a new one with put()")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _frozen


def restore(value: Mapping[str, Any]) -> ObjectRef:
    """Unpickle a ref. In a call on another machine the runner puts the value in its place."""
    return ObjectRef.of(value)


def stored_name(lifetime: str, sha256: str, codec: str) -> str:
    """Return the name of an object in its storage."""
    return f"{lifetime}/{sha256[:2]}/{sha256}.{codec}"


def task_uri(provider: str, task_id: str, file: str) -> str:
    """Return the address of a value in a task's folder."""
    return f"flow+task://{provider}/{task_id}/{file}"


def is_ref(value: object) -> bool:
    """Whether a value is a ref or the JSON form of one."""
    return isinstance(value, Mapping) and MARK in value


@contextlib.contextmanager
def pickled_refs() -> Iterator[list[ObjectRef]]:
    """A list of the refs that are pickled within this, in this thread."""
    refs: list[ObjectRef] = []
    token = _pickled.set(refs)
    try:
        yield refs
    finally:
        _pickled.reset(token)


def revived(value: Any, found: list[ObjectRef]) -> Any:
    """Return `value` with an ObjectRef in place of each JSON form of one, at any depth of lists, tuples and dicts.

    All refs are noted in `found`. What contains none is returned as it is, never copied. Raises ValidationError for a
    damaged ref.
    """
    return _revived(value, found, {})


def _revived(value: Any, found: list[ObjectRef], seen: dict[int, Any]) -> Any:
    kind = type(value)
    if kind is ObjectRef or (kind is dict and MARK in value):
        ref = ObjectRef.of(value)
        found.append(ref)
        return ref
    if kind not in (list, tuple, dict):
        return value
    if id(value) in seen:  # lists may share lists, or hold themselves
        return seen[id(value)]
    seen[id(value)] = value
    parts = value.values() if kind is dict else value
    if _LEAVES.issuperset(map(type, parts)):
        return value
    made = [_revived(part, found, seen) for part in parts]
    if all(new is old for new, old in zip(made, parts, strict=True)):
        return value
    seen[id(value)] = changed = dict(zip(value, made, strict=True)) if kind is dict else kind(made)
    return changed


_LEAVES = frozenset((str, int, float, bool, type(None), bytes))
