"""Many jobs lease few pretend devices while some are killed; says whether a device had too many holders.

Example:
    python -m benchmarks.device_stress --jobs 200 --devices 8 --jobs-per-device 3
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[1]

JOB = """
import json, os, sys, time
from pathlib import Path
from stages.core.execution.devices import lease
folder, log, count, devices, seconds, sharing = sys.argv[1:]
mine = lease([str(i) for i in range(int(devices))], Path(folder), num_devices=int(count),
             jobs_per_device=int(sharing), poll_seconds=0.01)
def note(event):
    line = json.dumps({"time": time.monotonic(), "event": event, "pid": os.getpid(), "mine": mine,
                       "is_shared": int(sharing) > 1})
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, (line + "\\n").encode())
    os.close(file)
note("enter")
time.sleep(float(seconds))
note("leave")
"""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Many jobs lease few pretend devices while some are killed."""

    jobs: int = 200
    """Processes, each of which wants 1, 2 or 4 devices."""
    devices: int = 8
    """Pretend devices."""
    kill_share: float = 0.15
    """Share of the jobs to kill: half of them at a random moment, half while they hold devices."""
    jobs_per_device: int = 1
    """Jobs that may share a device; above 1, half of those that want one device share."""
    longest_seconds: float = 0.4
    """The longest a job holds its devices; longer ones meet more others."""
    seed: int = 0
    """Decides what each job wants, how long it works and who is killed."""


@dataclass(frozen=True)
class Result:
    """What happened to the jobs."""

    finished: int
    killed: int
    killed_holding: int
    """Killed while they held devices."""
    overlaps: int
    """Jobs that came to a device which another had alone, or where as many shared as may."""
    most_shared: int
    """The most jobs that shared a device at one time."""
    lost: int
    """Jobs that neither finished nor were killed."""
    seconds: float


def main(args: Args) -> None:
    """Run the jobs and print what happened."""
    with tempfile.TemporaryDirectory() as folder:
        found = stress(
            Path(folder), args.jobs, args.devices, args.kill_share, args.seed,
            jobs_per_device=args.jobs_per_device, longest_seconds=args.longest_seconds,
        )  # fmt: skip
    shared = f", up to {args.jobs_per_device} sharing" if args.jobs_per_device > 1 else ""
    print(f"{args.jobs} jobs of 1, 2 and 4 devices on {args.devices}{shared}: {found}")
    raise SystemExit(found.overlaps > 0 or found.lost > 0)


@dataclass(frozen=True)
class Span:
    """A job's time on a device."""

    device: int
    start: float
    end: float
    is_shared: bool


def stress(
    folder: Path,
    jobs: int,
    devices: int,
    kill_share: float,
    seed: int,
    *,
    jobs_per_device: int = 1,
    longest_seconds: float = 0.4,
) -> Result:
    """Start all jobs, kill some, wait for the rest, and compare who held what when."""
    rng = random.Random(seed)
    log = folder / "log"
    log.touch()
    started = time.monotonic()
    processes: list[subprocess.Popen[bytes]] = []
    due: list[
        tuple[float | None, subprocess.Popen[bytes]]
    ] = []  # None: as soon as it holds devices
    ends: dict[int, float] = {}

    def wait_and_kill(seconds: float) -> None:
        time.sleep(seconds)
        whole, _, _ = log.read_text().rpartition("\n")  # a last line may be half written
        holding = {json.loads(line)["pid"] for line in whole.splitlines()}
        for at, process in due[:]:
            if process.pid in holding if at is None else at <= time.monotonic():
                due.remove((at, process))
                if process.poll() is None:
                    ends[process.pid] = time.monotonic()  # another may have it before we know more
                    process.kill()
                    process.wait()

    for _ in range(jobs):
        is_victim, dies_holding = rng.random() < kill_share, rng.random() < 0.5
        wanted, seconds = rng.choice((1, 1, 1, 2, 4)), rng.uniform(0.02, longest_seconds)
        if is_victim and dies_holding:
            seconds = 60.0  # it holds its devices until it is killed
        shares = jobs_per_device > 1 and wanted == 1 and rng.random() < 0.5
        sharing = jobs_per_device if shares else 1
        words = (folder / "locks", log, wanted, devices, seconds, sharing)
        job = subprocess.Popen([sys.executable, "-c", JOB, *map(str, words)], cwd=ROOT)
        processes.append(job)
        if is_victim:
            due.append((None if dies_holding else time.monotonic() + rng.uniform(0.05, 2.0), job))
        wait_and_kill(0.02)  # so that jobs run while others start
    while any(process.poll() is None for process in processes):
        wait_and_kill(0.02)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    left = {row["pid"]: row["time"] for row in rows if row["event"] == "leave"}
    entered = [row for row in rows if row["event"] == "enter"]
    spans = [
        Span(device, row["time"], (ends | left)[row["pid"]], row["is_shared"])
        for row in entered
        for device in row["mine"]
    ]
    return Result(
        finished=len(left),
        killed=len(ends.keys() - left.keys()),
        killed_holding=len({row["pid"] for row in entered} - left.keys()),
        overlaps=count_overlaps(spans, jobs_per_device),
        most_shared=max(
            (len(there) + 1 for span, there in company(spans) if span.is_shared), default=0
        ),
        lost=sum(p.returncode != 0 and p.pid not in ends for p in processes),
        seconds=round(time.monotonic() - started, 1),
    )


def count_overlaps(spans: list[Span], jobs_per_device: int) -> int:
    """Arrivals at a device that another has alone, that is wanted alone, or that is full."""
    return sum(
        bool(there)
        and (
            not span.is_shared
            or not all(other.is_shared for other in there)
            or len(there) >= jobs_per_device
        )
        for span, there in company(spans)
    )


def company(spans: list[Span]) -> Iterator[tuple[Span, list[Span]]]:
    """Each job's arrival at a device, with those that are there already."""
    for span in spans:
        yield (
            span,
            [
                other
                for other in spans
                if other is not span
                and other.device == span.device
                and other.start <= span.start < other.end
            ],
        )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
