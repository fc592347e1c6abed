"""The hours and the disk of a run, on the terminal."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from stages.core.plan.costs import ENCODING, Counts, Rates, clock_hours, disk_bytes, hours
from stages.core.plan.online_costs import OnlineCounts
from stages.core.plan.shards import Shards
from stages.core.preflight.findings import Findings

GB = 1e9


def show(
    counts: Counts,
    rates: Rates,
    findings: Findings,
    *,
    devices: int,
    training_gpus: int,
    shards: Sequence[Shards],
    start: float,
    shard_minutes: float,
    results: Path,
) -> None:
    """Tables of hours, jobs and disk on the terminal; notes whether the disk is large enough.

    `start` is how many seconds a stage takes until it has a model, without its denoiser.
    """
    console = Console()
    table = Table(title="What the run will take", title_justify="left")
    for column in ("work", "how much", "device hours"):
        table.add_column(column, justify="left" if column == "work" else "right")
    amounts = {
        ENCODING: f"{counts.human_pairs:,} pairs",
        "sample candidates": f"{counts.candidates:,} images",
        "score candidates": f"{counts.candidates:,} x {counts.reward_draws} draws",
        "train": f"{counts.training_pairs:,} pairs",
        "sample evaluation images": f"{counts.evaluation_images:,} images",
        "train the step judge": f"{counts.step_judge_pairs:,} pairs",
    }
    a_round = counts.online_round
    if a_round is not None:
        amounts |= online_amounts(a_round, counts.online_rounds)
    taken = hours(counts, rates)
    for name, value in taken.items():
        table.add_row(name, amounts[name], f"{value:.2f}")
    table.add_row("all", "", f"{sum(taken.values()):.2f}", style="bold")
    console.print(table)
    if a_round is not None:
        console.print(
            f"The online training calls the denoiser {counts.online_rounds * a_round.calls:,} times at most, a row at "
            "a time; where comparisons are not clear it trains on fewer. A metric's own time is not counted"
        )
    if devices > 1:
        clock = clock_hours(
            taken, devices=devices, training_gpus=training_gpus,
            encoding_shards=counts.encoding_shards,
        )  # fmt: skip
        console.print(
            f"About {clock:.2f} h on {devices} devices, of which a training takes "
            f"{min(devices, training_gpus)} (execution.training_gpus)"
        )
    show_shards(
        console, shards, start + rates.load_denoiser, minutes=shard_minutes, devices=devices
    )
    show_disk(console, disk_bytes(counts, rates), findings, results)


def show_disk(
    console: Console, sizes: Mapping[str, int], findings: Findings, results: Path
) -> None:
    """Bytes of what the run will write; notes whether the disk has room for it."""
    disk = Table(title="What it will write", title_justify="left")
    disk.add_column("files")
    disk.add_column("GB", justify="right")
    for name, size in sizes.items():
        disk.add_row(name, f"{size / GB:.2f}")
    disk.add_row("all", f"{sum(sizes.values()) / GB:.2f}", style="bold")
    console.print(disk)
    place = results if results.exists() else Path.cwd()
    free = shutil.disk_usage(place).free
    findings.add(
        f"free disk at {place}", f"{free / GB:.1f} GB for {sum(sizes.values()) / GB:.1f} GB",
        holds=free > 1.1 * sum(sizes.values()),
    )  # fmt: skip


def show_shards(
    console: Console, shards: Sequence[Shards], start: float, *, minutes: float, devices: int
) -> None:
    """How long jobs are, what of that is their start, and how many would last at most so many minutes."""
    table = Table(
        title=f"Its jobs; each takes about {start:.0f} s to start", title_justify="left",
        caption="execution.shard_minutes says how long they should last", caption_justify="left",
    )  # fmt: skip
    table.add_column("shards", no_wrap=True)
    for column in ("now", "minutes a job", "starting", f"for {minutes:g} min"):
        table.add_column(column, justify="right")
    for each in shards:
        table.add_row(
            each.key, str(each.number), f"{each.minutes:.1f}", f"{each.share_of_starts(start):.1%}",
            str(each.fitting(minutes, devices=devices, start=start)),
        )  # fmt: skip
    console.print(table)


def online_amounts(a_round: OnlineCounts, rounds: int) -> dict[str, str]:
    """How much an online training does, in words."""
    judged = f"{rounds * a_round.judged:,} images"
    if a_round.judge_draws:
        judged += f" x {a_round.judge_draws // a_round.judged} draws"
    return {
        "online: sample": f"{rounds * a_round.chain_steps:,} steps",
        "online: judge": judged,
        "online: train": f"{rounds * a_round.trained_steps:,} steps",
    }
