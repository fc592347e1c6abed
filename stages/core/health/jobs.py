"""Which stages run, who started them, and which locks are held."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import psutil

from stages.core.execution.locks import try_lock
from stages.core.execution.snakemake_lock import has_run_here_only
from stages.core.execution.stopping import SNAKEMAKE
from stages.core.health.findings import Finding


def stage_processes() -> Iterator[psutil.Process]:
    """Running processes of stages, the doctor's own apart."""
    for process in psutil.process_iter():
        name = stage_name(command_line(process))
        if name and name != "doctor":
            yield process


def stage_name(words: list[str]) -> str | None:
    """The stage that a command line runs: of `python -m stages.train_seed ...` it is train_seed."""
    for flag, module in pairwise(words):
        if flag == "-m" and module.startswith("stages."):
            launched = [word for word in words if word.startswith("stages.")]
            return launched[-1 if module == "stages.launch" else 0].removeprefix("stages.")
    return None


def check_stages(folder: Path) -> Iterator[Finding]:
    """Stages at work in a folder, and those whose Snakemake is gone."""
    for process in stage_processes():
        try:
            if Path(process.cwd()) != folder.resolve():
                continue
            has_snakemake = any(_is_snakemake(parent) for parent in process.parents())
            minutes = (time.time() - process.create_time()) / 60
            was_snakemakes = SNAKEMAKE in process.environ()
        except psutil.Error:
            continue  # it has just ended
        what = (
            f"process {process.pid} runs {stage_name(command_line(process))} for {minutes:.0f} min"
        )
        if has_snakemake:
            yield Finding(level="ok", what=what)
        elif not was_snakemakes:
            yield Finding(level="ok", what=f"{what}, started by a person and by no snakemake")
        else:
            yield Finding(
                level="note",
                what=f"{what}, left behind by a snakemake that was killed",
                remedy=f"kill {process.pid}",
            )


def check_snakemake_lock(folder: Path) -> Iterator[Finding]:
    """Snakemake's lock on a folder that no Snakemake is at work in."""
    locks = [path for path in (folder / ".snakemake" / "locks").glob("*") if path.is_file()]
    if not locks:
        return
    at_work = [p.pid for p in psutil.process_iter() if _is_snakemake(p) and _is_in(p, folder)]
    if at_work:
        yield Finding(level="ok", what=f"snakemake is at work here (process {at_work[0]})")
    elif has_run_here_only(folder):
        yield Finding(
            level="note",
            what=f"{folder.resolve()} is locked by a snakemake that was killed; the next one goes on",
            remedy="snakemake --cores all",
        )
    else:
        yield Finding(
            level="problem",
            what=f"{folder.resolve()} is locked by a snakemake that is gone; the next one would refuse to start",
            remedy="snakemake --unlock",
        )


def check_locks(paths: Iterable[Path], what: str) -> Iterator[Finding]:
    """Which process holds which of our locks; a lock that nobody holds is left out."""
    for path in sorted(paths):
        holder = path.read_text().strip()
        # Of a shared device only its slots say which processes hold it.
        file = try_lock(path, leave_name=True, shared=True)
        if file is not None:
            file.close()
            continue
        command = "a process that has ended"
        if holder.isdecimal() and psutil.pid_exists(int(holder)):
            words = command_line(psutil.Process(int(holder)))
            command = stage_name(words) or " ".join(words[:3])
        yield Finding(
            level="ok", what=f"{what} {path.stem} is held by process {holder} ({command})"
        )


def command_line(process: psutil.Process) -> list[str]:
    """A process's words; none if it is another user's or has ended."""
    try:
        words: list[str] = process.cmdline()
    except psutil.Error:
        return []
    return words


def _is_snakemake(process: psutil.Process) -> bool:
    words = command_line(process)[:4]
    return any(word == "snakemake" or word.endswith("/snakemake") for word in words)


def _is_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return Path(process.cwd()) == folder.resolve()
    except psutil.Error:
        return False
