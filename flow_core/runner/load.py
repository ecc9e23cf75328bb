"""Finds the user's function and calls it: import rules, and words for what is missing or does not fit."""

from __future__ import annotations

import os
import sys

from . import stdlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from types import ModuleType
    from typing import Any


def function_of(module_path: str, name: str, roots: list[str]) -> Callable[..., Any]:
    """Return the function `name` of a file (`train.py`, `pkg/train.py`) or module (`pkg.train`) of the user's.

    Raises FileNotFoundError, ModuleNotFoundError, AttributeError or TypeError where there is none, with the close
    names, and whatever the module raises while it is imported.
    """
    module = load(module_path, roots)
    found: Any = module
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            functions = [
                key for key, value in vars(module).items() if _is_public_function(key, value, module)
            ]
            text = f"{module_path!r} has no function {name!r}"
            raise AttributeError(text + _suggest(name, functions, "Its functions")) from None
    if not callable(found):
        raise TypeError(f"{name!r} in {module_path!r} cannot be called: it is of type {type(found).__name__}")
    function: Callable[..., Any] = found
    return function


def load(module_path: str, roots: list[str]) -> ModuleType:
    """Import the user's module under its own name, so that it can be pickled and its relative imports work.

    A file inside packages is imported as their module; any other file as Python runs a script: its own folder comes
    first on the path.
    """
    path = _file_of(module_path, roots)
    if path is None:
        if module_path.endswith(".py") or "/" in module_path:
            raise FileNotFoundError(_missing_file(module_path, roots))
        return _import_module(module_path, roots)
    folder, stem = os.path.split(path[: -len(".py")] if path.endswith(".py") else path)
    parts = [stem]
    while os.path.isfile(os.path.join(folder, "__init__.py")):
        folder, package = os.path.split(folder)
        parts.insert(0, package)
    if folder not in roots:
        sys.path.insert(0, folder)
    if len(parts) > 1:
        return _imported(".".join(parts[:-1] if stem == "__init__" else parts))
    if path == os.path.join(folder, stem + ".py") and _is_free(folder, stem):
        module = _imported(stem)
        if getattr(module, "__file__", None) == path:
            return module
    return _load_file(path, stem)


def apply(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], name: str) -> Any:
    """Call the function; an async one is run to its end. A TypeError says so when the arguments do not fit."""
    try:
        value = function(*args, **kwargs)
    except TypeError as error:
        trace, wrapped = error.__traceback__, function
        while hasattr(wrapped, "__wrapped__") and trace is not None:
            trace, wrapped = trace.tb_next, wrapped.__wrapped__
        if trace is None or trace.tb_next is None:  # raised before the function's own first line
            signature = _signature_refusing(function, args, kwargs)
            if signature is not None:
                raise TypeError(f"the arguments of the call do not fit {name}{signature}: {error}") from None
        raise
    return awaited(value) if hasattr(type(value), "__await__") else value


def awaited(value: Awaitable[Any]) -> Any:
    """Run what an async function has returned to its end, in an event loop of its own; return its value."""

    async def outcome() -> Any:
        return await value

    return stdlib.standard("asyncio").run(outcome())


def iterated(made: Any) -> Iterator[Any]:
    """Yield what a generator yields, of either kind. Closing this closes the generator."""
    if not hasattr(type(made), "__anext__"):
        yield from made
        return
    loop = stdlib.standard("asyncio").new_event_loop()
    try:
        while True:
            try:
                yield loop.run_until_complete(made.__anext__())
            except StopAsyncIteration:
                return
    finally:
        loop.run_until_complete(made.aclose())
        loop.close()


def _file_of(module_path: str, roots: list[str]) -> str | None:
    """The file, where the path names one: `package.py` could also be the module `py` of a package."""
    if "\0" in module_path or not (module_path.endswith(".py") or "/" in module_path):
        return None
    for root in roots:
        path = os.path.normpath(os.path.join(root, module_path))
        if os.path.isfile(path):
            return path
    return None


def _is_free(folder: str, stem: str) -> bool:
    """Whether importing `stem` would find the file `stem.py` of this folder, and not another module or a package."""
    return "." not in stem and stem not in sys.modules and not os.path.isdir(os.path.join(folder, stem))


def _imported(name: str) -> ModuleType:
    __import__(name)
    return sys.modules[name]


def _import_module(name: str, roots: list[str]) -> ModuleType:
    try:
        return _imported(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, and misses one itself
        modules = [file[: -len(".py")].replace("/", ".") for file in _python_files(roots[0])]
        text = f"there is no module {name!r}, neither installed nor in {roots[0]}"
        raise ModuleNotFoundError(text + _suggest(name, modules, "Modules there"), name=error.name) from None


def _load_file(path: str, stem: str) -> ModuleType:
    """Import a file whose name means another module to Python, such as `types.py` or `train.v2.py`."""
    util, machinery = stdlib.standard("importlib.util"), stdlib.standard("importlib.machinery")
    name = "flow_call_" + stem.replace(".", "_")
    spec = util.spec_from_file_location(name, path, loader=machinery.SourceFileLoader(name, path))
    module: ModuleType = util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _missing_file(module_path: str, roots: list[str]) -> str:
    found = _python_files(roots[0])
    return f"there is no file {module_path!r} in {roots[0]}" + _suggest(
        module_path, found, "Python files there"
    )


def _python_files(root: str) -> list[str]:
    files: list[str] = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        files += [os.path.relpath(os.path.join(folder, name), root) for name in names if name.endswith(".py")]
        if len(files) > 1000:
            break
    return files


def _is_public_function(key: str, value: object, module: ModuleType) -> bool:
    ours = getattr(value, "__module__", None) == module.__name__ or hasattr(value, "__wrapped__")
    return callable(value) and ours and not key.startswith("_")


def _suggest(wanted: str, names: list[str], title: str) -> str:
    close = stdlib.standard("difflib").get_close_matches(wanted, names, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    listed = ", ".join(sorted(names)[:20]) + (", …" if len(names) > 20 else "")
    return f"{hint} {title}: {listed or 'none'}"


def _signature_refusing(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> str | None:
    """Return the signature when the arguments do not fit it."""
    with stdlib.Unshadowed():
        import inspect

        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):
            return None  # a function in C does not always have one
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return str(signature)
    return None
