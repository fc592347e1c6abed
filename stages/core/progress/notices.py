"""Who is told that a run has ended: a command of the config, with a small JSON object on its input."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Literal

from stages.core.execution.runtime import in_time
from stages.core.progress.journal import Call

Event = Literal["finished", "failed", "interrupted", "stopped"]
TIMEOUT_SECONDS = 60.0
"""A command that takes longer is ended."""


@dataclass(frozen=True, kw_only=True)
class Notice:
    """What the command is told."""

    event: Event
    """'stopped' is by a gate of the guards; 'interrupted' by Ctrl-C or SIGTERM."""
    run: str
    message: str
    """One sentence for a person."""
    host: str
    folder: str
    """Where snakemake runs."""
    results: str
    """The run's results, in that folder."""
    seconds: float
    """Since this call began."""
    jobs_done: int
    jobs_planned: int
    failed: Sequence[Mapping[str, str]]
    """Rule and log file of each failed job."""
    reason: str
    """What the guards found that ended the run early; empty otherwise."""


def notice(event: Event, call: Call, *, run: str, folder: Path, reason: str = "") -> Notice:
    """The notice of a call that has just ended."""
    failed = [
        {"rule": call.jobs[number].rule, "log": call.jobs[number].log}
        for number in sorted(call.failed & call.jobs.keys())
    ]
    done, planned, seconds = len(call.seconds), len(call.jobs), time.time() - call.begun
    jobs = f"{done} of {planned} jobs done after {in_time(seconds)}"
    sentences = {
        "finished": f"SAIL run {run!r} has finished: {jobs}."
        f"{' Its guards ended it early: ' + reason if reason else ''}",
        "failed": f"SAIL run {run!r} has failed: {jobs}"
        f"{'; failed: ' + ', '.join(job['rule'] for job in failed) if failed else ''}.",
        "interrupted": f"SAIL run {run!r} was interrupted: {jobs}.",
        "stopped": f"SAIL run {run!r} was stopped by its guards: {reason}",
    }
    return Notice(
        event=event, run=run, message=sentences[event], host=platform.node(), folder=str(folder),
        results=f"results/{run}", seconds=round(seconds, 1), jobs_done=done, jobs_planned=planned,
        failed=failed, reason=reason,
    )  # fmt: skip


def notify(
    command: str, told: Notice, folder: Path, timeout: float = TIMEOUT_SECONDS
) -> str | None:
    """Give a notice to a shell command as JSON on its input; None, or why that went wrong in words."""
    with TemporaryFile("w+") as facts, TemporaryFile("w+", errors="replace") as said:
        json.dump(asdict(told), facts)
        facts.write("\n")
        facts.seek(0)
        try:
            # In a session of its own, so that all that it started can be ended with it.
            process = subprocess.Popen(
                command, shell=True, cwd=folder, stdin=facts, stdout=said, stderr=said,
                start_new_session=True,
            )  # fmt: skip
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"it took longer than {timeout:.0f} s and was ended"
        except OSError as error:
            return str(error)
        said.seek(0)
        lines = said.read().strip().splitlines()
    if status:
        return f"it ended with exit code {status}{': ' + lines[-1] if lines else ''}"
    return None
