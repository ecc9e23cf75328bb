"""The base of all validated values: frozen, without unknown fields, and with errors that say what to do.

Owns how pydantic's findings become a `flow_core.errors.ValidationError`. Knows nothing about tasks.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict
from pydantic_core import ErrorDetails
from typing_extensions import Self

from flow_core.errors import FlowError, ValidationError, close_names

T = TypeVar("T")


class Refusal(ValueError):
    """Raised by a rule: what the value must be ("must start with '/'"), and what to write instead."""

    def __init__(self, clause: str, *suggestions: str) -> None:
        super().__init__(clause)
        self.clause = clause
        self.suggestions = suggestions


class Value(BaseModel):
    """A frozen value. Whatever is wrong with it raises flow_core's ValidationError, never pydantic's.

    A field given as None counts as not given. The contents of fields in `secret_fields` appear neither in
    `repr` nor in errors.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        ser_json_bytes="base64",
        val_json_bytes="base64",
    )

    secret_fields: ClassVar[frozenset[str]] = frozenset()
    other_names: ClassVar[Mapping[str, str]] = {}
    """Accepted spellings of field names: {"gpu": "instance_type"}."""

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**self._canonical(fields))
        except pydantic.ValidationError as error:
            raise explain(type(self), error) from None

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except pydantic.ValidationError:
            raise ValidationError(
                f"{type(self).__name__} is frozen, so {name} cannot be set.",
                suggestions=["Make a new one with other values."],
            ) from None

    @pydantic.model_validator(mode="wrap")
    @classmethod
    def _names_are_text(cls, given: Any, make: pydantic.ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(given, dict) and not all(isinstance(name, str) for name in given):
            raise Refusal("must have text as the names of its fields")
        return make(given)

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Read a mapping (or an instance). Raises ValidationError."""
        try:
            return super().model_validate(obj, **options)
        except pydantic.ValidationError as error:
            raise explain(cls, error) from None

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """Read JSON text. Raises ValidationError."""
        try:
            return super().model_validate_json(json_data, **options)
        except pydantic.ValidationError as error:
            raise explain(cls, error) from None

    def __repr_args__(self) -> Any:
        for name, value in super().__repr_args__():
            if name in self.secret_fields and value:
                yield name, dict.fromkeys(value, "***") if isinstance(value, Mapping) else "***"
            else:
                yield name, value

    @classmethod
    def _canonical(cls, fields: Mapping[str, Any]) -> dict[str, Any]:
        """One name per field, and no field that was not given."""
        given = {name: value for name, value in fields.items() if value is not None}
        for other, name in cls.other_names.items():
            if other in given:
                value = given.pop(other)
                if given.setdefault(name, value) != value:
                    raise ValidationError(
                        f"{cls.__name__} got {name}={shown(given[name])} and {other}={shown(value)}, "
                        "which are two names of one field.",
                        suggestions=[f"Give only {name}."],
                    )
        return given


def shown(value: object) -> str:
    """`repr(value)`, shortened so that it fits into a message."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)


def explain(model: type[Value], error: pydantic.ValidationError) -> ValidationError:
    """Say in one error of ours everything that pydantic found."""
    found = [_finding(model, details) for details in error.errors()]
    suggestions = [hint for _, hints in found for hint in hints]
    return ValidationError("\n".join(text for text, _ in found), suggestions=list(dict.fromkeys(suggestions)))


def _finding(model: type[Value], details: ErrorDetails) -> tuple[str, Sequence[str]]:
    kind, loc, ctx = details["type"], details["loc"], details.get("ctx", {})
    cause = ctx.get("error")
    field = str(loc[0]) if loc else ""
    where = f"{model.__name__}.{_path(loc)}" if loc else model.__name__
    if kind == "extra_forbidden":
        return f"{model.__name__} has no field {field!r}.", _names_like(model, field)
    if kind == "missing":
        return f"{model.__name__} needs {_path(loc)}.", _example(model, field)
    if isinstance(
        cause, FlowError
    ):  # a value inside this one has explained itself, or a rule about all fields
        return (f"{where}: {cause.message}" if loc else cause.message), cause.suggestions
    if isinstance(cause, Refusal):
        clause, hints = cause.clause, cause.suggestions or _example(model, field)
    else:
        clause, hints = _clause(kind, ctx, details["msg"]), _example(model, field)
    if not loc:
        return f"{where} {clause}.", hints
    if loc[-1] == "[key]":
        return f"{model.__name__}.{field} has the name {shown(details['input'])}, which {clause}.", hints
    hidden = field in model.secret_fields
    return f"{where} {clause}" + ("." if hidden else f" (got {shown(details['input'])})."), hints


def _path(loc: Sequence[int | str]) -> str:
    """`("volumes", 0, "size_gb")` as the user would write it: `volumes[0].size_gb`."""
    text = str(loc[0])
    for part in loc[1:]:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if part.isidentifier() and loc[0] not in ("env", "labels") else f"[{part!r}]"
    return text


_CLAUSES: Mapping[str, str] = {
    "string_type": "must be text",
    "string_unicode": "must be text that UTF-8 can write",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "path_type": "must be a path",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "sequence_str": "must be a list",
    "dict_type": "must be a mapping",
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "literal_error": "must be {expected}",
    "model_type": "must be a {class_name} or a mapping",
}


def _clause(kind: str, ctx: Mapping[str, Any], message: str) -> str:
    if kind == "is_instance_of" and ctx.get("class") == "Sequence":
        return "must be a list"
    clause = _CLAUSES.get(kind)
    return clause.format(**ctx) if clause else f"is refused: {message}"


def _names_like(model: type[Value], name: str) -> list[str]:
    names = [*model.model_fields, *model.other_names]
    near = close_names(name, names)
    if near:
        return [f"Did you mean {' or '.join(near)}?"]
    return [f"Its fields are {', '.join(sorted(names))}."]


def _example(model: type[Value], field: str) -> list[str]:
    known = model.model_fields.get(field)
    if known is None or not known.examples:
        return []
    return [f"Write it like {' or '.join(f'{field}={example!r}' for example in known.examples)}."]


# -- kinds of fields


def matching(pattern: str, clause: str) -> Callable[[str], str]:
    """A rule for text: all of it matches `pattern`, else it is refused with `clause`."""
    compiled = re.compile(pattern)

    def rule(text: str) -> str:
        if not compiled.fullmatch(text):
            raise Refusal(clause)
        return text

    return rule


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise Refusal("must be a number")
    return value


def _plain(text: str) -> str:
    if not text.strip():
        raise Refusal("must not be empty")
    return sendable(text)


def sendable(text: str) -> str:
    """A rule for text that reaches a process on another machine: UTF-8 can write it, and no NUL byte ends it early."""
    if "\0" in text:
        raise Refusal("must not contain a NUL byte")
    if not text.isascii() and any("\ud800" <= sign <= "\udfff" for sign in text):
        raise Refusal("must be text that UTF-8 can write")
    return text


Count = Annotated[int, BeforeValidator(_no_bool)]
"""A whole number; True is none."""

Number = Annotated[float, BeforeValidator(_no_bool)]
"""A finite number; True is none."""

Text = Annotated[str, AfterValidator(_plain)]
"""Text that is not empty."""

Items = Annotated[Sequence[T], AfterValidator(tuple)]
"""Takes any list or tuple and keeps a tuple."""
