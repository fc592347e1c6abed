"""CPU seconds from a stage's start to its `main`: mostly imports, and a run starts dozens of stages.

Examples:
    python -m benchmarks.start_up --output benchmarks/start_up.md
    python -m benchmarks.start_up --beside ../before
    python -m benchmarks.start_up --whole-run

Measured is `python -m stages.NAME --help`, with its exit: cold, and warm (`execution.warm_start`), where
it is the client, its fork and what the server does for the two. Stages and checkouts take turns, so that
other work on the machine reaches all of them; of each the least is reported. The bare imports say how
much of it belongs to the libraries that a stage with a network cannot do without. --whole-run also runs
the smallest DAG, cold and warm, and counts all of its processes; it takes minutes.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import tyro

from stages.core.artifacts.files import write_text
from stages.core.execution.stopping import SNAKEMAKE
from stages.core.execution.warm_start import CLIENT, offer_warm_start

ROOT = Path(__file__).resolve().parents[1]
LOG = Path(".snakemake/warm_start.log")
CPU_SECONDS = re.compile("([0-9.]+) CPU seconds")
"""Where and how a warm Python says at its end what it and its forks took."""
WITHOUT_MAIN = {"__init__", "launch"}
LIBRARIES = {
    "torch": "import torch",
    "torch._dynamo (diffusers imports it)": "import torch._dynamo",
    "transformers' CLIP": "from transformers import CLIPTextModel",
    "diffusers' UNet": "from diffusers import UNet2DConditionModel",
    "the same, no garbage collected": "import gc; gc.disable(); "
    "from diffusers import UNet2DConditionModel; gc.freeze()",
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """CPU seconds from a stage's start to its `main`."""

    rounds: int = 5
    """How often each is started."""
    beside: Path | None = None
    """Another checkout, to compare with."""
    whole_run: bool = False
    """Also run the smallest DAG, cold and warm."""
    output: Path = Path("benchmarks/start_up.md")
    """Where the table goes (Markdown)."""


def main(args: Args) -> None:
    """Start every stage of this checkout, and of the other one, some rounds; write the table."""
    names = sorted({path.stem for path in (ROOT / "stages").glob("*.py")} - WITHOUT_MAIN)
    places = [ROOT] if args.beside is None else [args.beside.resolve(), ROOT]
    found: dict[tuple[str, Path], list[float]] = {}
    warm: dict[str, list[float]] = {name: [] for name in names}
    with warm_server() as server:
        for _ in range(args.rounds):
            for name in names:
                for place in (each for each in places if has(each, name)):
                    words = ("-m", f"stages.{name}", "--help")
                    found.setdefault((name, place), []).append(cpu_seconds(words, place))
                warm[name].append(server.cpu_seconds(name))
            for name, code in LIBRARIES.items():
                found.setdefault((name, ROOT), []).append(cpu_seconds(("-c", code), ROOT))
    heads = ["this commit"] if args.beside is None else ["before", "this commit"]
    heads.append("warm")
    lines = [f"| start of | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in sorted(names, key=lambda name: -min(found[name, ROOT])):
        cells = [f"{min(found[name, place]):.2f}" if has(place, name) else "-" for place in places]
        lines.append(f"| `{name}` | {' | '.join([*cells, f'{min(warm[name]):.2f}'])} |")
    bare = [f"| {name} | {min(found[name, ROOT]):.2f} |" for name in LIBRARIES]
    text = [
        "# Starting a stage", "",
        f"CPU seconds (user and system), the least of {args.rounds}; made by `python -m "
        f"benchmarks.start_up` on {os.cpu_count()} shared {platform.machine()} cores.", "",
        *lines, "", f"The warm Python itself starts once a call, in {server.seconds:.2f} CPU seconds.", "",
        "| bare import | CPU seconds |", "|---|---|", *bare, "",
    ]  # fmt: skip
    if args.whole_run:
        text += [*whole_runs(), ""]
    write_text(args.output, "\n".join(text))
    print(args.output.read_text())


def has(place: Path, name: str) -> bool:
    """Whether a checkout has a stage of this name."""
    return (place / "stages" / f"{name}.py").is_file()


class WarmServer:
    """A warm Python of this process, and what starts in it."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.cpu_seconds("train_seed")  # it starts for the first stage
        [self.process] = [p for p in psutil.Process().children() if "warm start" in title(p)]
        self.seconds = self._seconds() - self._seconds_of_forks()

    def cpu_seconds(self, name: str) -> float:
        """What a stage's start takes to its end: of its client, its fork and the server."""
        before = self._seconds() if hasattr(self, "process") else 0.0
        words = ("-ISE", str(CLIENT), str(self.socket), f"stages.{name}", "--help")
        client = cpu_seconds(words, ROOT, {**os.environ, "PYTHONPATH": str(ROOT)})
        return client + (self._seconds() - before if hasattr(self, "process") else 0.0)

    def _seconds(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system + self._seconds_of_forks()

    def _seconds_of_forks(self) -> float:
        times = self.process.cpu_times()
        return times.children_user + times.children_system


@contextmanager
def warm_server() -> Iterator[WarmServer]:
    """Within the block this process offers warm starts, as Snakemake does."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[SNAKEMAKE] = str(os.getpid())
        socket = offer_warm_start(ROOT, Path(folder) / "log")
        if socket is None:
            raise RuntimeError("this system starts nothing warm: Linux 5.3 or later is wanted")
        yield WarmServer(socket)


def title(process: psutil.Process) -> str:
    """A process's command line."""
    return " ".join(process.cmdline())


def whole_runs() -> Iterator[str]:
    """A table of the smallest DAG: CPU seconds of all processes, and wall seconds, cold and warm."""
    yield from ("| the smallest DAG | CPU seconds | seconds |", "|---|---|---|")
    for is_warm in (False, True):
        with tempfile.TemporaryDirectory() as name:
            cpu, seconds = run_smallest(Path(name), is_warm)
        yield f"| {'warm' if is_warm else 'cold'} | {cpu:.0f} | {seconds:.0f} |"


def run_smallest(folder: Path, is_warm: bool) -> tuple[float, float]:
    """CPU seconds of all processes of the smallest DAG, and wall seconds."""
    overlay = folder / "overlay.json"
    model = {"base": str(ROOT / "stages/shapes/pipeline")}
    write_text(overlay, json.dumps({"model": model, "execution": {"warm_start": is_warm}}))
    configs = (ROOT / "config/config.yaml", ROOT / "tests/workflow/smallest.yaml", overlay)
    words = (
        *("-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "2"),
        *("--quiet", "all", "--configfile", *map(str, configs)),
    )
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    began = time.monotonic()
    cpu = cpu_seconds(words, folder, {**os.environ, "PATH": places})
    seconds = time.monotonic() - began
    while is_warm and not (told := CPU_SECONDS.findall((folder / LOG).read_text())):
        time.sleep(0.1)  # the server ends after Snakemake, which does not wait for it
    return cpu + (sum(map(float, told)) if is_warm else 0.0), seconds


def cpu_seconds(
    words: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None
) -> float:
    """What a Python that is started in a folder takes to its end. RuntimeError if it fails."""
    child = subprocess.Popen(
        [sys.executable, *words], cwd=folder, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    _pid, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"python {' '.join(words)} ended with {child.returncode}")
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
