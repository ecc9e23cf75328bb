"""How a call finds its function: files, packages, names, arguments; on every Python that is here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.core.conftest import Machine

NASTY = ["", "'; rm -rf /; '", '"\\"', "a\nb\r\n", "\0", "\ud800", "😀 é", "$(date) `id` %s {0}", "\u2028"]


# ------------------------------------------------------------ finding the function


def test_a_missing_file_names_the_close_one(each: Machine) -> None:
    each.write({"train.py": "", "models/net.py": ""})
    record = each.run("trian.py").record
    assert record["type"] == "FileNotFoundError"
    assert "there is no file 'trian.py'" in record["message"]
    assert "did you mean 'train.py'? Python files there: models/net.py, train.py" in record["message"]


def test_a_missing_function_names_the_close_ones_and_the_public_ones(each: Machine) -> None:
    code = (
        "from os import path\nX = path.join\ndef train_model(): pass\ndef _own(): pass\ndef other(): pass\n"
    )
    record = each.call(code, "train_mode").record
    assert record["message"] == (
        "'train.py' has no function 'train_mode'; did you mean 'train_model'? Its functions: other, train_model"
    )


def test_a_name_that_is_no_function_is_refused(machine: Machine) -> None:
    assert "'f' in 'train.py' cannot be called: it is of type int" in machine.call("f = 3").record["message"]


def test_a_missing_dotted_module_names_the_close_one(each: Machine) -> None:
    each.write({"pkg/__init__.py": "", "pkg/train.py": "def f(): return __name__"})
    assert each.run("pkg.train").value == "pkg.train"
    record = each.run("pkg.trian").record
    assert record["type"] == "ModuleNotFoundError"
    assert "did you mean 'pkg.train'" in record["message"]


@pytest.mark.parametrize("module", ["a\0b.py", "../../../etc/passwd.py", "'; x.py", "no\nname", "", "."])
def test_a_nasty_module_path_is_an_error_like_any_other(machine: Machine, module: str) -> None:
    assert machine.run(module).code == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (((), {}), "f() missing 1 required positional argument: 'path'"),
        (((1, 2, 3), {}), "f() takes from 1 to 2 positional arguments but 3 were given"),
        (((1,), {"epoch": 3}), "f() got an unexpected keyword argument 'epoch'"),
    ],
)
def test_arguments_that_do_not_fit_are_called_so(each: Machine, arguments: Any, text: str) -> None:
    args, kwargs = arguments
    record = each.call("def f(path, epochs=1): pass", "f", args, kwargs).record
    assert record["type"] == "TypeError"
    assert record["message"].startswith(f"the arguments of the call do not fit f(path, epochs=1): {text}")


def test_a_type_error_inside_the_function_stays_as_it_is(each: Machine) -> None:
    record = each.call("def g(x): pass\ndef f():\n    g()").record
    assert record["message"].startswith("g() missing 1 required")
    assert "in f" in record["traceback"]


def test_arguments_that_do_not_fit_a_decorated_function_are_called_so(each: Machine) -> None:
    code = """
import functools
def deco(function):
    @functools.wraps(function)
    def wrapper(*a, **k): return function(*a, **k)
    return wrapper
@deco
@functools.lru_cache()
def f(x): return x
"""
    assert each.call(code, "f", [4]).value == 4
    assert "do not fit f(x)" in each.call(code, "f", []).record["message"]


def test_relative_imports_work_in_packages_named_by_dots_and_by_file(each: Machine) -> None:
    each.write(
        {
            "src/pkg/__init__.py": "",
            "src/pkg/util.py": "X = 5",
            "src/pkg/train.py": "from .util import X\nfrom pkg import util\ndef f():\n    return [X, __name__, util.X]",
            "pkg2/__init__.py": "from .train import f",
            "pkg2/train.py": "from . import other\ndef f():\n    return other.Y",
            "pkg2/other.py": "Y = 6",
        }
    )
    assert each.run("src/pkg/train.py").value == [5, "pkg.train", 5]
    assert each.run("pkg2.train").value == 6
    assert each.run("pkg2/__init__.py").value == 6


def test_a_file_in_a_plain_folder_sees_its_neighbours_and_the_root(each: Machine) -> None:
    code = "import near, top\ndef f():\n    return near.B + top.A"
    each.write({"top.py": "A = 1", "jobs/near.py": "B = 2", "jobs/train.py": code})
    assert each.run("jobs/train.py").value == 3


@pytest.mark.parametrize(
    "name", ["json", "types", "os", "re", "call", "task", "execute", "__main__", "a-b c", "v1.2"]
)
def test_a_file_may_have_any_name(each: Machine, name: str) -> None:
    each.put(f"{name}.py", "import random\ndef f(x):\n    return [x, __file__]")
    assert each.run(f"{name}.py", "f", [1]).value == [1, str(each.work / f"{name}.py")]


def test_files_that_hide_standard_modules_do_not_hide_them_from_the_runner(each: Machine) -> None:
    for name in ("traceback", "linecache", "inspect", "difflib", "asyncio", "json", "tokenize", "pickle"):
        each.put(f"{name}.py", "raise RuntimeError('the wrong one')")
    code = "def f(x):\n    raise ValueError('right')\nasync def g():\n    return 1"
    assert "raise ValueError('right')" in each.call(code, "f", [1]).record["traceback"]
    assert "do not fit f(x)" in each.run("train.py", "f").record["message"]
    assert "did you mean" in each.run("train.py", "ff").record["message"]
    assert each.run("train.py", "g").value == 1


def test_a_package_beside_a_file_of_the_same_name_does_not_hide_it(each: Machine) -> None:
    each.put("train/__init__.py", "def f(): return 'package'")
    assert each.call("def f(): return 'file'").value == "file"


def test_the_module_can_be_pickled_and_processes_can_be_started(each: Machine) -> None:
    done = each.call("""
from __future__ import annotations
import dataclasses, multiprocessing, pickle
@dataclasses.dataclass
class Point:
    x: int
def double(point): return Point(point.x * 2)
def f(method):
    assert pickle.loads(pickle.dumps(Point(1))) == Point(1)
    with multiprocessing.get_context(method).Pool(2) as pool:
        return [point.x for point in pool.map(double, [Point(1), Point(2)])]
if __name__ == '__main__':
    raise RuntimeError('run as a script')
if __name__ == '__mp_main__':
    raise RuntimeError('run as a script by a child')
""", args=["fork"])  # fmt: skip
    assert done.value == [2, 4]
    assert each.run("train.py", "f", ["spawn"]).value == [2, 4]
