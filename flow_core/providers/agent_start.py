"""How an agent comes up on a machine that has nothing of ours: one command line, and its files if they are missing."""

from __future__ import annotations

import json
import secrets
import zlib
from dataclasses import dataclass

from flow_core.providers import folder as folders
from flow_core.runner.machine import version

_BOOT = r"""
import json, os, struct, sys
def say(**word):
    os.write(1, ("\n%s %s\n" % (told["mark"], json.dumps(word))).encode())
def take(size):
    data = b""
    while len(data) < size:
        piece = os.read(0, size - len(data))
        if not piece:
            sys.exit(1)
        data += piece
    return data
def private(folder):
    if not os.path.isdir(folder):
        private(os.path.dirname(folder))
        try:
            os.mkdir(folder, 0o700)
        except FileExistsError:
            pass
def install(target):
    import shutil, tempfile, zlib
    say(have=False)
    sources = json.loads(zlib.decompress(take(struct.unpack("!I", take(4))[0])).decode())
    private(os.path.dirname(target))
    draft = tempfile.mkdtemp(prefix=".new-", dir=os.path.dirname(target))
    try:
        for name, text in sources.items():
            path = os.path.join(draft, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        try:
            os.rename(draft, target)
        except OSError:
            if not os.path.isdir(target):
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
def newer():
    import shutil, subprocess
    for path in [shutil.which("python3.%d" % minor) for minor in range(40, 7, -1)]:
        if path and subprocess.call([path, "-I", "-S", "-c", ""], stderr=subprocess.DEVNULL) == 0:
            os.execv(path, [path, "-I", "-S", "-c", told["start"]] + sys.argv[1:])
    say(error="python", version=sys.version.split()[0], python=sys.executable)
    sys.exit(1)
told = json.loads(bytes.fromhex(sys.argv[2]).decode())
if sys.version_info < (3, 8):
    newer()
try:
    home = os.path.realpath(os.path.expanduser(told["home"]))
    if told["per_node"]:
        home = os.path.join(home, os.uname().nodename)
    target = os.path.join(home, "runner", told["version"])
    if not os.path.isdir(target):
        install(target)
    sys.path.insert(0, target)
    from flow_runner import agent, notes
    identity = notes.identity(home)
except OSError as error:
    say(error="home", home=told["home"], reason=str(error))
    sys.exit(1)
say(have=True, home=home, runner=target, facts=agent.facts(), identity=identity)
agent.main()
"""
_START = "import sys;exec(bytes.fromhex(sys.argv[1]))"


@dataclass(frozen=True)
class Start:
    """How an agent is started: `argv` to run there, and what to expect of it."""

    argv: tuple[str, ...]
    mark: str

    @classmethod
    def of(cls, python: str, home: str, *, per_node: bool) -> Start:
        """Describe the start of an agent for a home folder; `per_node` gives each machine its own folder in it.

        Nothing in `argv` means anything to a shell: it is hexadecimal but for the name of the Python.
        """
        mark = secrets.token_hex(8)
        told = {"home": home, "per_node": per_node, "mark": mark, "start": _START, "version": _version()}
        boot, words = (text.encode().hex() for text in (_BOOT, json.dumps(told)))
        return cls((python, "-I", "-S", "-c", _START, boot, words), mark)


def _version() -> str:
    return version(folders.runner_sources())


def package() -> bytes:
    """Return the files as the agent's start reads them."""
    texts = {f"flow_runner/{name}": data.decode() for name, data in folders.runner_sources().items()}
    texts["__main__.py"] = "import sys\n\nfrom flow_runner.main import main\n\nsys.exit(main(sys.argv))\n"
    data = zlib.compress(json.dumps(texts).encode(), 6)
    return len(data).to_bytes(4, "big") + data
