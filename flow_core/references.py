"""What a live function refers to, and whether any of it has changed: late values without capturing anew.

Pickling a function takes a hundred times as long as a call may. So what it refers to is looked through once, as deep
as it travels by value: globals, closure cells, defaults, helpers, classes, containers, plain objects. After that a
glance at each place tells whether the same objects are still there. Data whose contents cannot be seen in this way (an
array, an object with a `__reduce__` of its own) makes the answer "perhaps". Annotations are not looked at.
"""

from __future__ import annotations

import collections
import copyreg
import dis
import functools
import operator
import sys
from collections.abc import Callable, Mapping
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GenericAlias,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodType,
    ModuleType,
    UnionType,
    WrapperDescriptorType,
)
from typing import Any

from flow_core.origin import is_importable, is_project

_MOST = 2000
"""Looking at more places than this takes about as long as capturing."""

_MISSING = object()
_EMPTY = object()
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: the class was made by a class statement, not in C
_CACHED = functools._lru_cache_wrapper  # noqa: SLF001 - what lru_cache makes

_FIXED = frozenset(
    {
        *(type(None), type(...), type(NotImplemented), bool, int, float, complex, str, bytes, range, object),
        *(CodeType, GenericAlias, GetSetDescriptorType, MemberDescriptorType, MethodDescriptorType),
        *(UnionType, WrapperDescriptorType),
    }
)
# Types of values that never change, or that travel by name; by theirs, so that nothing is imported for them.
_FIXED_NAMES = frozenset(
    {
        *("_abc._abc_data", "dataclasses.Field", "dataclasses._DataclassParams", "datetime.date"),
        *("datetime.datetime", "datetime.time", "datetime.timedelta", "datetime.timezone", "decimal.Decimal"),
        *("enum.property", "fractions.Fraction", "logging.Logger", "logging.RootLogger", "numpy.dtype"),
        *("numpy.ufunc", "operator.attrgetter", "operator.itemgetter", "pathlib.PosixPath"),
        *("pathlib.PurePosixPath", "re.Pattern", "types.DynamicClassAttribute", "uuid.UUID"),
        *("zoneinfo.ZoneInfo", "flow_core.object_ref.ObjectRef"),
    }
)
# In a class or module, made by Python itself.
_INERT = frozenset(
    {
        *("__annotations__", "__builtins__", "__dataclass_fields__", "__dict__", "__doc__", "__loader__"),
        *("__module__", "__orig_bases__", "__parameters__", "__qualname__", "__spec__", "__weakref__"),
        "_abc_impl",
    }
)
_GLOBAL = frozenset({"DELETE_GLOBAL", "LOAD_GLOBAL", "STORE_GLOBAL"})
_IN_CLASS_BODY = frozenset({"LOAD_FROM_DICT_OR_GLOBALS", "LOAD_NAME"})


class SentAsFunction:
    """The base of handles that are, on any other machine, the plain function that they stand for."""

    __wrapped__: Callable[..., Any]

    def __reduce__(self) -> tuple[Any, ...]:
        return operator.getitem, ((self.__wrapped__,), 0)


@functools.lru_cache(maxsize=10_000)
def global_names(code: CodeType) -> frozenset[str]:
    """Return the global names that the code uses, also in functions and class bodies inside it."""
    names, bound = set(), set()
    for step in dis.get_instructions(code):
        if step.opname == "STORE_NAME":
            bound.add(step.argval)
        elif step.opname in _GLOBAL or (step.opname in _IN_CLASS_BODY and step.argval not in bound):
            names.add(step.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= global_names(constant)
    return frozenset(names)


class References:
    """What a function refers to at the moment this is made. It keeps all of that alive."""

    def __init__(self, function: object) -> None:
        self._unclear = False
        self._names: list[tuple[Mapping[str, Any], str, object]] = []
        self._cells: list[tuple[CellType, object]] = []
        self._functions: list[tuple[FunctionType, object, object, object]] = []
        self._empty: list[Mapping[Any, Any]] = []
        self._contents: list[tuple[Any, tuple[Any, ...]]] = []
        self._attributes: list[tuple[Any, object]] = []
        self._seen: dict[int, object] = {}  # the values too, so that no other can get the id of one of them
        self._open: list[object] = [function]
        while self._open and not self._unclear:
            self._look(self._open.pop())
        self._open.clear()

    def unchanged(self) -> bool:
        """Whether all of it is certainly still the same."""
        if self._unclear:
            return False
        for function, code, defaults, named in self._functions:
            if (
                function.__code__ is not code
                or function.__defaults__ is not defaults
                or function.__kwdefaults__ is not named
            ):
                return False
        for namespace, name, value in self._names:
            if namespace.get(name, _MISSING) is not value:
                return False
        for mapping in self._empty:
            if mapping:
                return False
        return not (self._cells or self._contents or self._attributes) or self._same_inside()

    def _same_inside(self) -> bool:
        for cell, value in self._cells:
            if _inside(cell) is not value:
                return False
        for holder, attributes in self._attributes:
            if holder.__dict__ is not attributes:
                return False
        try:
            for container, values in self._contents:
                if len(container) != len(values) or not all(map(operator.is_, container, values)):
                    return False
        except RuntimeError:  # another thread is changing it right now
            return False
        return True

    # -- the first look

    def _look(self, value: object) -> None:
        kind = type(value)
        if kind in _FIXED or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        look = _LOOKS.get(kind)
        if len(self._seen) > _MOST:
            self._unclear = True
        elif look is not None:
            look(self, value)
        elif isinstance(value, SentAsFunction):
            self._open.append(value.__wrapped__)
        elif isinstance(value, type):
            self._look_at_class(value)
        elif _is_enum(value):
            self._open.append(kind)
        elif kind.__module__ != "typing" and f"{kind.__module__}.{kind.__qualname__}" not in _FIXED_NAMES:
            self._look_at_object(value, kind)

    def _look_at_function(self, function: FunctionType) -> None:
        if is_importable(function):
            return
        code, named = function.__code__, function.__kwdefaults__
        self._functions.append((function, code, function.__defaults__, named))
        self._open.extend(function.__defaults__ or ())
        if named:
            self._look_at_mapping(named)
        self._look_at_mapping(function.__dict__)
        for cell in function.__closure__ or ():
            value = _inside(cell)
            self._cells.append((cell, value))
            self._open.append(value)
        namespace = function.__globals__
        for name in global_names(code):
            value = namespace.get(name, _MISSING)
            self._names.append((namespace, name, value))
            self._open.append(value)

    def _look_at_cached(self, cached: Any) -> None:
        if not is_importable(cached):
            self._look_at_mapping(cached.__dict__)

    def _look_at_class(self, cls: type) -> None:
        if not is_importable(cls):
            copyreg._slotnames(cls)  # type: ignore[attr-defined]  # noqa: SLF001 - as the first pickling of an object
            self._look_at_mapping(vars(cls))  # would, which notes these in the class
            self._open.extend((*cls.__bases__, type(cls)))

    def _look_at_module(self, module: ModuleType) -> None:
        if is_project(module, module.__name__) or module.__name__ not in sys.modules:
            self._look_at_mapping(vars(module))

    def _look_at_mapping(self, mapping: Mapping[Any, Any]) -> None:
        if not mapping:
            self._empty.append(mapping)
            return
        keys, values = tuple(mapping), tuple(mapping.values())
        self._contents += [(mapping, keys), (mapping.values(), values)]
        self._open_all(keys)
        self._open_all(value for key, value in zip(keys, values, strict=False) if key not in _INERT)

    def _look_at_items(self, container: Any) -> None:
        items = tuple(container)
        self._contents.append((container, items))
        self._open_all(items)

    def _open_all(self, values: Any) -> None:
        self._open.extend(values)
        self._unclear = self._unclear or len(self._open) > _MOST

    def _look_at_object(self, value: object, kind: type) -> None:
        """Look at an instance: its attributes are all that there is to it if its class adds no state of its own."""
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is dict and _is_plain(kind):
            self._attributes.append((value, attributes))
            self._look_at_mapping(attributes)
            self._open.append(kind)
        else:
            self._unclear = True


def _inside(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:
        return _EMPTY


def _is_enum(value: object) -> bool:
    enum = sys.modules.get("enum")
    return enum is not None and isinstance(value, enum.Enum)


def _is_plain(kind: type) -> bool:
    """Whether pickling an instance takes its `__dict__` and nothing else."""
    usual: Any = object
    return (
        all(
            base is object or (base.__flags__ & _HEAP_TYPE and not vars(base).get("__slots__"))
            for base in kind.__mro__
        )
        and kind not in copyreg.dispatch_table
        and not hasattr(kind, "__getnewargs__")
        and not hasattr(kind, "__getnewargs_ex__")
        and all(
            getattr(kind, name, None) is getattr(usual, name, None)
            for name in ("__reduce_ex__", "__reduce__")
        )
        and getattr(kind, "__getstate__", None) is getattr(usual, "__getstate__", None)
    )


def _parts(*names: str) -> Callable[[References, Any], None]:
    """Return the look at a value that is made of other values once and for all."""

    def look(references: References, value: Any) -> None:
        references._open.extend(getattr(value, name, None) for name in names)  # noqa: SLF001

    return look


_LOOKS: Mapping[type, Callable[[Any, Any], None]] = {
    FunctionType: References._look_at_function,  # noqa: SLF001
    ModuleType: References._look_at_module,  # noqa: SLF001
    _CACHED: References._look_at_cached,  # noqa: SLF001
    **dict.fromkeys((dict, collections.OrderedDict), References._look_at_mapping),  # noqa: SLF001
    **dict.fromkeys((list, set, collections.deque), References._look_at_items),  # noqa: SLF001
    **dict.fromkeys((tuple, frozenset), References._open_all),  # noqa: SLF001
    **dict.fromkeys((staticmethod, classmethod), _parts("__func__")),
    **dict.fromkeys((functools.partial, functools.partialmethod), _parts("func", "args", "keywords")),
    MethodType: _parts("__func__", "__self__"),
    BuiltinFunctionType: _parts("__self__"),
    property: _parts("fget", "fset", "fdel"),
    functools.cached_property: _parts("func"),
}
