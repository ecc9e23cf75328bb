"""The user's processes: one per node, with its environment, log and GPUs. Standard library only, Python 3.8+."""

from __future__ import annotations

import os

from . import proc
from .spawn import Beginning, Gate, StartFailed, spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: What a container engine's own client needs to know; the command inside sees none of it.
ENGINE_VARIABLES = (
    "PATH",
    "HOME",
    "XDG_RUNTIME_DIR",
    "DOCKER_HOST",
    "DOCKER_CONFIG",
    "CONTAINERS_CONF",
    "CONTAINERS_STORAGE_CONF",
)


class Rank:
    """One node's process and all that it started."""

    def __init__(
        self, index: int, pid: int, container: Container | None, begun: Beginning | None = None
    ) -> None:
        self.index = index
        self.pid = pid
        self.container = container
        self.status: int | None = None
        self._begun = begun

    def confirm(self) -> None:
        """Return once its program has begun. Raises StartFailed."""
        if self._begun is not None:
            self._begun.confirm()

    @property
    def ended(self) -> tuple[int | None, int | None]:
        """(exit code, signal) of an ended process."""
        assert self.status is not None
        if os.WIFSIGNALED(self.status):
            return None, os.WTERMSIG(self.status)
        return os.WEXITSTATUS(self.status), None

    @property
    def failed(self) -> bool:
        """Whether it has ended, and not well."""
        return self.status is not None and self.status != 0

    def kill(self, number: int) -> None:
        """Signal the whole process group; nobody there is fine."""
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            pass

    def refusal(self, code: int | None) -> str:
        """Say why the container engine did not run the command, "" when the exit code is the user's own."""
        if self.container is None or code != 125:
            return ""
        what = f"{self.container.engine} could not run the image {self.container.image!r}"
        return f"{what} (exit code 125); its own words are in the log"

    def clean_up(self) -> None:
        """Remove the container, if there was one; the client's death does not end it."""
        if self.container is not None:
            self.container.remove()


class Container:
    """How a command runs inside an image."""

    def __init__(self, job: dict[str, Any], rank: int) -> None:
        spec = job["container"]
        self.engine: str = spec["engine"]
        self.image: str = spec["image"]
        self.name = f"flow-{job['task_id']}-{rank}"
        self.mounts: list[list[str]] = spec["mounts"]
        self.real_gpus: bool = spec["real_gpus"]

    @property
    def daemonless(self) -> bool:
        """Whether the container is a plain child process that needs no name and no removal."""
        return os.path.basename(self.engine) in ("apptainer", "singularity")

    def client_environment(self, env: dict[str, str]) -> dict[str, str]:
        """Return the variables of the engine's own process, through which those of the command come to it."""
        own = {name: os.environ[name] for name in ENGINE_VARIABLES if name in os.environ}
        if not self.daemonless:
            return {**env, **own}
        # A contained command sees nothing of its caller's environment but what carries this prefix.
        prefix = os.path.basename(self.engine).upper() + "ENV_"
        passed = {prefix + name: value for name, value in env.items()}
        return {**passed, **own, proc.MARKER: env[proc.MARKER]}

    def argv(self, command: list[str], env: dict[str, str], cwd: str, gpus: list[str]) -> list[str]:
        """Wrap a command. Values of variables stay out of the command line, where everybody could read them."""
        if self.daemonless:
            binds = [f"--bind={source}:{target}" for source, target in self.mounts]
            nvidia = ["--nv"] if self.real_gpus else []
            image = (
                self.image if "://" in self.image or os.path.exists(self.image) else "docker://" + self.image
            )
            return [self.engine, "exec", "--containall", *nvidia, *binds, "--pwd", cwd, image, *command]
        volumes = [f"--volume={source}:{target}" for source, target in self.mounts]
        names = [
            f"--env={name}={value}" if name in ENGINE_VARIABLES else f"--env={name}"
            for name, value in sorted(env.items())
        ]
        if not (self.real_gpus and gpus):
            devices: list[str] = []
        elif "podman" in os.path.basename(self.engine):
            devices = [f"--device=nvidia.com/gpu={gpu}" for gpu in gpus]
        else:
            devices = ['--gpus="device={}"'.format(",".join(gpus))]
        return [
            self.engine,
            "run",
            "--rm",
            "--name",
            self.name,
            f"--label=flow-task={self.name}",
            "--network=host",
            "--workdir",
            cwd,
            *volumes,
            *names,
            *devices,
            self.image,
            *command,
        ]

    def remove(self) -> None:
        """Remove the container if the engine can; without an engine that answers the task still ends."""
        import subprocess

        if not self.daemonless:
            try:
                subprocess.run(
                    [self.engine, "rm", "--force", self.name],
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    timeout=30,
                    check=False,
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                os.write(2, f"the container {self.name} could not be removed: {error}\n".encode())


def start(folder: str, job: dict[str, Any], granted: list[str], gate: Gate) -> list[Rank]:
    """Start every node's process, up to the gate. Raises StartFailed."""
    cwd = prepare(folder, job)
    nodes = job["num_instances"]
    share = len(granted) // nodes
    port = job["env"].get("MASTER_PORT") or (str(free_port()) if nodes > 1 else "29500")
    return [
        start_rank(
            folder, job, index, gate, gpus=granted[index * share : (index + 1) * share], port=port, cwd=cwd
        )
        for index in range(nodes)
    ]


def prepare(folder: str, job: dict[str, Any]) -> str:
    """Fill the working directory, which all nodes share; return the path that commands start in. Raises StartFailed."""
    work = os.path.join(folder, "work")
    os.makedirs(work, mode=0o700, exist_ok=True)
    archive = os.path.join(folder, "code.tar.gz")
    if os.path.exists(archive):
        from . import unpack

        try:
            unpack.extract(archive, work)
        except unpack.BadArchive as error:
            raise StartFailed(f"the code could not be unpacked: {error}") from error
    for name, source in job["links"]:
        link = os.path.join(work, name)
        os.makedirs(os.path.dirname(link), exist_ok=True)
        if not os.path.lexists(link):
            os.symlink(source, link)
    return os.path.join(work, job["working_dir"] or ".")


def start_rank(
    folder: str, job: dict[str, Any], index: int, gate: Gate, *, gpus: list[str], port: str, cwd: str
) -> Rank:
    """Start one node's process, up to the gate."""
    env = environment(folder, job, index, gpus, port)
    container = Container(job, index) if job.get("container") else None
    argv = command(folder, job)
    if container is not None:
        argv = container.argv(argv, env, cwd, gpus)
        env = container.client_environment(env)
    log = os.path.join(folder, f"log.{index}")
    begun = Beginning(f"could not start {argv[0]!r} in {cwd}: ")
    mounts = job["mounts"] if container is None else []
    return Rank(index, spawn(log, argv, gate, begun, env=env, cwd=cwd, mounts=mounts), container, begun)


def command(folder: str, job: dict[str, Any]) -> list[str]:
    """Render what is asked for as an argument list."""
    entry = job["entry"]
    if entry == "argv":
        return list(job["argv"])
    if entry == "shell":
        return ["/bin/bash" if os.path.exists("/bin/bash") else "/bin/sh", "-c", job["argv"][0]]
    if entry == "script":
        path = os.path.join(folder, "script")
        with open(path, "rb") as file:
            own_interpreter = file.read(2) == b"#!"
        return [path] if own_interpreter else [job["python"], path]
    return [job["python"], job["call"]]


def environment(folder: str, job: dict[str, Any], index: int, gpus: list[str], port: str) -> dict[str, str]:
    """Render one node's variables: the user's, then what the machine alone can know.

    The names are those of the documented API (FLOW_*) and of torch.distributed's env:// rendezvous.
    """
    nodes = str(job["num_instances"])
    main = job.get("main_address", "127.0.0.1")
    env = {
        "MASTER_ADDR": main,
        "MASTER_PORT": port,
        "WORLD_SIZE": nodes,
        "RANK": str(index),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "NODE_RANK": str(index),
        "NNODES": nodes,
    }
    env.update(job["env"])
    env.update(
        {
            proc.MARKER: folder,
            "FLOW_TASK_ID": job["task_id"],
            "FLOW_NODE_RANK": str(index),
            "FLOW_NUM_NODES": nodes,
            "FLOW_MAIN_IP": main,
            "FLOW_NUM_GPUS": str(len(gpus)),
            "CUDA_VISIBLE_DEVICES": ",".join(gpus),
        }
    )
    return env


def free_port() -> int:
    """Return a port that nobody listens on at this moment."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
