"""How long a run takes yet: its plan played through with the times that finished jobs of each rule took."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stages.core.execution.runtime import in_time
from stages.core.progress.journal import Call, Job

SAID = 3
"""Rules that a sentence names; of more it says how many."""


@dataclass(frozen=True, kw_only=True)
class TimeLeft:
    """An estimate of what is left of a call."""

    seconds: float
    """Until the last job ends; a lower bound where some rules have no time yet."""
    untimed: Mapping[str, int]
    """Jobs left of rules of which none has finished yet, by rule; they count nothing."""

    @property
    def is_bound(self) -> bool:
        """Whether it will take longer than that."""
        return bool(self.untimed)


def rule_seconds(calls: Sequence[Call]) -> dict[str, float]:
    """Mean seconds of the finished jobs of each rule, in the last call in which one of it has finished.

    Earlier calls may have had other settings.
    """
    found: dict[str, float] = {}
    for call in calls:
        taken: dict[str, list[float]] = defaultdict(list)
        for number, seconds in call.seconds.items():
            if number in call.jobs:
                taken[call.jobs[number].rule].append(seconds)
        found |= {rule: math.fsum(values) / len(values) for rule, values in taken.items()}
    return found


def time_left(call: Call, known: Mapping[str, float], now: float) -> TimeLeft:
    """What is left of a call at a time, if jobs take what those of their rule took so far.

    The plan is played through: a job begins when those that it needs have ended and cores, GPUs and the
    scheduler's places allow it, in the plan's order. A failed job and what needs it are left out.
    """
    left = _left(call)
    untimed: dict[str, int] = defaultdict(int)
    for job in left.values():
        if job.rule not in known and job.log:  # without a log it runs nothing, as the rule all
            untimed[job.rule] += 1
    return TimeLeft(seconds=_play(call, left, known, now), untimed=dict(untimed))


def _left(call: Call) -> dict[int, Job]:
    """Jobs that have not ended and can: none that failed, and none that needs one that did."""
    lost = set(call.failed)
    while more := {
        number for number, job in call.jobs.items() if number not in lost and lost & {*job.needs}
    }:
        lost |= more
    return {n: job for n, job in call.jobs.items() if n not in lost and n not in call.seconds}


def _play(call: Call, left: Mapping[int, Job], known: Mapping[str, float], now: float) -> float:
    """Seconds from now until all that is left has ended."""
    limits = call.limits
    cores = math.inf if limits.cores is None else limits.cores
    gpus = math.inf if limits.gpus is None else limits.gpus
    places = math.inf if limits.jobs is None else limits.jobs
    waiting = dict(left)
    at_work: list[tuple[float, int]] = []
    clock = 0.0

    def begin(number: int, seconds: float) -> None:
        nonlocal cores, gpus, places
        job = waiting.pop(number)
        gpus -= job.gpus
        cores, places = (cores - job.threads, places) if job.is_local else (cores, places - 1)
        heapq.heappush(at_work, (clock + seconds, number))

    def fits(job: Job) -> bool:
        has_room = job.threads <= cores if job.is_local else places >= 1
        return has_room and job.gpus <= gpus + 1e-9

    for number in call.running:
        if number in waiting:
            took = now - call.started[number]
            expected = known.get(waiting[number].rule, 0.0) * call.group_sizes.get(number, 1)
            begin(number, max(expected - took, 0.0))
    while waiting or at_work:
        undone = waiting.keys() | {number for _, number in at_work}
        ready = [n for n, job in waiting.items() if not undone & {*job.needs}]
        for number in ready:
            # What is larger than the limits runs alone, as Snakemake scales it down.
            if fits(waiting[number]) or not at_work:
                begin(number, known.get(waiting[number].rule, 0.0))
        if not at_work:
            break
        clock, number = heapq.heappop(at_work)
        job = left[number]
        gpus += job.gpus
        cores, places = (cores + job.threads, places) if job.is_local else (cores, places + 1)
    return clock


def gpu_hours(call: Call) -> float:
    """GPUs times hours of the finished jobs; 0 where the call was allowed none."""
    return _hours(call, {number: float(job.gpus) for number, job in call.jobs.items()})


def core_hours(call: Call) -> float:
    """Cores times hours of the finished jobs."""
    return _hours(call, {number: float(job.threads) for number, job in call.jobs.items()})


def _hours(call: Call, devices: Mapping[int, float]) -> float:
    taken = (s * devices.get(number, 0.0) for number, s in call.seconds.items())
    return math.fsum(taken) / 3600


def in_words(call: Call, left: TimeLeft) -> str:
    """'12 of 53 jobs are done, 2 run; about 34 min left', with what is not known yet."""
    text = f"{len(call.seconds)} of {len(call.jobs)} jobs are done, {len(call.running)} run"
    if call.failed:
        text += f", {len(call.failed)} failed"
    if not left.is_bound:
        return f"{text}; about {in_time(left.seconds)} left"
    names = ", ".join(list(left.untimed)[:SAID])
    more = len(left.untimed) - SAID
    names += f" and {more} other rules" if more > 0 else ""
    known = (
        f"more than {in_time(left.seconds)} left" if left.seconds >= 1 else "time left not known"
    )
    return f"{text}; {known}, as none of {names} has ended yet"
