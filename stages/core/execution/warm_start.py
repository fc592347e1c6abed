"""Stages that start warm: forks of a Python that has imported torch, diffusers and the rest already.

A start is seconds of imports, and a run starts dozens of stages. With `execution.warm_start` Snakemake
listens at a Unix socket. The first stage that loads a model knocks there, and Snakemake starts the
server (`warm_server`), which imports the libraries, and nothing of this project, and then forks for
each stage. In a rule's shell, `python` then is `workflow/warm_python`, which calls `warm_client`; that
hands the stage over, waits, and ends as the stage did. Whatever is unusual starts cold.

- A fork has the environment, streams, threads and command line of the stage. It has the process group,
  folder, limits and cores of the client, or the server refuses it.
- A fork dies with its client and with the server. It ends with Snakemake and with its shell as every
  stage does (`stopping`). The server ends after Snakemake, once its forks have.
- No thread, no CUDA and no tensor arithmetic in the server, so that nothing is lost in a fork.
"""

from __future__ import annotations

import atexit
import os
import select
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from stages.core.execution.stopping import SNAKEMAKE

HERE = Path(__file__).resolve().parent
CLIENT, SERVER = HERE / "warm_client.py", HERE / "warm_server.py"
VARIABLES = ("SAIL_WARM_HEAD", "SAIL_WARM_PYTHON", "SAIL_WARM_CLIENT", "SAIL_WARM_SOCKET")
"""What tells the jobs: which Snakemake, which Python, what to call and where it knocks."""
LONGEST_SOCKET = 100
"""Characters; the system takes 107."""
TITLE_BYTES = 4000
"""Room for a stage's command line; the kernel shows 4096."""
DEVICES = ("/dev/nvidiactl", "/dev/kfd")
"""Of graphics cards, NVIDIA's and AMD's."""


def has_card() -> bool:
    """Whether this machine has a graphics card that a stage might use, asked without CUDA."""
    return any(Path(device).exists() for device in DEVICES)


def offer_warm_start(home: Path, log: Path) -> Path | None:
    """Listen for stages of this process, and tell its jobs so by `VARIABLES`; the socket, or None.

    `home` is the folder of the code, which leads PYTHONPATH in a job; `log` takes what the server says
    of itself. None where the system lacks something: then every stage starts cold.
    """
    for name in VARIABLES:
        os.environ.pop(name, None)  # of a Snakemake that has started this one
    places = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    python = shutil.which("python", path=places)
    if sys.platform != "linux" or python is None or not hasattr(os, "pidfd_open"):
        return None
    try:
        os.close(os.pidfd_open(os.getpid()))  # a kernel before 5.3 cannot
        folder = private_folder()
        path = folder / "socket"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(128)
    except (OSError, ValueError):
        return None
    snakemake = str(os.getpid())
    environment = {
        **os.environ,
        "PYTHONPATH": str(home),
        SNAKEMAKE: snakemake,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",  # or it has threads from its import on
        "JE_ARROW_MALLOC_CONF": "background_thread:false",
    }
    command = [python, str(SERVER), snakemake, str(listener.fileno()), "-" * TITLE_BYTES]
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    threading.Thread(
        target=_start_when_asked, args=(listener, command, environment, log), daemon=True
    ).start()
    values = (snakemake, python, str(CLIENT), str(path))
    os.environ.update(zip(VARIABLES, values, strict=True))
    return path


def private_folder() -> Path:
    """A new folder that only this user can enter, short of name; those of ended processes are removed.

    OSError if there can be none; ValueError if somebody else has made what should be ours, or the
    name is too long for a socket.
    """
    ours = Path(tempfile.gettempdir()) / f"sail-warm-{os.getuid()}"
    if len(str(ours)) + len("/4194304/socket") > LONGEST_SOCKET:
        ours = Path("/tmp") / ours.name
    ours.mkdir(mode=0o700, exist_ok=True)
    found = ours.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ValueError(f"{ours} is not this user's alone")
    for old in ours.iterdir():
        if not old.name.isdecimal() or not Path("/proc", old.name).exists():
            shutil.rmtree(old, ignore_errors=True)
    folder = ours / str(os.getpid())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    return folder


def _start_when_asked(
    listener: socket.socket, command: list[str], environment: dict[str, str], log: Path
) -> None:
    """Start the server for the first client, and leave the socket to it alone."""
    select.select([listener], [], [])
    with listener, suppress(OSError):
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.touch()
        except OSError:
            log = Path(os.devnull)
        with log.open("wb") as output:
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                pass_fds=[listener.fileno()],
            )
