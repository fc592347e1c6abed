"""How far a run is, what it works on, how long it takes yet, and what it has cost, at any time.

Reads the journal that every call of Snakemake writes to logs/<run>/jobs.jsonl, whatever runs the jobs: this
machine, Slurm or Kubernetes. What is left is estimated from finished jobs of the same rule. Changes nothing.

Examples:
    python -m stages.status shapes
    watch -n 60 python -m stages.status shapes
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from stages.core.execution.locks import try_lock
from stages.core.execution.runtime import in_time, run_stage
from stages.core.progress.journal import NAME, Call, Job, read_calls
from stages.core.progress.time_left import (
    core_hours,
    gpu_hours,
    in_words,
    rule_seconds,
    time_left,
)

OUTCOMES = {
    "finished": "has finished",
    "failed": "has failed",
    "interrupted": "was interrupted",
    "stopped": "was stopped by its guards",
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """The name of a run in; how far it is out."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run's name, or its folder under results/."""
    folder: Path = Path()
    """Where snakemake is called."""


def main(args: Args) -> None:
    """Read the journal and print what it says now."""
    run = Path(args.run).name
    calls = read_calls(args.folder / "logs" / run / NAME)
    now = time.time()
    known = rule_seconds(calls)
    show(run, calls, known, now, is_held(args.folder, run))


def is_held(folder: Path, run: str) -> bool | None:
    """Whether a Snakemake makes the run now; None where locks do not tell."""
    path = folder / ".snakemake" / "runs" / f"{run}.lock"
    if not path.is_file():
        return False
    try:
        file = try_lock(path, leave_name=True, shared=True)
    except OSError:
        return None
    if file is None:
        return True
    file.close()
    return False


def show(
    run: str, calls: list[Call], known: dict[str, float], now: float, at_work: bool | None
) -> None:
    """One line of state, one of progress, what runs, and a table of the rules."""
    console = Console(highlight=False, soft_wrap=True)
    call = calls[-1]
    left = time_left(call, known, now)
    console.print(state(run, call, now, at_work), markup=False)
    if call.ended is None and at_work is not False:
        console.print(in_words(call, left), markup=False)
        if not left.is_bound and left.seconds:
            console.print(f"It ends about {clock(now + left.seconds)}.")
        for number in call.running:
            console.print(running_job(call, number, known, now), markup=False)
    else:
        console.print(f"{len(call.seconds)} of its {len(call.jobs)} jobs were done.")
    for number in sorted(call.failed & call.jobs.keys()):
        job = call.jobs[number]
        console.print(f"failed: {name_of(job)}; its log is {job.log or 'not kept'}", markup=False)
    console.print(cost(calls))
    console.print(table_of_rules(call, known))


def state(run: str, call: Call, now: float, at_work: bool | None) -> str:
    """Whether the last call of the run goes on, or how it ended."""
    begun = f"begun {clock(call.begun)}"
    if call.ended is not None:
        outcome = OUTCOMES.get(call.outcome, "has ended")
        return f"{run} {outcome} {in_time(now - call.ended)} ago ({begun}, took {in_time(call.ended - call.begun)})"
    if at_work:
        return f"{run} is at work for {in_time(now - call.begun)} ({begun})"
    if at_work is None:
        return f"{run} may be at work, or was killed: this disk has no locks that tell ({begun})"
    return (
        f"{run} was killed: no snakemake makes it on this machine, and its last call has not noted its end "
        f"({begun}). Call snakemake again; it goes on from here"
    )


def running_job(call: Call, number: int, known: dict[str, float], now: float) -> str:
    """'runs: iter02/update_policy for 12 min of about 40 min'."""
    job = call.jobs[number]
    text = f"runs: {name_of(job)} for {in_time(now - call.started[number])}"
    if job.rule in known:
        text += f" of about {in_time(known[job.rule] * call.group_sizes.get(number, 1))}"
    return text


def name_of(job: Job) -> str:
    """What tells a job from others of its rule: where its log lies in logs/<run>/."""
    return str(Path(*Path(job.log).with_suffix("").parts[2:])) if job.log else job.rule


def cost(calls: list[Call]) -> str:
    """Device hours of the finished jobs of all calls."""
    gpus = sum(map(gpu_hours, calls))
    cores = sum(map(core_hours, calls))
    count = sum(len(call.seconds) for call in calls)
    gpu = f"{gpus:.2f} GPU hours and " if gpus else ""
    return f"Finished jobs of {len(calls)} calls: {count}, {gpu}{cores:.2f} core hours."


def table_of_rules(call: Call, known: dict[str, float]) -> Table:
    """For each rule of the last call, jobs done and left and the mean time of one."""
    table = Table(box=None, pad_edge=False)
    for name in ("rule", "done", "left", "each took"):
        table.add_column(name, justify="left" if name == "rule" else "right")
    for rule in dict.fromkeys(job.rule for job in call.jobs.values()):
        numbers = {number for number, job in call.jobs.items() if job.rule == rule}
        done = len(numbers & call.seconds.keys())
        took = in_time(known[rule]) if rule in known else "not known"
        table.add_row(rule, str(done), str(len(numbers) - done), took)
    return table


def clock(seconds: float) -> str:
    """Local time, with the date where it is not today."""
    when = time.localtime(seconds)
    is_today = time.strftime("%F", when) == time.strftime("%F")
    return time.strftime("%H:%M" if is_today else "%F %H:%M", when)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
