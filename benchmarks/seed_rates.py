"""A stronger seed training makes a better policy and, it is said, a worse judge: two rates, three tuning seeds.

Example (six runs, about forty minutes on two CPU cores):
    python -m benchmarks.seed_rates --output benchmarks/seed_rates.md

On the tuning fold, whose captions no report uses. A run that is finished is not run again.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmarks.run_seeds import Row, read_result
from stages.core.artifacts.files import write_text

CONFIGS = ("config/config.yaml", "benchmarks/tuning.yaml")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Seed trainings of several learning rates, and what the loop makes of each."""

    rates: tuple[float, ...] = (5e-6, 1e-5)
    """train_seed.learning_rate."""
    seeds: tuple[int, ...] = (101, 102, 103)
    """Run seeds, from 100 on: no report is of these."""
    output: Path = Path("benchmarks/seed_rates.md")
    """Where the table goes (Markdown)."""
    cores: int = 2
    """CPU cores for Snakemake."""
    read_only: bool = False
    """Read finished runs and run none."""


def main(args: Args) -> None:
    """Run each, then write the table."""
    lines = [
        "# How strong a seed training?\n",
        f"    python -m benchmarks.seed_rates --rates {' '.join(f'{rate:g}' for rate in args.rates)} "
        f"--seeds {' '.join(map(str, args.seeds))} --output {args.output}\n",
        "Tuning fold; mean over its prompts. Accuracy: of the seed policy on held-out human pairs. Ranks: the rank "
        "correlation of the judge of iterations 1 to 3 with the truth, among the candidates it ranked.\n",
        "| rate | seed | base | iter00 | iter03 | iter03 - iter00 [95 %] | accuracy | ranks |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for rate in args.rates:
        gains, starts = [], []
        for seed in args.seeds:
            name = f"tuning-{seed}-{rate:g}"
            if not args.read_only:
                run(name, seed, rate, args.cores)
            summary, guards = read_result(name)
            of = {(r["policy"], r["baseline"]): r for r in summary if r["metric"] == "total"}
            gain = of["iter03", "iter00"]
            gains.append(gain["difference"])
            starts.append(of["iter00", "base"]["difference"])
            lines.append(f"| {rate:g} | {seed} | {cells(of, gain, guards)} |")
        lines.append(
            f"| {rate:g} | mean | | {np.mean(starts):+.3f} over base | | {np.mean(gains):+.3f} | | |"
        )
    write_text(args.output, "\n".join(lines) + "\n")
    print("\n".join(lines))


def run(name: str, seed: int, rate: float, cores: int) -> None:
    """One run to its end."""
    overlay = Path("work/seed_rates") / f"{name}.yaml"  # numbers on the command line arrive as text
    overlay.parent.mkdir(parents=True, exist_ok=True)
    write_text(overlay, f"run: {name}\nseed: {seed}\ntrain_seed:\n  learning_rate: {rate:.6f}\n")
    command = ["snakemake", "--cores", str(cores), "--quiet", "all"]
    command += ["--configfile", *CONFIGS, str(overlay)]
    print("+", " ".join(command), file=sys.stderr)
    subprocess.run(command, check=True)


def cells(of: dict[tuple[str, str], Row], gain: Row, guards: list[Row]) -> str:
    """One run's part of its line."""
    base = of["iter00", "base"]["baseline_mean"]
    ranks = ", ".join(f"{row['rank_correlation']:.2f}" for row in guards[1:])
    return (
        f"{base:.3f} | {gain['baseline_mean']:.3f} | {gain['mean']:.3f} | {gain['difference']:+.3f} "
        f"[{gain['ci_low']:+.3f}, {gain['ci_high']:+.3f}] | {guards[0]['reward_accuracy']:.3f} | {ranks}"
    )


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
