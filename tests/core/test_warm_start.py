"""A stage that starts warm is a stage that starts cold, seconds earlier, whoever is killed."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from stages.core.execution import warm_client, warm_server
from stages.core.execution.stopping import EXIT_CODE
from stages.core.health.jobs import command_line, stage_name

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every stage starts cold")

HEAD = """
import subprocess, sys
from pathlib import Path
from stages.core.execution.warm_start import offer_warm_start
print(offer_warm_start(Path(sys.argv[1]), Path("server.log")), flush=True)
for line in sys.stdin:
    print(subprocess.run(["bash", "-c", line]).returncode, flush=True)
"""
"""Stands for Snakemake: offers warm starts, and runs a rule's shell for each line."""

STAGE = """
import json, os, resource, signal, sys, threading, time
from pathlib import Path

was_warm = "diffusers" in sys.modules
from stages.core.execution.runtime import run_stage


def facts():
    import numpy, pyarrow, torch
    return {
        "argv": sys.argv, "words": sys.orig_argv[1:], "name": __name__, "spec": __spec__.name, "file": __file__,
        "path": sys.path, "flags": list(map(str, sys.flags)), "executable": sys.executable,
        "folder": os.getcwd(), "variables": {k: v for k, v in os.environ.items() if not k.startswith("SAIL_WARM")},
        "torch": torch.get_num_threads(), "interop": torch.get_num_interop_threads(),
        "arrow": pyarrow.cpu_count(), "io": pyarrow.io_thread_count(),
        "mkl": [line for line in torch.__config__.parallel_info().splitlines() if "get_max" in line],
        "threads": threading.active_count(), "files": sorted(os.listdir("/proc/self/fd")),
        "signals": {s.name: str(signal.getsignal(s)).split(" at ")[0] for s in signal.Signals},
        "blocked": [int(s) for s in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        "group": os.getpgid(0), "session": os.getsid(0), "cores": sorted(os.sched_getaffinity(0)),
        "limits": [resource.getrlimit(n) for n in range(16)],
        "encodings": [f.encoding + f.errors + str(f.line_buffering) for f in (sys.stdin, sys.stdout, sys.stderr)],
    }


def main(what):
    print("CODE", "warm" if was_warm else "cold", flush=True)
    if what == "facts":
        print(json.dumps(facts()))
    elif what == "exit":
        raise SystemExit(7)
    elif what == "error":
        raise RuntimeError("of the stage")
    elif what == "draw":
        import numpy, random, torch
        print(numpy.random.rand(), random.random(), torch.rand(()).item())
    elif what == "echo":
        print(sys.stdin.readline().strip(), sys.argv[2:], file=sys.stderr)
    elif what == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif what == "work":
        time.sleep(60)


if __name__ == "__main__":
    run_stage(main, sys.argv[1])
"""


class Head:
    """A process that stands for Snakemake, in a session of its own."""

    def __init__(self, folder: Path) -> None:
        self.home, self.folder = folder / "code of ours", folder / "run"
        core = self.home / "stages" / "core"
        self.folder.mkdir()
        for name in ("__init__.py", "core/__init__.py", "core/errors.py", "core/execution"):
            source, place = ROOT / "stages" / name, self.home / "stages" / name
            if source.is_dir():
                shutil.copytree(source, place)
            elif source.is_file():
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, place)
        assert (core / "errors.py").is_file()
        (self.home / "workflow").symlink_to(ROOT / "workflow")
        for name in ("train_seed", "select_pairs"):
            self.edit(name, "first")
        places = [str(Path(sys.executable).parent), os.environ["PATH"]]
        clean = {k: v for k, v in os.environ.items() if not k.startswith("SAIL_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", HEAD, str(self.home)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=self.folder,
            env={**clean, "PATH": os.pathsep.join(places), "PYTHONPATH": str(self.home)},
            start_new_session=True, preexec_fn=heed_ctrl_c,
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.socket = Path(self.process.stdout.readline().strip())

    def edit(self, name: str, word: str) -> None:
        """Write a stage that says this word."""
        (self.home / "stages" / f"{name}.py").write_text(STAGE.replace("CODE", word))

    def start(self, command: str, before: str = "") -> None:
        """A rule's shell, with Snakemake's variables of a job of two threads."""
        threads = " ".join(f"{name}=2" for name in warm_server.THREADS)
        line = (
            f'export {threads} PYTHONPATH="{self.home}" SAIL_PYTHON=/nowhere; {before} '
            f'. "$PYTHONPATH/workflow/prelude.sh" || exit 1; {command} >out 2>err'
        )
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def status(self) -> int:
        """Of the shell that was started last."""
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def run(self, command: str, before: str = "") -> int:
        """Start a shell, and wait for it."""
        self.start(command, before)
        return self.status()

    def read(self, name: str = "out") -> str:
        """What it has printed."""
        return (self.folder / name).read_text()

    def stage(self) -> psutil.Process:
        """The stage at work, once it is."""
        until(lambda: (self.folder / "out").is_file() and "first" in self.read())
        [found] = [p for p in self.processes() if stage_name(command_line(p))]
        return found

    def client(self) -> psutil.Process:
        """The process in the stage's place."""
        [found] = [p for p in self.processes() if any("warm_client" in w for w in command_line(p))]
        return found

    def server(self) -> psutil.Process:
        """The warm Python."""
        [found] = [
            p
            for p in self.processes()
            if any("warm start" in w for w in (" ".join(command_line(p)),))
        ]
        return found

    def processes(self) -> list[psutil.Process]:
        """All in its folder."""
        return [p for p in psutil.process_iter() if folder_of(p) == str(self.folder.resolve())]

    def work(self, command: str = "python -m stages.train_seed work") -> psutil.Process:
        """A stage at work."""
        (self.folder / "out").unlink(missing_ok=True)
        self.start(command)
        return self.stage()

    def end(self) -> None:
        """As a Snakemake ends; nothing is left of it."""
        self.process.communicate(timeout=30)
        until(lambda: not self.processes())
        assert not self.socket.parent.exists()


def heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def folder_of(process: psutil.Process) -> str:
    try:
        return process.cwd()
    except psutil.Error:
        return ""


def until(is_so: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """One whose server is warm."""
    head = Head(tmp_path_factory.mktemp("a folder with a long name " + "x" * 150))
    try:
        assert head.run("python -m stages.train_seed facts") == 0, head.read("err")
        assert head.read().startswith("first warm\n"), head.read("server.log")
        yield head
    finally:
        head.end()


@pytest.fixture
def own_head(tmp_path: Path) -> Iterator[Head]:
    """One that a test may kill in."""
    head = Head(tmp_path)
    yield head
    for process in head.processes():
        process.kill()
    with head.process:
        pass


COLD = "SAIL_WARM_HEAD=0;"


def test_a_warm_stage_finds_what_a_cold_one_does(head: Head) -> None:
    found = []
    for before in ("", COLD):
        assert head.run("python -m stages.train_seed facts 'two words'", before) == 0
        first, second = head.read().splitlines()
        found.append({"start": first, **json.loads(second)})
    warm, cold = found
    assert (warm.pop("start"), cold.pop("start")) == ("first warm", "first cold")
    for facts in found:
        facts["variables"].pop("_")
    assert warm.keys() == cold.keys()
    assert {k: (warm[k], cold[k]) for k in warm if warm[k] != cold[k]} == {}
    assert warm["torch"] == 2


@pytest.mark.slow
def test_blas_has_the_threads_of_the_job(head: Head) -> None:
    """numpy's and scipy's own, as each has them."""
    code = (
        "import ctypes, numpy, scipy.linalg, re; from pathlib import Path; "
        "paths = sorted({l.split()[-1] for l in Path('/proc/self/maps').read_text().splitlines() if 'libscipy_openblas' in l}); "
        "print([getattr(ctypes.CDLL(p), 'scipy_openblas_get_num_threads' + ('64_' if 'openblas64_' in p else ''))() for p in paths])"
    )
    (head.home / "stages" / "score_holdout.py").write_text(code)
    printed = []
    for before in ("", COLD, "export OPENBLAS_NUM_THREADS=1;"):
        assert head.run("python -m stages.score_holdout", before) == 0, head.read("err")
        printed.append(json.loads(head.read()))
    assert printed[0] == printed[1] == [min(2, os.cpu_count() or 1)] * 2
    assert printed[2] == [1, 1]


def test_streams_flags_and_exit_codes_are_the_stage_s(head: Head) -> None:
    assert head.run("echo hello | python -m stages.train_seed echo 'a b' ''") == 0
    assert head.read("err").splitlines()[-1] == "hello ['a b', '']"
    assert head.run("python -m stages.train_seed exit") == 7
    assert head.run("python -m stages.train_seed error") == 1
    assert head.read("err").splitlines()[-1] == "RuntimeError: of the stage"
    assert head.run("python -m stages.train_seed die") == 128 + signal.SIGSEGV
    assert head.run("python -m stages.no_such_stage") == 1
    assert head.run("python -m stages.train_seed exit 2>&1 | record log") == 7
    assert "python -m stages.train_seed exit" in head.read("log")


def test_the_next_stage_sees_an_edit(head: Head) -> None:
    head.edit("select_pairs", "second")
    assert head.run("python -m stages.select_pairs facts") == 0
    assert head.read().startswith("second warm\n")
    head.edit("select_pairs", "third")
    assert head.run("python -m stages.select_pairs facts") == 0
    assert head.read().startswith("third warm\n")


def test_two_stages_draw_other_numbers(head: Head) -> None:
    draws = set()
    for _ in range(2):
        assert head.run("python -m stages.train_seed draw") == 0
        draws |= set(head.read().split()[2:])
    assert len(draws) == 6


@pytest.mark.parametrize(
    "before",
    [
        "export HF_HOME=/elsewhere;",
        "ulimit -n 500;",
        "umask 077;",
        "export OMP_NUM_THREADS=2,1;",
        "export SAIL_WARM_SOCKET=/nowhere/socket;",
        'PATH="$PWD/other:$PATH";',
        "trap '' USR2;",  # not HUP, which nohup has had ignored everywhere
    ],
)
def test_whatever_is_unusual_starts_cold(head: Head, before: str) -> None:
    other = head.folder / "other" / "python"
    other.parent.mkdir(exist_ok=True)
    other.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    other.chmod(0o755)
    assert head.run("python -m stages.train_seed exit", before) == 7, head.read("err")
    assert head.read() == "first cold\n"


def test_in_another_folder_a_stage_starts_cold(head: Head) -> None:
    assert head.run("(cd /; python -m stages.train_seed exit)") == 7
    assert head.read() == "first cold\n"


def test_other_commands_are_the_real_python_s(head: Head) -> None:
    assert head.run("python -c 'import sys; print(sys.argv, \"torch\" in sys.modules)' a") == 0
    assert head.read() == "['-c', 'a'] False\n"


def test_nobody_else_can_reach_the_socket_and_a_wrong_word_is_refused(head: Head) -> None:
    assert head.socket.parent.stat().st_mode & 0o777 == 0o700
    assert head.socket.parent.parent.stat().st_mode & 0o777 == 0o700
    assert len(str(head.socket)) < 107
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(str(head.socket))
        socket.send_fds(server, [(4).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(b"none")
        assert server.recv(1) == warm_client.REFUSED
    assert head.run("python -m stages.train_seed exit") == 7
    assert head.read() == "first warm\n"


def test_sigterm_and_ctrl_c_reach_a_warm_stage_once(head: Head) -> None:
    head.work()
    head.client().send_signal(signal.SIGTERM)
    assert head.status() == EXIT_CODE
    assert head.read("err").splitlines()[-1].startswith("stopped by SIGTERM: nothing half-written")
    head.work().send_signal(signal.SIGTERM)
    assert head.status() == EXIT_CODE
    for number, code, said in (
        (signal.SIGINT, 130, "stopped: what is done is kept; the same command continues"),
        (signal.SIGTERM, EXIT_CODE, "stopped by SIGTERM: nothing half-written"),
    ):
        head.work()
        for process in head.processes():  # as a terminal and scancel do, but for the head
            if process.pid != head.process.pid and process.name() != "bash":
                process.send_signal(number)
        assert head.status() == code
        assert head.read("err").splitlines()[-1].startswith(said)
        assert "Traceback" not in head.read("err")


def test_a_killed_client_takes_its_stage_along_and_a_killed_stage_its_client(head: Head) -> None:
    stage = head.work()
    head.client().kill()
    assert head.status() == 128 + signal.SIGKILL
    until(lambda: not stage.is_running())
    stage = head.work()
    stage.kill()
    assert head.status() == 128 + signal.SIGKILL
    assert head.run("python -m stages.train_seed exit") == 7
    assert head.read() == "first warm\n"


def test_a_stage_ends_with_its_shell(head: Head) -> None:
    stage = head.work()
    shell = head.client().parent()
    assert shell is not None
    shell.kill()
    assert head.status() == -signal.SIGKILL
    until(lambda: not stage.is_running())
    assert "stopped by SIGTERM" in head.read("err")


def test_a_stage_shows_its_command_line_and_snakemake_among_its_parents(head: Head) -> None:
    stage = head.work("python -m stages.train_seed work --flag 'two words'")
    assert command_line(stage)[:3] == ["python", "-m", "stages.train_seed"]
    assert head.process.pid in [parent.pid for parent in stage.parents()]
    stage.kill()
    assert head.status() == 128 + signal.SIGKILL


def test_before_anything_is_imported_a_small_stage_does_not_wait(own_head: Head) -> None:
    assert own_head.run("python -m stages.select_pairs exit") == 7
    assert own_head.read() == "first cold\n"
    assert not [p for p in own_head.processes() if p.pid != own_head.process.pid]
    own_head.end()


@pytest.mark.slow
def test_after_the_server_s_death_stages_die_and_the_next_starts_cold(own_head: Head) -> None:
    stage = own_head.work()
    own_head.server().kill()
    assert own_head.status() == 128 + signal.SIGKILL
    until(lambda: not stage.is_running())
    assert own_head.run("python -m stages.train_seed exit") == 7
    assert own_head.read() == "first cold\n"
    own_head.end()


@pytest.mark.slow
def test_a_killed_snakemake_takes_everything_along(own_head: Head) -> None:
    own_head.work("python -m stages.train_seed work 2>&1 | record log")
    own_head.process.kill()
    own_head.process.wait()
    until(lambda: not own_head.processes())
    assert "stopped by SIGTERM" in own_head.read("log")
    assert not own_head.socket.parent.exists()


def test_a_server_that_cannot_import_leaves_cold_starts(own_head: Head) -> None:
    own_head.start("python -m stages.train_seed exit")
    servers: list[psutil.Process] = []  # noted at once: its title is another soon

    def is_there() -> bool:
        named = [(p, " ".join(command_line(p))) for p in own_head.processes()]
        servers.extend(p for p, line in named if "warm_server" in line)
        return bool(servers)

    until(is_there)
    [server] = servers
    server.kill()  # before it has taken anybody
    assert own_head.status() == 7
    assert own_head.read() == "first cold\n"
    own_head.end()


def test_client_and_server_agree_and_import_nothing_of_ours() -> None:
    for name in ("TAKEN", "REFUSED", "END", "READY"):
        assert getattr(warm_client, name) == getattr(warm_server, name)
    for module in (warm_client, warm_server):
        tree = ast.parse(Path(str(module.__file__)).read_text())
        names = [
            name
            for node in ast.walk(tree)
            for name in (
                [alias.name for alias in node.names] if isinstance(node, ast.Import)
                else [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            )
        ]  # fmt: skip
        assert not [name for name in names if name.startswith("stages")]


def test_the_stages_that_wait_are_those_that_import_diffusers() -> None:
    rules = "".join(path.read_text() for path in (ROOT / "workflow" / "rules").glob("*.smk"))
    called = set(re.findall(r'(?:stage\(\s*"|launch \{resources.gpu\} stages\.)([a-z_.]+)', rules))
    assert len(called) > 20
    waiting = {name for name in called if "diffusers" in imported(f"stages.{name}", set())}
    assert waiting == set(warm_client.LOADS_A_MODEL)


def imported(module: str, seen: set[str]) -> set[str]:
    """The libraries that a module of ours imports as soon as it is imported."""
    base = ROOT.joinpath(*module.split("."))
    path = next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)
    if path is None or module in seen:
        return set()
    seen.add(module)
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            is_ours = name.startswith("stages")
            found |= imported(name, seen) if is_ours else {name.split(".")[0]}
    return found
