"""The journal of a run's jobs: what each call planned, and when each job began and ended.

Snakemake tells its log of every job, whatever runs it: this machine, Slurm, Kubernetes. The journal is
a handler of that log. It appends one JSON object a line, so that a killed run leaves at most half a
line behind.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import SEEK_END
from pathlib import Path
from typing import IO, Any

from stages.core.errors import UserError
from stages.core.execution.calm_stop import OURS, STOPPING

NAME = "jobs.jsonl"
"""Of the journal, in logs/<run>/."""
FIRST_WORDS = '{"event": "call"'
"""How the line begins that a call writes first."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job of a call's plan."""

    number: int
    """Snakemake's, in this call."""
    rule: str
    needs: tuple[int, ...]
    """Numbers of the jobs of this call that it waits for."""
    threads: int
    gpus: int | float
    """GPUs that it asks for; a share of one where small jobs share."""
    is_local: bool = True
    """Whether it runs beside Snakemake, rather than at a scheduler."""
    log: str = ""
    """Its log file."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much of a call's jobs may run at once; None is no limit."""

    cores: int | None
    gpus: int | float | None
    jobs: int | None
    """At a scheduler."""


@dataclass(kw_only=True)
class Call:
    """One call of Snakemake, as far as its journal goes."""

    begun: int | float
    """Seconds since 1970."""
    jobs: Mapping[int, Job]
    limits: Limits
    started: dict[int, float] = field(default_factory=dict)
    """When each job began, or was handed to the scheduler."""
    seconds: dict[int, float] = field(default_factory=dict)
    """How long each finished job took; of a group of jobs an equal share each."""
    failed: set[int] = field(default_factory=set)
    """Jobs that failed and were not started again."""
    ended: float | None = None
    """None while it lasts, or if it was killed."""
    outcome: str = ""
    """'finished', 'failed', 'interrupted' or 'stopped' once it has ended."""
    group_sizes: dict[int, int] = field(default_factory=dict)
    """How many jobs were submitted as one, of those that were."""

    @property
    def running(self) -> list[int]:
        """Jobs that have begun and not ended, the oldest first."""
        at_work = self.started.keys() - self.seconds.keys() - self.failed
        return sorted(at_work, key=lambda number: self.started[number])

    def take(self, entry: Mapping[str, Any]) -> None:
        """Note what a line of the journal says."""
        number = entry.get("job")
        if entry["event"] == "started":
            self.started[entry["job"]] = entry["time"]
            self.failed.discard(entry["job"])
            self.group_sizes[entry["job"]] = entry["group_size"]
        elif entry["event"] == "finished" and number in self.started:
            taken = entry["time"] - self.started[number]
            self.seconds[number] = taken / self.group_sizes.get(number, 1)
        elif entry["event"] == "failed":
            self.failed.add(entry["job"])
        elif entry["event"] == "ended":
            self.ended, self.outcome = entry["time"], entry["outcome"]


class Journal(logging.Handler):
    """Writes what Snakemake's log says of jobs; a disk that refuses it is no failure of the run."""

    def __init__(
        self,
        path: Path,
        jobs: Iterable[Job],
        limits: Limits,
        tell: Callable[[Call], None] = lambda call: None,
    ) -> None:
        super().__init__()
        self.path, self.tell = path, tell
        self.is_interrupted = False
        self._group: dict[int, int] = {}
        planned = list(jobs)
        begun = time.time()
        self.call = Call(begun=begun, jobs={job.number: job for job in planned}, limits=limits)
        self._write(
            {"event": "call", "time": begun, "limits": asdict(limits), "jobs": list(map(asdict, planned))}
        )  # fmt: skip

    def emit(self, record: logging.LogRecord) -> None:
        """Note the event of a record, where it is one of a job."""
        event = str(getattr(record, "event", None))
        try:
            if event == "group_info":
                members = [job.jobid for job in vars(record)["jobs"]]
                self._group |= dict.fromkeys(members, len(members))
            elif event == "job_info":
                number = vars(record)["jobid"]
                self.note("started", job=number, group_size=self._group.get(number, 1))
            elif event == "job_finished":
                self.note("finished", job=vars(record)["job_id"])
                self.tell(self.call)
            elif event == "job_error":
                self.note("failed", job=vars(record)["jobid"])
            elif str(record.msg).startswith((STOPPING, OURS)):
                self.is_interrupted = True
        except Exception:
            self.handleError(record)

    def end(self, outcome: str) -> None:
        """Note that the call has ended."""
        self.note("ended", outcome=outcome)

    def note(self, event: str, **facts: Any) -> None:
        """Take an event into the call, and append it to the file."""
        entry = {"event": event, "time": time.time(), **facts}
        self.call.take(entry)
        self._write(entry)

    def _write(self, entry: Mapping[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                if entry["event"] == "call" and file.tell() and not _ends_a_line(file):
                    file.write(b"\n")  # after what a killed call left
                file.write(json.dumps(entry).encode() + b"\n")
        except OSError:
            pass


def read_calls(path: Path) -> list[Call]:
    """The calls of a journal, the oldest first. UserError if there is none, or for a damaged line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Snakemake writes it as soon as the run begins: look whether "
            "the run has another name, or call from the folder in which snakemake runs"
        ) from error
    calls: list[Call] = []
    for number, entry in _entries(path, lines):
        try:
            if entry["event"] == "call":
                calls.append(_call(entry))
            elif calls:
                calls[-1].take(entry)
        except (KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, number, repr(error)) from error
    if not calls:
        raise UserError(
            f"{path} has no call of snakemake; delete it, and the next call begins anew"
        )
    return calls


def _entries(path: Path, lines: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line's number, from 1, and what it says; half a line that a killed call left is passed over."""
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(lines) or lines[number].startswith(FIRST_WORDS):
                continue
            raise _damaged(path, number, str(error)) from error
        if not isinstance(entry, dict):
            raise _damaged(path, number, f"it is {type(entry).__name__}, expected an object")
        yield number, entry


def _ends_a_line(file: IO[bytes]) -> bool:
    file.seek(-1, SEEK_END)
    return file.read(1) == b"\n"


def _call(entry: Mapping[str, Any]) -> Call:
    jobs = [Job(**{**job, "needs": tuple(job["needs"])}) for job in entry["jobs"]]
    return Call(
        begun=entry["time"],
        jobs={job.number: job for job in jobs},
        limits=Limits(**entry["limits"]),
    )


def _damaged(path: Path, number: int, why: str) -> UserError:
    return UserError(
        f"{path}, line {number} is damaged ({why}). Delete the file: only the timings in it are lost, and "
        "the next call of snakemake writes it anew"
    )
