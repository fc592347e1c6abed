"""What was run, for the head of the page: model, data, iterations, time, versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from stages.core.artifacts.timings import TimedJob, Timings

Row = Mapping[str, Any]
TRAININGS = ("train_seed", "update_policy")


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A name and what it is."""

    name: str
    value: str
    is_of_time: bool = False
    """Whether it differs between two runs of one config, by when and how fast they were made."""


def run_facts(
    *,
    config: Row,
    counts: Row,
    sizes: Sequence[Row],
    evaluated: str,
    timings: Timings,
    training_gpus: int,
    made_with: Row,
) -> list[Fact]:
    """The head of the page.

    `counts` are the import's, `sizes` the number of pairs of each iteration and the candidates that
    they were chosen from. What nothing is known of is left out.
    """
    iterations = [
        f"{size['num_pairs']:,} pairs"
        + (f", of {size['num_candidates']} candidates a prompt" if size["num_candidates"] else "")
        for size in sizes
    ]
    model = config.get("model", {}).get("base", "")
    rank = config.get("lora", {}).get("rank", 0)
    facts = [
        Fact(name="Model", value=model + (f", LoRA of rank {rank}" if rank else "")),
        Fact(
            name="Human pairs",
            value=f"{counts['pairs_kept']:,} trained on, {counts['pairs_held_out']:,} held out"
            if {"pairs_kept", "pairs_held_out"} <= counts.keys()
            else "",
        ),
        Fact(
            name="Human likes",
            value=f"{counts['liked_kept']:,} liked and {counts['disliked_kept']:,} disliked images trained on, "
            f"{counts['pairs_held_out']:,} of each held out"
            if {"liked_kept", "disliked_kept", "pairs_held_out"} <= counts.keys()
            else "",
        ),
        Fact(
            name="Iterations",
            value="" if not sizes
            else f"{len(sizes)} of {iterations[0]}" if len(set(iterations)) == 1
            else f"{len(sizes)}: {'; '.join(iterations)}",
        ),
        Fact(name="Evaluated on", value=evaluated),
        *time_facts(timings.jobs, training_gpus),
        Fact(name="Code", value=code_in_words(made_with), is_of_time=True),
    ]  # fmt: skip
    return [fact for fact in facts if fact.value]


def time_facts(jobs: Sequence[TimedJob], training_gpus: int) -> list[Fact]:
    """When the timed jobs ran, and the hours of devices that each stage took; none without jobs."""
    if not jobs:
        return []
    begun = min(job.ended - job.seconds for job in jobs)
    ended = max(job.ended for job in jobs)
    seconds: dict[str, float] = {}
    for job in jobs:
        devices = training_gpus if job.stage in TRAININGS else 1
        seconds[job.stage] = seconds.get(job.stage, 0.0) + job.seconds * devices
    parts = ", ".join(f"{name} {duration(spent)}" for name, spent in seconds.items())
    num_gpu = sum(job.has_gpu for job in jobs)
    where = {0: "Time on the CPU", len(jobs): "Time on GPUs"}.get(num_gpu, "Time on devices")
    return [
        Fact(
            name="Made",
            value=f"{period(begun, ended)} ({duration(ended - begun)})",
            is_of_time=True,
        ),
        Fact(
            name=where,
            value=f"{duration(sum(seconds.values()))} in {len(jobs)} timed jobs: {parts}",
            is_of_time=True,
        ),
    ]


def period(begun: float, ended: float) -> str:
    """'2026-11-27 02:04 to 06:31 UTC', with the second date where it is another one."""
    first, last = (datetime.fromtimestamp(seconds, UTC) for seconds in (begun, ended))
    end = f"{last:%H:%M}" if first.date() == last.date() else f"{last:%Y-%m-%d %H:%M}"
    return f"{first:%Y-%m-%d %H:%M} to {end} UTC"


def duration(seconds: float) -> str:
    """'45 s', '12 min' or '3.4 h'."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:,.1f} h"


def code_in_words(made_with: Row) -> str:
    """'commit 0123abc with changes, Python 3.12.1, torch 2.13.0'; empty where nothing is known."""
    versions = made_with.get("versions") or {}
    commit = made_with.get("commit")
    parts = [f"commit {commit}"] if commit else []
    parts += [f"{name} {version}" for name, version in versions.items()]
    return ", ".join(parts)
