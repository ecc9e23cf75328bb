"""Where the values of references lie, for these settings, and how their files are opened: here, and elsewhere."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from flow_core import config, providers
from flow_core.engine import Engine
from flow_core.errors import ObjectError, ObjectNotFoundError, ResourceNotFoundError, TaskNotFoundError
from flow_core.object_ref import ObjectRef, StoredFile, TaskFile
from flow_core.object_storage import ObjectStorage, storage_at, told
from flow_core.runner import objects as files
from flow_core.runner.execute import write_file
from flow_core.runner.machine import private


class Places:
    """The storages that the settings name, and the folders of tasks. Holds nothing but an engine for each provider."""

    def __init__(self, settings: config.Settings, engine: Engine | None, *, now: Callable[[], float]) -> None:
        self.settings = settings
        self.now = now
        self._engines = {} if engine is None else {engine.provider.name: engine}

    @contextlib.contextmanager
    def opened(self, ref: ObjectRef, trusted: Collection[str]) -> Iterator[Any]:
        """The open file of a value, at the value."""
        place = ref.place
        if isinstance(place, TaskFile):
            with self._task_file(ref, place) as path:
                with told(ref.uri):
                    file = files.open_file(str(path), ref.size_bytes, tail=place.tail)
                with file:
                    yield file
            return
        storage, name = self.stored_at(ref, trusted)
        try:
            with storage.open(name, ref.size_bytes) as file:
                yield file
        except ObjectNotFoundError as error:
            raise self._gone(ref) from error

    def _gone(self, ref: ObjectRef) -> ObjectNotFoundError:
        if ref.expires_at is not None and ref.expires_at < self.now():
            when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(ref.expires_at))
            return ObjectNotFoundError(
                f"the object {ref.uri} expired on {when} and has been removed",
                suggestions=["Make it anew.", "Give put() a longer max_age_s, or set objects.max_age_days."],
            )
        return ObjectNotFoundError(
            f"there is no object {ref.uri}",
            suggestions=["It was deleted, or it was put into a folder of another machine or user."],
        )

    def path_seen(self, ref: ObjectRef, provider: str) -> str | None:
        """Return the path under which a process of a task of `provider` can open the value now, None if it cannot."""
        if not self._engine(provider).provider.shares_files:
            return self.path_there(ref, provider)
        place = ref.place
        if isinstance(place, TaskFile):
            engine = self._engine(place.provider)
            if not engine.provider.shares_files:
                return None
            with self._explained(ref, place, engine):
                path: str | Path | None = engine.provider.locate(place.task_id, place.file)
        else:
            storage, name = self.stored_at(ref, ())
            path = storage.path(name)
        if path is None:
            return None
        with self.opened(ref, ()):  # who makes the call is told why it cannot be opened
            return str(path)

    def path_there(self, ref: ObjectRef, provider: str) -> str | None:
        """Return the path under which a task of `provider` can open the value, None where it cannot."""
        place = ref.place
        if isinstance(place, TaskFile):
            engine = self._engine(place.provider)
            if place.provider != provider or engine.provider.shares_files:
                return None  # then it is linked, which outlives it
            with self._explained(ref, place, engine):
                return engine.provider.locate(place.task_id, place.file)
        storage, name = self.stored_at(ref, ())
        path = storage.path(name)
        return None if path is None or storage.root == self.home else str(path)

    @contextlib.contextmanager
    def path_here(self, ref: ObjectRef) -> Iterator[Path]:
        """The path of a file of this machine with the value, while this lasts."""
        place = ref.place
        if isinstance(place, TaskFile):
            with self._task_file(ref, place) as path:
                yield path
            return
        storage, name = self.stored_at(ref, ())
        with self.opened(ref, ()) as file:
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
    def home(self) -> str:
        """The folder that is this user's alone, as a storage."""
        return f"file://{self.settings.objects.home}"

    @property
    def default(self) -> str:
        """The storage that `put` writes to."""
        return self.settings.objects.storage or self.home

    def storage(self, url: str) -> ObjectStorage:
        """Return the storage at a URL, or at the path of a folder."""
        if "://" not in url:
            url = f"file://{Path(url).expanduser().absolute()}"
        return storage_at(url.rstrip("/"), private=self.settings.objects.home)

    def stored_at(self, ref: ObjectRef, trusted: Collection[str]) -> tuple[ObjectStorage, str]:
        """Return the storage and the name in it. Raises ObjectError for a storage that these settings do not name."""
        place = ref.place
        assert isinstance(place, StoredFile)
        known = (self.home, self.default, *self.settings.objects.trusted, *trusted)
        for url in known:
            storage = self.storage(url) if url.rstrip("/") == place.root or "://" not in url else None
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
