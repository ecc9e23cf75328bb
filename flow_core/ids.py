"""Names of tasks, computed from keys. Pure: every id is known before anything starts."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass, replace

from flow_core.errors import TaskNotFoundError

_PATTERN = re.compile(
    r"(?P<slug>[a-z0-9](?:[a-z0-9-]{0,39})?)-(?P<digest>[0-9a-f]{16})-(?P<attempt>[1-9][0-9]{0,8})"
)


@dataclass(frozen=True)
class TaskId:
    """A task id in its parts: `slug` for people, `digest` of the key and `attempt` for machines."""

    slug: str
    digest: str
    attempt: int

    def __str__(self) -> str:
        return f"{self.slug}-{self.digest}-{self.attempt}"

    @classmethod
    def first(cls, name: str, key: str) -> TaskId:
        """Return the id of the first attempt at `key`."""
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower())[:40].strip("-")
        return cls(slug or "task", digest(key), 1)

    @classmethod
    def parse(cls, text: str) -> TaskId:
        """Take an id apart. Raises TaskNotFoundError for anything that we did not name."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise TaskNotFoundError(
                f"{text!r} is not a task id",
                suggestions=[
                    "A task id looks like 'train-3f2a9c1b7d5e8f60-1'; list the tasks with flow.list_tasks()."
                ],
            )
        return cls(match["slug"], match["digest"], int(match["attempt"]))

    def next(self) -> TaskId:
        """Return the id of the attempt after this one."""
        return replace(self, attempt=self.attempt + 1)


def is_task_id(text: str) -> bool:
    """Whether a text has the form of a task id."""
    return _PATTERN.fullmatch(text) is not None


def digest(key: str) -> str:
    """Return the 16 hex digits that stand for a key wherever its characters would be in the way."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def random_key() -> str:
    """Return a key that nobody else has, for a task that is not to be found again by key."""
    return secrets.token_hex(16)
