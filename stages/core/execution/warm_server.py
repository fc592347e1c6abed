"""A warm Python: it has imported the libraries of the stages, and forks for each stage of one Snakemake.

    python warm_server.py SNAKEMAKE FD PADDING

SNAKEMAKE is the process id of the Snakemake that started it, FD a Unix socket that listens, PADDING
room for the command lines of the forks. `warm_start` has the whole story. It imports nothing of this
project, so that a stage is always the code that lies there when it starts.
"""

import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder, which no stage has

import ctypes
import gc
import os
import random
import resource
import runpy
import selectors
import signal
import socket
import struct
import time
from contextlib import suppress
from importlib import import_module, invalidate_caches
from pathlib import Path

IMPORTED = (
    "accelerate.tracking", "diffusers.training_utils", "ftfy", "jaxtyping", "jsonschema", "numpy",
    "peft", "PIL.Image", "psutil", "pyarrow.ipc", "pyarrow.parquet", "rich.progress",
    "safetensors.torch", "scipy.ndimage", "scipy.stats", "torch", "tyro", "yaml",
)  # fmt: skip
IF_INSTALLED = ("pandas",)
"""Imported where it is there. No stage needs it, but pyarrow imports it before it makes a table of rows."""
CLASSES = {
    "diffusers": (
        "AutoencoderKL", "DDIMScheduler", "DDPMScheduler", "DiffusionPipeline",
        "UNet2DConditionModel",
    ),
    "transformers": (
        "AutoTokenizer", "CLIPTextModel", "CLIPTextModelWithProjection", "CLIPTokenizer",
    ),
}  # fmt: skip
"""What at least two jobs of a run import."""
THREADS = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "GOTO_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS", "NUMEXPR_NUM_THREADS",
)  # fmt: skip
"""Snakemake sets them for each job; a fork takes over its job's."""
OF_A_JOB = {
    *THREADS,
    *("TMPDIR", "TMP", "TEMPDIR", "TEMP", "PATH", "PWD", "OLDPWD", "SHLVL", "_"),
    *("SAIL_SNAKEMAKE", "SAIL_PYTHON", "JE_ARROW_MALLOC_CONF"),
}
"""Variables that differ between jobs, or from ours, and that no library looks at when it is imported."""
TAKEN, REFUSED, END = b"t", b"r", b"e"
READY = "ready"
"""As in `warm_client`."""
SECONDS = 10.0
"""A client that takes longer to say what it wants is refused."""
FORWARD_SECONDS, NEAR_SECONDS = 0.2, 2.0
PR_SET_PDEATHSIG = 1
KEPT = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM)
"""Signals that do not end the server; what they do in a fresh Python they do in a fork."""

Request = tuple[list[str], dict[str, str], int, list[int]]
"""The stage's module and flags, its environment, the shell that waits for it, its standard streams."""


class NotHere(Exception):
    """A stage that this process cannot run as a cold start would."""


class Job:
    """A fork at work, and the client that waits for it."""

    def __init__(self, pid: int, client: socket.socket) -> None:
        self.pid, self.client = pid, client
        self.end = os.pidfd_open(pid)


class Server:
    """Forks for clients until its Snakemake and all forks have ended."""

    def __init__(self, snakemake: int, listener: socket.socket, own: tuple[str, ...]) -> None:
        self.listener, self.own = listener, own
        self.variables = dict(os.environ)
        self.head = os.pidfd_open(snakemake)
        self.handlers = {number: signal.getsignal(number) for number in KEPT}
        self.jobs: list[Job] = []
        self.asked: dict[Job, float] = {}
        self.started = 0
        self.terminated = -SECONDS
        self.events = selectors.DefaultSelector()
        for file in (listener, self.head):
            self.events.register(file, selectors.EVENT_READ)

    def serve(self) -> Request:
        """Return in each fork, with its request; the server itself does not return."""
        while self.listener.fileno() >= 0 or self.jobs:
            for key, _ in self.events.select(FORWARD_SECONDS if self.asked else None):
                if key.fileobj is self.listener:
                    request = self.admit()
                    if request is not None:
                        return request
                elif key.fileobj == self.head:
                    self.close()
                elif key.data in self.jobs and key.fileobj is key.data.client:
                    self.hear(key.data)
                elif key.data in self.jobs:
                    self.tell_end(key.data)
            self.forward()
        own, forks = (
            sum(resource.getrusage(who)[:2])
            for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        )
        print(
            f"{self.started} stages took {forks:.1f} CPU seconds, their server {own:.1f} CPU seconds"
        )
        sys.stdout.flush()
        os._exit(0)

    def close(self) -> None:
        """Take no more requests; the stages at work notice for themselves that Snakemake is gone."""
        folder = Path(self.listener.getsockname()).parent
        self.events.unregister(self.head)
        self.events.unregister(self.listener)
        self.listener.close()
        with suppress(OSError):
            for path in (*folder.iterdir(), folder):
                path.rmdir() if path == folder else path.unlink()

    def admit(self) -> Request | None:
        """Fork for a client; a request in the fork, None in the server."""
        streams: list[int] = []
        client, blocked = None, signal.pthread_sigmask(signal.SIG_BLOCK, ())
        server = os.getpid()
        try:
            client, _ = self.listener.accept()
            client.settimeout(SECONDS)
            request = read_request(client, self.own, self.variables, streams)
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
            pid = os.fork()
        except Exception as error:  # whatever is unusual: the stage starts cold
            print(f"a stage starts cold: {error!r}", flush=True)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            close_all(streams)
            if client is not None:
                with suppress(OSError):
                    client.sendall(REFUSED)
                client.close()
            return None
        if not pid:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != server:
                os._exit(128 + signal.SIGKILL)
            self.forget(client)
            for number, handler in self.handlers.items():
                signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            return request
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        close_all(streams)
        self.started += 1
        job = Job(pid, client)
        with suppress(OSError):
            client.sendall(TAKEN)  # if it is gone, `hear` will know
        self.jobs.append(job)
        self.events.register(client, selectors.EVENT_READ, job)
        self.events.register(job.end, selectors.EVENT_READ, job)
        return None

    def forget(self, client: socket.socket) -> None:
        """In a fork: close what is the server's."""
        self.events.close()
        self.listener.close()
        client.close()
        os.close(self.head)
        for job in self.jobs:
            job.client.close()
            os.close(job.end)

    def hear(self, job: Job) -> None:
        """A client was sent SIGTERM, or has died, and its stage dies with it."""
        try:
            word = job.client.recv(1)
        except OSError:
            word = b""
        if not word:
            self.events.unregister(job.client)
            os.kill(job.pid, signal.SIGKILL)
        else:
            self.asked.setdefault(job, time.monotonic())

    def forward(self) -> None:
        """Send SIGTERM to the stages whose clients were sent it and they were not.

        Where all processes of a job were sent it, so were we, and so was the stage.
        """
        for job, asked in list(self.asked.items()):
            if time.monotonic() - asked > FORWARD_SECONDS:
                del self.asked[job]
                if abs(asked - self.terminated) > NEAR_SECONDS:
                    os.kill(job.pid, signal.SIGTERM)

    def tell_end(self, job: Job) -> None:
        """A fork has ended: the client ends likewise."""
        _, status = os.waitpid(job.pid, 0)
        with suppress(OSError):
            job.client.sendall(END + status.to_bytes(4, "big"))
        with suppress(KeyError):
            self.events.unregister(job.client)
        self.events.unregister(job.end)
        job.client.close()
        os.close(job.end)
        self.jobs.remove(job)
        self.asked.pop(job, None)

    def note_sigterm(self, *_: object) -> None:
        """Live on for the stages, which may save something; we end with Snakemake."""
        self.terminated = time.monotonic()


def read_request(
    client: socket.socket, own: tuple[str, ...], variables: dict[str, str], streams: list[int]
) -> Request:
    """What a client wants; `streams` takes its streams. NotHere, OSError or ValueError if it cannot be."""
    peer, user, _ = struct.unpack(
        "3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    )
    if user != os.getuid():
        raise NotHere("another user's")
    size, files, _, _ = socket.recv_fds(client, 8, 3)
    streams += files
    length = int.from_bytes(size, "big")
    data = bytearray()
    while len(data) < length:
        more = client.recv(min(1 << 20, length - len(data)))
        if not more:
            raise NotHere("gone")
        data += more
    executable, version, shell, count, *fields = map(os.fsdecode, bytes(data).split(b"\0"))
    words = fields[: int(count)]
    there = dict(field.split("=", 1) for field in fields[int(count) :])
    if (executable, version) != (sys.executable, sys.version) or len(files) != 3:
        raise NotHere("another Python")
    if surroundings(peer) != own or imports_by(there) != imports_by(variables):
        raise NotHere("other surroundings")
    if not all(there.get(name, "1").isdecimal() for name in THREADS):
        raise NotHere("threads that we cannot set")
    return words, there, int(shell), files


def surroundings(process: int | str) -> tuple[str, ...]:
    """What a fork has of its parent, and a cold start of its shell; the two must be equal.

    Folder, root, session, process group, niceness, user, groups, rights, mask of files, ignored and
    blocked signals, cores, limits, control group, name spaces.
    """
    place = Path("/proc", str(process))
    status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
    words = (place / "stat").read_text().rpartition(")")[2].split()
    names = (
        "Umask", "Uid", "Gid", "Groups", "SigBlk", "SigIgn", "CapInh", "CapPrm", "CapEff", "CapBnd",
        "CapAmb", "NoNewPrivs", "Seccomp", "Cpus_allowed", "Mems_allowed",
    )  # fmt: skip
    spaces = (str(os.readlink(path)) for path in sorted((place / "ns").iterdir()))
    return (
        os.readlink(place / "cwd"), os.readlink(place / "root"), *words[2:5], words[16],
        *(status.get(name, "") for name in names), (place / "limits").read_text(),
        (place / "cgroup").read_text(), *spaces,
    )  # fmt: skip


def imports_by(variables: dict[str, str]) -> dict[str, str]:
    """The variables that a library may look at while it is imported."""
    return {
        name: value
        for name, value in variables.items()
        if name not in OF_A_JOB and not name.startswith("SAIL_WARM_")
    }


def close_all(files: list[int]) -> None:
    """Close files by their numbers."""
    for file in files:
        os.close(file)


def become(request: Request) -> None:
    """Be what `python -m` would be in that environment, and run the stage."""
    words, variables, shell, streams = request
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    close_all(streams)
    os.environ.clear()
    os.environ.update(
        {k: v for k, v in variables.items() if not k.startswith("SAIL_WARM_")}
        | {"SAIL_SHELL": str(shell)}
    )
    set_title(" ".join(["python", "-m", *words]))
    try:
        set_threads()
    except (OSError, AttributeError):  # an OpenBLAS that we do not know
        os.execv(sys.executable, [sys.executable, "-m", *words])
    sys.stdout.reconfigure(line_buffering=os.isatty(1))  # type: ignore[union-attr]
    random.seed()
    sys.modules["numpy"].random.seed()
    sys.modules["torch"].default_generator.seed()
    if "tempfile" in sys.modules:
        sys.modules["tempfile"].tempdir = None  # type: ignore[attr-defined]
    invalidate_caches()
    sys.path.insert(0, os.getcwd())
    sys.argv = ["-m", *words[1:]]
    sys.orig_argv = [sys.executable, "-m", *words]
    gc.enable()
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def set_threads() -> None:
    """The threads of torch, Arrow and OpenBLAS, which have read their variables in the server.

    OSError or AttributeError where OpenBLAS cannot be told.
    """
    if "OMP_NUM_THREADS" in os.environ:
        number = int(os.environ["OMP_NUM_THREADS"])
        sys.modules["torch"].set_num_threads(number)
        sys.modules["pyarrow"].set_cpu_count(number)
    number = min(int(os.environ.get("OPENBLAS_NUM_THREADS", CORES)), CORES)
    if number > 1:
        maps = Path("/proc/self/maps").read_text().splitlines()
        for path in {line.split()[-1] for line in maps if "libscipy_openblas" in line}:
            library = ctypes.CDLL(path)
            name = "scipy_openblas_set_num_threads"
            getattr(library, name + ("64_" if "openblas64_" in path else ""))(number)


def set_title(title: str) -> None:
    """Show a command line in /proc and to `ps`, in the place of our own; as long as that was, at most.

    Where the kernel does not say where it lies, nothing is shown.
    """
    begin, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    size = end - begin
    if begin > 0 and size > 8:
        text = title.encode("utf-8", "surrogateescape")[: size - 2]
        # A last byte that is not 0 tells the kernel that this is a title.
        ctypes.memmove(begin, text.ljust(size - 1, b"\0") + b".", size)


def import_libraries() -> None:
    """Import what stages import, and keep it from the garbage collector."""
    gc.disable()
    for name in IMPORTED:
        import_module(name)
    for name in IF_INSTALLED:
        with suppress(ImportError):
            import_module(name)
    for library, names in CLASSES.items():
        for name in names:
            getattr(import_module(library), name)
    gc.freeze()


CORES = os.cpu_count() or 1


def main(snakemake: int, descriptor: int) -> None:
    """Import, serve, and in each fork run its stage."""
    own = surroundings("self")
    listener = socket.socket(fileno=descriptor)
    listener.set_inheritable(False)
    server = Server(snakemake, listener, own)
    if os.getppid() != snakemake:
        os._exit(0)
    for number in KEPT:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, server.note_sigterm)
    set_title(f"python: warm start of stages for snakemake {snakemake}")
    import_libraries()
    if len(os.listdir("/proc/self/task")) > 1:
        raise SystemExit("an import has started a thread, and a fork would lose it: cold starts")
    Path(listener.getsockname()).with_name(READY).touch()
    become(server.serve())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
