"""Ignore files, read exactly as git reads .gitignore. Pure: text and paths, no files.

Written here because pathspec lets a pattern that re-includes a folder (`*/`, then `!foo/`) re-include the folders
inside it as well, which git does not. The tests compare with `git check-ignore`. Bytes, as git: `?` is one byte.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

_CLASSES: dict[bytes, Callable[[bytes], bool]] = {
    b"alnum": lambda c: c.isalnum(),
    b"alpha": lambda c: c.isalpha(),
    b"blank": lambda c: c in b" \t",
    b"cntrl": lambda c: ord(c) < 32 or ord(c) == 127,
    b"digit": lambda c: c.isdigit(),
    b"graph": lambda c: 32 < ord(c) < 127,
    b"lower": lambda c: c.islower(),
    b"print": lambda c: 32 <= ord(c) < 127,
    b"punct": lambda c: 32 < ord(c) < 127 and not c.isalnum(),
    b"space": lambda c: c.isspace(),
    b"upper": lambda c: c.isupper(),
    b"xdigit": lambda c: c in b"0123456789abcdefABCDEF",
}


class IgnoreFile:
    """The rules of one ignore file. They apply to the folder it lies in and to those below."""

    def __init__(self, text: bytes) -> None:
        lines = text.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        rules = (_rule(line) for line in lines)
        self._rules = [rule for rule in reversed(list(rules)) if rule is not None]

    def verdict(self, path: bytes, *, is_folder: bool) -> bool | None:
        """Tell whether the last line that matches `path` excludes it; None where no line matches.

        `path` is relative to the file's folder. Folders above it do not count: ask for them first, and do not
        enter what is excluded, because nothing inside can be re-included.
        """
        name = path.rpartition(b"/")[2]
        for rule in self._rules:
            if (is_folder or not rule.folders_only) and rule.regex.fullmatch(path if rule.anchored else name):
                return rule.excludes
        return None


class _Rule:
    def __init__(self, pattern: bytes) -> None:
        self.excludes = not pattern.startswith(b"!")
        pattern = pattern.removeprefix(b"!")
        self.folders_only = pattern.endswith(b"/")
        pattern = pattern.removesuffix(b"/")
        self.anchored = b"/" in pattern
        self.regex = re.compile(_translated(pattern.removeprefix(b"/"), self.anchored), re.DOTALL)


def _rule(line: bytes) -> _Rule | None:
    pattern = _without_trailing_spaces(line.removesuffix(b"\r"))
    return None if not pattern or pattern.startswith(b"#") else _Rule(pattern)


def _without_trailing_spaces(line: bytes) -> bytes:
    match = re.fullmatch(rb"((?:\\.|[^\\ ]| +(?=[^ ]))*) *", line, re.DOTALL)
    return match[1] if match else line  # no match: it ends in a lone backslash


_NEVER = rb"(?!)"


def _translated(pattern: bytes, anchored: bool) -> bytes:
    """Return the regular expression of a pattern: git's `wildmatch` with WM_PATHNAME."""
    parts: list[bytes] = []
    position = 0
    while position < len(pattern):
        char = pattern[position : position + 1]
        if char == b"*":
            part, position = _stars(pattern, position, anchored)
        elif char == b"?":
            part, position = rb"[^/]", position + 1
        elif char == b"[":
            part, position = _bracket(pattern, position)
        elif char == b"\\":
            part = re.escape(pattern[position + 1 : position + 2]) or _NEVER
            position += 2
        else:
            part, position = re.escape(char), position + 1
        parts.append(part)
    return b"".join(parts)


def _stars(pattern: bytes, start: int, anchored: bool) -> tuple[bytes, int]:
    """`**` crosses folders where it stands alone between slashes; everywhere else stars stay inside one name."""
    end = start
    while pattern[end : end + 1] == b"*":
        end += 1
    alone = end - start > 1 and (start == 0 or pattern[start - 1 : start] == b"/")
    if anchored and alone and end == len(pattern):
        return rb".*", end
    if anchored and alone and pattern[end : end + 1] == b"/":
        return rb"(?:.*/)?", end + 1
    return rb"[^/]*", end


def _bracket(pattern: bytes, start: int) -> tuple[bytes, int]:
    """Read a set such as `[!a-z]`; one that is not closed, or names an unknown class, matches nothing."""
    position = start + 1
    negated = pattern[position : position + 1] in (b"!", b"^")
    position += negated
    members: set[int] = set()
    previous: int | None = None
    first = True
    while first or pattern[position : position + 1] != b"]":
        first = False
        item = _bracket_item(pattern, position, previous)
        if item is None:
            return _NEVER, len(pattern)
        found, previous, position = item
        members |= found
    chosen = (set(range(256)) - members if negated else members) - {ord("/")}
    regex = b"[" + b"".join(rb"\x%02x" % byte for byte in sorted(chosen)) + b"]" if chosen else _NEVER
    return regex, position + 1


def _bracket_item(
    pattern: bytes, position: int, previous: int | None
) -> tuple[set[int], int | None, int] | None:
    """Return (bytes meant, where a range may begin, next position), or None at the end of the pattern."""
    if position >= len(pattern):
        return None
    char, following = pattern[position], pattern[position + 1 : position + 2]
    if char == ord("-") and previous is not None and following not in (b"", b"]"):
        position += 2 if following == b"\\" else 1
        if position >= len(pattern):
            return None
        return set(range(previous, pattern[position] + 1)), None, position + 1
    if char == ord("[") and following == b":":
        end = pattern.find(b"]", position + 2)
        if end < 0:
            return None
        if end > position + 2 and pattern[end - 1 : end] == b":":
            members = _class_members(pattern[position + 2 : end - 1])
            return None if members is None else (members, None, end + 1)
    if char == ord("\\"):
        position += 1
        if position >= len(pattern):
            return None
        char = pattern[position]
    return {char}, char, position + 1


@functools.cache
def _class_members(name: bytes) -> set[int] | None:
    test = _CLASSES.get(name)
    return None if test is None else {byte for byte in range(128) if test(bytes([byte]))}
