"""Run the embedded world with several seeds, and put every seed's result into one table.

Example (about six minutes a seed on two CPU cores):
    python -m benchmarks.run_seeds --seeds 0 1 2 3 4 --output benchmarks/seeds.md

A seed that has been run is not run again. Every seed that was asked for is in the table.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from scipy import stats

from stages.core.artifacts.files import write_text
from stages.core.artifacts.schemas import SUMMARY
from stages.core.artifacts.tables import read_table
from stages.core.evaluation.guards import GUARDS, GUARDS_TABLE, Limits, seed_row

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Run the embedded world with several seeds, and put every seed's result into one table."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Run seeds; 0 is the default run's."""
    output: Path = Path("benchmarks/seeds.md")
    """Where the table goes (Markdown)."""
    cores: int = 2
    """CPU cores for Snakemake."""


def main(args: Args) -> None:
    """Run each seed, then write the table."""
    for seed in args.seeds:
        command = ["snakemake", "--cores", str(args.cores), "--quiet", "all"]
        command += ["--config", f"run={run_name(seed)}", f"seed={seed}"]
        print("+", " ".join(command), file=sys.stderr)
        subprocess.run(command, check=True)
    results = {seed: read_result(seed) for seed in args.seeds}
    flags = f"--seeds {' '.join(map(str, args.seeds))} --output {args.output}"
    text = f"Made by `python -m benchmarks.run_seeds {flags}` with `config/config.yaml`.\n"
    for metric in ("total", "caption_match", "appeal"):
        text += f"\n{metric_table(metric, results)}"
    text += f"\n{guard_table(results)}"
    text += f"\n{alarm_table(results)}"
    write_text(args.output, text)
    print(text)


def run_name(seed: int) -> str:
    """The default run for seed 0, a run of its own for any other."""
    return "shapes" if seed == 0 else f"shapes-seed{seed}"


def read_result(seed: int) -> tuple[list[Row], list[Row]]:
    """(summary rows, guard rows) of one seed's run."""
    folder = Path("results") / run_name(seed) / "evaluation"
    return (
        read_table(folder / "summary.parquet", SUMMARY).to_pylist(),
        read_table(folder / "guards.parquet", GUARDS_TABLE).to_pylist(),
    )


def metric_table(metric: str, results: dict[int, tuple[list[Row], list[Row]]]) -> str:
    """Means of every policy, the last against iteration 0 paired, and whether it rose each time."""
    policies = list(dict.fromkeys(row["policy"] for row in next(iter(results.values()))[0]))
    last = policies[-1]
    lines = [
        f"**{metric}**, mean over the held-out prompts\n",
        f"| seed | {' | '.join(policies)} | {last} - iter00 [95 %] | wins | rises each time |",
        "|" + "---|" * (len(policies) + 4),
    ]
    for seed, (rows, _) in results.items():
        of = {(r["policy"], r["baseline"]): r for r in rows if r["metric"] == metric}
        means = [next(r["mean"] for (p, _), r in of.items() if p == policy) for policy in policies]
        gain = of[last, "iter00"]
        rises = all(after > before for before, after in itertools.pairwise(means))
        lines.append(
            f"| {seed} | {' | '.join(f'{mean:.3f}' for mean in means)} | "
            f"{gain['difference']:+.3f} [{gain['ci_low']:+.3f}, {gain['ci_high']:+.3f}] | "
            f"{100 * gain['win_rate']:.0f} % | {'yes' if rises else 'no'} |"
        )
    gains = [
        next(
            row["difference"]
            for row in rows
            if (row["metric"], row["policy"], row["baseline"]) == (metric, last, "iter00")
        )
        for rows, _ in results.values()
    ]
    if len(gains) > 1:
        half = stats.t.ppf(0.975, len(gains) - 1) * stats.sem(gains)
        lines.append(
            f"\nMean of {last} - iter00 over {len(gains)} seeds: {np.mean(gains):+.3f} "
            f"[{np.mean(gains) - half:+.3f}, {np.mean(gains) + half:+.3f}] (t)."
        )
    return "\n".join(lines) + "\n"


def guard_table(results: dict[int, tuple[list[Row], list[Row]]]) -> str:
    """How the judge held up: accuracy on held-out pairs and rank correlation, by iteration."""
    count = len(next(iter(results.values()))[1])
    names = [f"iter{i:02d}" for i in range(count)]
    lines = [
        "**The judge**: accuracy on held-out pairs (rank correlation with the truth among "
        "candidates), diversity of the last policy\n",
        f"| seed | {' | '.join(names)} | diversity iter00 -> {names[-1]} |",
        "|" + "---|" * (count + 2),
    ]
    for seed, (_, guards) in results.items():
        cells = [
            f"{g['reward_accuracy']:.3f}"
            + (f" ({g['rank_correlation']:.2f})" if g["rank_correlation"] is not None else "")
            for g in guards
        ]
        change = f"{guards[0]['diversity']:.3f} -> {guards[-1]['diversity']:.3f}"
        lines.append(f"| {seed} | {' | '.join(cells)} | {change} |")
    return "\n".join(lines) + "\n"


def alarm_table(results: dict[int, tuple[list[Row], list[Row]]]) -> str:
    """Each step, whether the total rose with its whole interval, and which guards warned of it."""
    lines = [
        "**Guards, and what truly happened**: each iteration against the one before, by total\n",
        "| seed | iteration | total, against the one before [95 %] | guards that warn | confident share |",
        "|---|---|---|---|---|",
    ]
    false, sure, better = 0, 0, 0
    for seed, (rows, guards) in results.items():
        of = {(r["policy"], r["baseline"]): r for r in rows if r["metric"] == "total"}
        start = seed_row(guards)
        for row in guards:
            before = f"iter{row['iteration'] - 1:02d}" if row["iteration"] else "base"
            step = of[row["policy"], before]
            warned = [each.title for each in GUARDS if each.warning(row, start, Limits())]
            better += step["ci_low"] > 0
            share = row["confident_share"] or 0.0
            false += step["ci_low"] > 0 and bool(warned)
            sure += step["ci_low"] > 0 and share > 0.9
            lines.append(
                f"| {seed} | {row['policy']} | {step['difference']:+.3f} [{step['ci_low']:+.3f}, "
                f"{step['ci_high']:+.3f}] | {', '.join(warned) or 'none'} | {share:.2f} |"
            )
    lines.append(
        f"\nOf {better} iterations that are better, {false} were warned of; a limit of 0.9 on the confident "
        f"share would have warned of {sure}."
    )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
