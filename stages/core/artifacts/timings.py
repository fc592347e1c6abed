"""How long the jobs of a run took, by the timing tables that Snakemake writes beside their logs."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TAIL_BYTES = 4096
"""The end of a log, which holds the stage's closing line."""
ON_A_GPU = re.compile(rb"peak memory [0-9.]+ GB, GPU ")


@dataclass(frozen=True, kw_only=True)
class TimedJob:
    """One finished job."""

    stage: str
    seconds: float
    ended: float
    """Seconds since 1970."""
    has_gpu: bool
    """Whether its log tells of a GPU's memory."""


@dataclass(frozen=True, kw_only=True)
class Timings:
    """The timed jobs of a run, in the order in which they ended."""

    jobs: Sequence[TimedJob]
    unreadable: Sequence[Path]
    """Timing tables that tell no time."""


def read_timings(folder: Path) -> Timings:
    """The timing tables at any depth of a folder of logs; none where there is no such folder."""
    jobs, unreadable = [], []
    for path in sorted(folder.rglob("*.tsv")):
        try:
            jobs.append(_read_job(path))
        except (OSError, ValueError, KeyError, TypeError, csv.Error):
            unreadable.append(path)
    return Timings(jobs=sorted(jobs, key=lambda job: job.ended), unreadable=unreadable)


def _read_job(path: Path) -> TimedJob:
    with path.open(encoding="utf-8", newline="") as file:
        seconds = [float(row["s"]) for row in csv.DictReader(file, delimiter="\t")]
    if not seconds or not 0 <= sum(seconds) < float("inf"):
        raise ValueError(f"{path} has no seconds")
    return TimedJob(
        stage=path.stem.split("-")[0],
        seconds=sum(seconds),
        ended=path.stat().st_mtime,
        has_gpu=ON_A_GPU.search(_tail(path.with_suffix(".log"))) is not None,
    )


def _tail(path: Path) -> bytes:
    """The end of a file; nothing where it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(-min(TAIL_BYTES, path.stat().st_size), os.SEEK_END)
            return file.read()
    except OSError:
        return b""
