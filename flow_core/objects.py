"""Values by reference: put, get, delete, clear; and what a call needs to get the values of the references it is given.

A value lies in a storage (`put`) or in the folder of the call that returned it (`InvokeTask.ref`). It goes from there
to where it is needed by links, by paths on shared file systems, or as a file: never through an orchestrator's database.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flow_core import config, payload, providers
from flow_core.engine import Engine
from flow_core.errors import (
    ObjectError,
    ObjectNotFoundError,
    ResourceNotFoundError,
    SerializationError,
    TaskNotFoundError,
    ValidationError,
)
from flow_core.models import SpecFile
from flow_core.object_ref import Codec, ObjectRef, StoredFile, TaskFile, stored_name
from flow_core.object_storage import FOR_EVER, ObjectStorage, storage_at, told
from flow_core.providers.folder import INPUTS
from flow_core.runner import objects as files
from flow_core.runner.execute import write_file
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
        self._engines = {} if engine is None else {engine.provider.name: engine}
        self._now = now

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
        target = self._storage(storage or self._default)
        if isinstance(value, ObjectRef):
            return self._copy(value, target, max_age_s)
        if codec is None:
            codec = "bytes" if isinstance(value, (bytes, bytearray, memoryview)) else "json"
        pieces = _pieces(value, codec)
        size, sha256 = files.describe(pieces)
        return self._stored(target, pieces, (size, sha256, codec), max_age_s)

    def _copy(self, ref: ObjectRef, target: ObjectStorage, max_age_s: float | None) -> ObjectRef:
        with self._opened(ref, ()) as file:
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
        expires = None if lifetime == FOR_EVER else self._now() + math.ceil(age_s)
        target.put(name, pieces)
        return ObjectRef(
            uri=f"{target.root}/{name}", size_bytes=size, sha256=sha256, codec=codec, expires_at=expires
        )

    def _sweep(self, target: ObjectStorage) -> None:
        """Remove what is past its lifetime from the folder that is this user's alone, once an hour at most."""
        if target.root != self._home:
            return
        stamp = self.settings.objects.home / ".swept"
        if stamp.exists() and self._now() - stamp.stat().st_mtime < _SWEEP_EVERY_S:
            return
        with contextlib.suppress(OSError):  # a full disk, on which the put itself will say so
            private(str(stamp.parent))
            stamp.touch(mode=0o600)
            target.clear(now=self._now(), older_than_s=None)

    # -- reading

    def get(self, ref: Mapping[str, Any], *, allow_pickle: bool = False, storage: str | None = None) -> Any:
        """Return the value that a reference stands for; see `flow_core.get`."""
        one = ObjectRef.of(ref)
        if one.codec == "pickle" and not allow_pickle:
            raise ObjectError(
                f"the object {one.uri} is a pickle", suggestions=[_ASK_FOR_PICKLE.format("allow_pickle=True")]
            )
        with self._opened(one, () if storage is None else (storage,)) as file, told(one.uri):
            data = files.read(file, one.size_bytes, one.sha256, one.uri)
        try:
            return payload.decode(one.codec, data)
        except Exception as error:
            raise ObjectError(
                f"the object {one.uri} cannot be read here: {type(error).__name__}: {error}"
            ) from error

    @contextlib.contextmanager
    def _opened(self, ref: ObjectRef, trusted: Collection[str]) -> Iterator[Any]:
        """The open file of a value, at the value."""
        place = ref.place
        if isinstance(place, TaskFile):
            with self._task_file(ref, place) as path:
                with told(ref.uri):
                    file = files.open_file(str(path), ref.size_bytes, tail=place.tail)
                with file:
                    yield file
            return
        storage, name = self._stored_at(ref, trusted)
        try:
            with storage.open(name, ref.size_bytes) as file:
                yield file
        except ObjectNotFoundError as error:
            raise self._gone(ref) from error

    def _gone(self, ref: ObjectRef) -> ObjectNotFoundError:
        if ref.expires_at is not None and ref.expires_at < self._now():
            when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(ref.expires_at))
            return ObjectNotFoundError(
                f"the object {ref.uri} expired on {when} and has been removed",
                suggestions=["Make it anew.", "Give put() a longer max_age_s, or set objects.max_age_days."],
            )
        return ObjectNotFoundError(
            f"there is no object {ref.uri}",
            suggestions=["It was deleted, or it was put into a folder of another machine or user."],
        )

    # -- ending

    def delete(self, ref: Mapping[str, Any], *, storage: str | None = None) -> None:
        """Remove an object; see `flow_core.objects.delete`."""
        one = ObjectRef.of(ref)
        if isinstance(one.place, TaskFile):
            raise ValidationError(
                f"the object {one.uri} is part of the task {one.place.task_id}",
                suggestions=["Release the task: flow.release([task_id])."],
            )
        at, name = self._stored_at(one, () if storage is None else (storage,))
        at.delete(name)

    def clear(self, storage: str | None = None, *, older_than_s: float | None = None) -> int:
        """Remove old objects; see `flow_core.objects.clear`."""
        target = self._storage(storage or self._default)
        return target.clear(now=self._now(), older_than_s=older_than_s)

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
                there = None if contained else self._path_there(ref, provider)
                if there is None:
                    name = f"{INPUTS}/{number}"
                    more.append(SpecFile(name=name, path=stack.enter_context(self._path_here(ref))))
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
            there = None if contained else self._path_seen(ref, provider)
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
            with self._opened(ref, ()) as file, told(ref.uri):
                listed.append({**one, "part": len(values)})
                values.append(files.read(file, ref.size_bytes, ref.sha256, ref.uri))
        return Carried(tuple(listed), tuple(values))

    def _path_seen(self, ref: ObjectRef, provider: str) -> str | None:
        """Return the path under which a process of a task of `provider` can open the value now, None if it cannot."""
        if not self._engine(provider).provider.shares_files:
            return self._path_there(ref, provider)
        place = ref.place
        if isinstance(place, TaskFile):
            engine = self._engine(place.provider)
            if not engine.provider.shares_files:
                return None
            with self._explained(ref, place, engine):
                path: str | Path | None = engine.provider.locate(place.task_id, place.file)
        else:
            storage, name = self._stored_at(ref, ())
            path = storage.path(name)
        if path is None:
            return None
        with self._opened(ref, ()):  # who makes the call is told why it cannot be opened
            return str(path)

    def _path_there(self, ref: ObjectRef, provider: str) -> str | None:
        """Return the path under which a task of `provider` can open the value, None where it cannot."""
        place = ref.place
        if isinstance(place, TaskFile):
            engine = self._engine(place.provider)
            if (
                place.provider != provider or engine.provider.shares_files
            ):  # then it is linked, which outlives it
                return None
            with self._explained(ref, place, engine):
                return engine.provider.locate(place.task_id, place.file)
        storage, name = self._stored_at(ref, ())
        path = storage.path(name)
        return None if path is None or storage.root == self._home else str(path)

    @contextlib.contextmanager
    def _path_here(self, ref: ObjectRef) -> Iterator[Path]:
        """The path of a file of this machine with the value, while this lasts."""
        place = ref.place
        if isinstance(place, TaskFile):
            with self._task_file(ref, place) as path:
                yield path
            return
        storage, name = self._stored_at(ref, ())
        with self._opened(ref, ()) as file:
            path_here = storage.path(name)
            if path_here is not None:
                yield path_here
                return
            with self._draft() as draft:
                with told(ref.uri):
                    write_file(str(draft), files.checked(file, ref.size_bytes, ref.sha256, ref.uri))
                yield draft

    @contextlib.contextmanager
    def _task_file(self, ref: ObjectRef, place: TaskFile) -> Iterator[Path]:
        engine = self._engine(place.provider)
        with contextlib.ExitStack() as stack:
            with self._explained(ref, place, engine):
                located = engine.provider.locate(place.task_id, place.file)
                if located is not None and engine.provider.shares_files:
                    path = Path(located)
                else:
                    path = stack.enter_context(self._draft())
                    engine.provider.fetch(place.task_id, place.file, path)
            yield path

    @contextlib.contextmanager
    def _explained(self, ref: ObjectRef, place: TaskFile, engine: Engine) -> Iterator[None]:
        """Within this, a task's file that is not there is explained by the task's fate."""
        try:
            yield
        except ResourceNotFoundError as error:
            try:
                reason = engine.get(place.task_id).reason
            except TaskNotFoundError:
                reason = "unknown"
            fate = {
                "released": "was released by the host: its files are gone",
                "unknown": f"is not known to the {place.provider} provider of these settings any more",
            }.get(reason, "has no such file")
            raise ObjectNotFoundError(
                f"there is no object {ref.uri}: the task {place.task_id} {fate}",
                suggestions=[
                    "Run the task again.",
                    "Store what must outlive its task: put(ref) copies it into a storage.",
                ],
            ) from error

    # -- places

    @property
    def _home(self) -> str:
        return f"file://{self.settings.objects.home}"

    @property
    def _default(self) -> str:
        return self.settings.objects.storage or self._home

    def _storage(self, url: str) -> ObjectStorage:
        if "://" not in url:
            url = f"file://{Path(url).expanduser().absolute()}"
        return storage_at(url.rstrip("/"), private=self.settings.objects.home)

    def _stored_at(self, ref: ObjectRef, trusted: Collection[str]) -> tuple[ObjectStorage, str]:
        """Return the storage and the name in it. Raises ObjectError for a storage that these settings do not name."""
        place = ref.place
        assert isinstance(place, StoredFile)
        known = (self._home, self._default, *self.settings.objects.trusted, *trusted)
        for url in known:
            storage = self._storage(url) if url.rstrip("/") == place.root or "://" not in url else None
            if storage is not None and storage.root == place.root:
                return storage, place.name
        raise ObjectError(
            f"the reference leads to {place.root}, which is no storage of these settings",
            suggestions=[
                f"Where you trust it, add it to the settings: objects: {{trusted: [{place.root!r}]}}",
                "Or name it where you read: get(ref, storage=…).",
            ],
        )

    def _engine(self, provider: str) -> Engine:
        if provider not in self._engines:
            self._engines[provider] = Engine(
                providers.load(self.settings.model_copy(update={"provider": provider}))
            )
        return self._engines[provider]

    @contextlib.contextmanager
    def _draft(self) -> Iterator[Path]:
        """A path in the folder of this user's own, on one file system with the objects; removed at the end."""
        home = self.settings.objects.home
        private(str(home))
        path = home / f".new-{secrets.token_hex(8)}"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


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
