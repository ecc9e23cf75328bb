"""Values by reference: put, get, delete, clear; and what a call needs to get the values of the references it is given.

A value lies in a storage (`put`) or in the folder of the call that returned it (`InvokeTask.ref`). It goes from there
to where it is needed by links, by paths on shared file systems, or as a file: never through an orchestrator's database.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from flow_core import config, payload
from flow_core.engine import Engine
from flow_core.errors import (
    ObjectError,
    SerializationError,
    ValidationError,
)
from flow_core.models import SpecFile
from flow_core.object_places import Places
from flow_core.object_ref import Codec, ObjectRef, TaskFile, stored_name
from flow_core.object_storage import FOR_EVER, ObjectStorage, told
from flow_core.providers.folder import INPUTS
from flow_core.runner import objects as files
from flow_core.runner.machine import private
from flow_core.runner.pickles import CLOUDPICKLE_ZIP, blame
from flow_core.runner.strict_json import NotSerializable, to_json

_JSON_LIMIT_BYTES = 1024**3
_SENT_LIMIT_BYTES = 256 * 1024**2  # half of what a frame may hold
_SWEEP_EVERY_S = 3600.0
_ASK_FOR_PICKLE = "Pass {} if you trust whoever wrote it: unpickling may run code."


class Inputs(NamedTuple):
    """What a call needs for the references it is given: files for its folder, and the list for its envelope."""

    files: tuple[SpecFile, ...] = ()
    listed: tuple[dict[str, Any], ...] = ()


class Carried(NamedTuple):
    """What a call of a warm session needs for its references: the list for its envelope, and values sent with it."""

    listed: tuple[dict[str, Any], ...] = ()
    values: tuple[bytearray, ...] = ()


NOTHING = Carried()


class Objects:
    """The values that can be reached with these settings. Cheap to make; holds nothing."""

    def __init__(
        self,
        settings: config.Settings,
        engine: Engine | None = None,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.settings = settings
        self._places = Places(settings, engine, now=now)

    # -- writing

    def put(
        self,
        value: Any,
        *,
        codec: Codec | None = None,
        storage: str | None = None,
        max_age_s: float | None = None,
    ) -> ObjectRef:
        """Store a value; see `flow_core.put`."""
        target = self._places.storage(storage or self._places.default)
        if isinstance(value, ObjectRef):
            return self._copy(value, target, max_age_s)
        if codec is None:
            codec = "bytes" if isinstance(value, (bytes, bytearray, memoryview)) else "json"
        pieces = _pieces(value, codec)
        size, sha256 = files.describe(pieces)
        return self._stored(target, pieces, (size, sha256, codec), max_age_s)

    def _copy(self, ref: ObjectRef, target: ObjectStorage, max_age_s: float | None) -> ObjectRef:
        with self._places.opened(ref, ()) as file:
            pieces = files.checked(file, ref.size_bytes, ref.sha256, ref.uri)
            with told(ref.uri):
                return self._stored(target, pieces, (ref.size_bytes, ref.sha256, ref.codec), max_age_s)

    def _stored(
        self,
        target: ObjectStorage,
        pieces: Iterable[Any],
        about: tuple[int, str, Codec],
        max_age_s: float | None,
    ) -> ObjectRef:
        size, sha256, codec = about
        age_s = self.settings.objects.max_age_days * 86400 if max_age_s is None else max_age_s
        if not age_s > 0:
            raise ValidationError(
                f"max_age_s={max_age_s!r} must be greater than 0",
                suggestions=["Write float('inf') for an object that is kept until it is deleted."],
            )
        lifetime = FOR_EVER if math.isinf(age_s) else f"for-{math.ceil(age_s)}s"
        name = stored_name(lifetime, sha256, codec)
        self._sweep(target)
        expires = None if lifetime == FOR_EVER else self._places.now() + math.ceil(age_s)
        target.put(name, pieces)
        return ObjectRef(
            uri=f"{target.root}/{name}", size_bytes=size, sha256=sha256, codec=codec, expires_at=expires
        )

    def _sweep(self, target: ObjectStorage) -> None:
        """Remove what is past its lifetime from the folder that is this user's alone, once an hour at most."""
        if target.root != self._places.home:
            return
        stamp = self.settings.objects.home / ".swept"
        if stamp.exists() and self._places.now() - stamp.stat().st_mtime < _SWEEP_EVERY_S:
            return
        with contextlib.suppress(OSError):  # a full disk, on which the put itself will say so
            private(str(stamp.parent))
            stamp.touch(mode=0o600)
            target.clear(now=self._places.now(), older_than_s=None)

    # -- reading

    def get(self, ref: Mapping[str, Any], *, allow_pickle: bool = False, storage: str | None = None) -> Any:
        """Return the value that a reference stands for; see `flow_core.get`."""
        one = ObjectRef.of(ref)
        if one.codec == "pickle" and not allow_pickle:
            raise ObjectError(
                f"the object {one.uri} is a pickle", suggestions=[_ASK_FOR_PICKLE.format("allow_pickle=True")]
            )
        with self._places.opened(one, () if storage is None else (storage,)) as file, told(one.uri):
            data = files.read(file, one.size_bytes, one.sha256, one.uri)
        try:
            return payload.decode(one.codec, data)
        except Exception as error:
            raise ObjectError(
                f"the object {one.uri} cannot be read here: {type(error).__name__}: {error}"
            ) from error

    # -- ending

    def delete(self, ref: Mapping[str, Any], *, storage: str | None = None) -> None:
        """Remove an object; see `flow_core.objects.delete`."""
        one = ObjectRef.of(ref)
        if isinstance(one.place, TaskFile):
            raise ValidationError(
                f"the object {one.uri} is part of the task {one.place.task_id}",
                suggestions=["Release the task: flow.release([task_id])."],
            )
        at, name = self._places.stored_at(one, () if storage is None else (storage,))
        at.delete(name)

    def clear(self, storage: str | None = None, *, older_than_s: float | None = None) -> int:
        """Remove old objects; see `flow_core.objects.clear`."""
        target = self._places.storage(storage or self._places.default)
        return target.clear(now=self._places.now(), older_than_s=older_than_s)

    # -- for calls

    @contextlib.contextmanager
    def inputs(
        self, refs: Iterable[ObjectRef], *, provider: str, contained: bool, allow_pickle: bool
    ) -> Iterator[Inputs]:
        """What a call of `provider` needs to get these values; the files are there while this lasts.

        A value that its machine can open stays where it is (not for a `contained` call, which sees nothing but its own
        folder); any other is sent along. Raises ObjectNotFoundError, ObjectError.
        """
        unique = {(ref.uri, ref.sha256): ref for ref in refs}
        more: list[SpecFile] = []
        listed: list[dict[str, Any]] = []
        with contextlib.ExitStack() as stack:
            for number, ref in enumerate(unique.values()):
                one = _entry(ref, allow_pickle=allow_pickle)
                there = None if contained else self._places.path_there(ref, provider)
                if there is None:
                    name = f"{INPUTS}/{number}"
                    more.append(SpecFile(name=name, path=stack.enter_context(self._places.path_here(ref))))
                    listed.append({**one, "file": name})
                else:
                    listed.append({**one, "path": there})
            if any(ref.codec == "pickle" for ref in unique.values()):
                from flow_core.capture import cloudpickle_zip

                more.append(SpecFile(name=CLOUDPICKLE_ZIP, data=cloudpickle_zip()))
            yield Inputs(tuple(more), tuple(listed))

    def carried(
        self, refs: Iterable[ObjectRef], *, provider: str, contained: bool, allow_pickle: bool
    ) -> Carried:
        """Return what a call in a warm session of `provider` needs to get these values.

        A worker that can open the file gets its path; to any other the value is sent. Raises ObjectNotFoundError,
        ObjectError.
        """
        listed: list[dict[str, Any]] = []
        values: list[bytearray] = []
        room = _SENT_LIMIT_BYTES
        for ref in {(ref.uri, ref.sha256): ref for ref in refs}.values():
            one = _entry(ref, allow_pickle=allow_pickle)
            there = None if contained else self._places.path_seen(ref, provider)
            if there is not None:
                listed.append({**one, "path": there})
                continue
            room -= ref.size_bytes
            if room < 0:
                raise ObjectError(
                    f"the object {ref.uri} takes {ref.size_bytes:,} bytes: too many to be sent with a call",
                    suggestions=[
                        "Store it where the workers can open it: put(ref, storage='file:///shared/…')."
                    ],
                )
            with self._places.opened(ref, ()) as file, told(ref.uri):
                listed.append({**one, "part": len(values)})
                values.append(files.read(file, ref.size_bytes, ref.sha256, ref.uri))
        return Carried(tuple(listed), tuple(values))


def _entry(ref: ObjectRef, *, allow_pickle: bool) -> dict[str, Any]:
    """Return what a call's envelope says of a value, but for its place. Raises ObjectError for an unwanted pickle."""
    if ref.codec == "pickle" and not allow_pickle:
        raise ObjectError(
            f"the call is given the object {ref.uri}, which is a pickle",
            suggestions=[_ASK_FOR_PICKLE.format('serialization="pickle"')],
        )
    return {
        "uri": ref.uri,
        "sha256": ref.sha256,
        "size": ref.size_bytes,
        "codec": ref.codec,
        "tail": isinstance(ref.place, TaskFile) and ref.place.tail,
    }


def _pieces(value: Any, codec: Codec) -> list[Any]:
    """Return what the file of a value holds. Raises SerializationError that names what cannot travel."""
    if codec == "bytes":
        if not isinstance(value, (bytes, bytearray, memoryview)):
            raise SerializationError(f"the value is a {type(value).__name__} and no bytes")
        return [memoryview(value).cast("B")]
    if codec == "json":
        try:
            return [to_json(value, "value", _JSON_LIMIT_BYTES)]
        except NotSerializable as error:
            raise SerializationError(
                f"Cannot store the value as JSON. {error}",
                suggestions=['Pass codec="pickle", which takes nearly any value.'],
            ) from None
    if codec != "pickle":
        raise ValidationError(f"codec={codec!r} is not known", suggestions=["Give json, pickle or bytes."])
    return _pickle(value)


def _pickle(value: Any) -> list[Any]:
    from flow_core.pickler import dumps

    def dump(one: object, *, buffer_callback: Any = None, **_: Any) -> bytes:
        return dumps(one, {}, buffer_callback=buffer_callback)[0]

    try:
        return files.pickled(value, dump)
    except Exception as error:
        raise SerializationError(f"Cannot store the value. {blame(value, 'value', error, dump)}") from error


# -- with the settings of this process


def put(
    value: Any,
    *,
    codec: Codec | None = None,
    storage: str | None = None,
    max_age_s: float | None = None,
    **settings: Any,
) -> ObjectRef:
    """Store a value and return a small reference to it, which any process with the same settings can use.

    `codec` is "json", "pickle" or "bytes"; without it bytes stay bytes and all else must be plain JSON. `storage` is a
    folder or a URL (`file://…`, `s3://…`), by default that of the settings. The object is kept for `max_age_s` after it
    was last put (float("inf"): until it is deleted), by default for `objects.max_age_days`. The same content is stored
    once, however many put it at once. A reference in place of the value is copied, also out of a task's folder.

    Raises SerializationError that names what cannot be stored, ObjectError or ProviderUnavailable where the storage
    cannot be written.
    """
    return Objects(config.load(**settings)).put(value, codec=codec, storage=storage, max_age_s=max_age_s)


def get(
    ref: Mapping[str, Any], *, allow_pickle: bool = False, storage: str | None = None, **settings: Any
) -> Any:
    """Return the value of a reference, or of its JSON form. Size and hash are checked while it is read.

    `allow_pickle` says that you trust whoever wrote it. `storage` is one more storage that is trusted for this call.
    Raises ObjectNotFoundError: it was released with its task, has expired or was removed; ObjectError: it is damaged,
    a pickle not asked for, or in a storage that the settings do not name.
    """
    return Objects(config.load(**settings)).get(ref, allow_pickle=allow_pickle, storage=storage)


def delete(ref: Mapping[str, Any], *, storage: str | None = None, **settings: Any) -> None:
    """Remove an object from its storage, for all who have put it; one that is gone is fine.

    Raises ValidationError for the result of a task, which goes when the task is released.
    """
    Objects(config.load(**settings)).delete(ref, storage=storage)


def clear(storage: str | None = None, *, older_than_s: float | None = None, **settings: Any) -> int:
    """Remove the objects of a storage that are past their lifetime; return how many.

    With `older_than_s` also those that were last put longer ago than this. Nothing else in the storage is touched.
    """
    return Objects(config.load(**settings)).clear(storage, older_than_s=older_than_s)
