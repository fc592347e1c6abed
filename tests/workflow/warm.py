"""Pythons that start at once: forks of one that has imported what stages and Snakemake import.

A run of the tests is dozens of stages that import for seconds and work for a tenth of one. `bin/python`
beside the socket stands before the real `python` in PATH, and has stages and Snakemakes forked; anything
else is started as it is. Nothing of this project has been imported before the fork. Where a test kills,
signals or looks at processes, it starts real ones; so do .ci/run's own run and the runs under chaos.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TextIO

IMPORTED = (
    "accelerate.tracking", "diffusers.training_utils", "ftfy", "jaxtyping", "jinja2", "jsonschema",
    "matplotlib.figure", "pandas", "peft", "psutil", "pyarrow.ipc", "pyarrow.parquet", "rich.progress",
    "safetensors.torch", "scipy.ndimage", "scipy.stats", "snakemake.cli", "torch", "tyro", "yaml",
)  # fmt: skip
CLASSES = {
    "diffusers": (
        "AutoencoderKL", "DDIMScheduler", "DDPMScheduler", "DiffusionPipeline",
        "UNet2DConditionModel",
    ),
    "transformers": (
        "AutoTokenizer", "CLIPTextModel", "CLIPTextModelWithProjection", "CLIPTokenizer",
    ),
}  # fmt: skip
READ_AT_IMPORT = (
    "CUDA",
    "DIFFUSERS",
    "DISABLE_TELEMETRY",
    "GOMP",
    "HF_",
    "OMP_WAIT",
    "TRANSFORMERS",
)
"""Beginnings of variables that a library may look at while it is imported."""

Request = tuple[list[str], str, dict[str, str]]
"""The words after `python -m`, the working directory, the environment."""

CLIENT = """\
#!{real} -ISE
import os, sys
words = sys.argv[1:]
if words[:1] != ["-m"] or not (words[1:2] == ["snakemake"] or words[1:] and words[1].startswith("stages.")):
    os.execv("{real}", ["{real}", *words])
import json, signal, socket
with socket.socket(socket.AF_UNIX) as server:
    server.connect("{socket}")
    request = json.dumps([words[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], [0, 1, 2])
    server.sendall(request)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: server.sendall(bytes([number])))
    status = int.from_bytes(server.recv(4), "big")
if os.WIFSIGNALED(status):
    signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
    os.kill(os.getpid(), os.WTERMSIG(status))
os._exit(os.WEXITSTATUS(status))
"""


SERVERS: list[subprocess.Popen[str]] = []
"""Those of this process; each lives as long as its standard input is open."""


@atexit.register
def end_servers() -> None:
    """Close the servers' standard input, by which they end, and wait for that."""
    for server in SERVERS:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.close()
        server.stdout.close()
        server.wait(10)


@cache
def warm_python() -> Path:
    """A `python` whose stages and Snakemakes start at once; it ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="sail-warm-"))
    (folder / "bin").mkdir()
    client = folder / "bin" / "python"
    client.write_text(CLIENT.format(real=sys.executable, socket=folder / "socket"))
    client.chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    clean["OMP_NUM_THREADS"] = "1"  # of numpy, as Snakemake has it; stages tell torch theirs
    server = subprocess.Popen(
        [sys.executable, "-P", __file__, str(folder / "socket")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=clean, cwd=folder, text=True,
        start_new_session=True,
    )  # fmt: skip
    SERVERS.append(server)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    return client


def serve(path: str) -> Request:
    """Fork for every request until whoever started this is gone; return in each fork, with its request."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        print("ready", flush=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
        while wait_for(listener, sys.stdin):
            client, _ = listener.accept()
            if not os.fork():
                listener.close()
                return attend(client)
            client.close()
    os._exit(0)


def wait_for(listener: socket.socket, owner: TextIO) -> bool:
    """Whether there is a request, rather than the owner's end."""

    ready, _, _ = select.select([listener, owner], [], [])
    return owner not in ready


def attend(client: socket.socket) -> Request:
    """Fork once more; the parent hands signals to the child and its end to the client."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, _, _ = socket.recv_fds(client, 8, 3)
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += client.recv(1 << 20)
    words, folder, variables = json.loads(request)
    child = os.fork()
    if not child:
        client.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        return words, folder, variables
    for stream in (0, 1, 2, *streams):
        os.close(stream)
    pass_on = os.fork()
    if not pass_on:
        while number := client.recv(1):
            os.kill(child, number[0])
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)  # as a stage ends with the shell that started it
        os._exit(0)
    _, status = os.waitpid(child, 0)
    with suppress(OSError):
        client.sendall(status.to_bytes(4, "big"))
    os.kill(pass_on, signal.SIGKILL)
    os._exit(0)


def become(words: list[str], folder: str, variables: dict[str, str]) -> None:
    """Run `python -m` with these words in that folder and environment, as a fresh Python would."""
    os.chdir(folder)
    seen = {name: value for name, value in os.environ.items() if name.startswith(READ_AT_IMPORT)}
    os.environ.clear()
    os.environ.update(variables)
    if seen != {
        name: value for name, value in variables.items() if name.startswith(READ_AT_IMPORT)
    }:
        os.execv(sys.executable, [sys.executable, "-m", *words])
    sys.path[:0] = [os.getcwd(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = ["-m", *words[1:]]
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    gc.disable()
    for name in IMPORTED:
        import_module(name)
    for library, names in CLASSES.items():
        for name in names:
            getattr(import_module(library), name)
    gc.freeze()
    gc.enable()
    become(*serve(sys.argv[1]))
