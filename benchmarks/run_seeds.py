"""Run the embedded world with several seeds and judges, and put every result into one page.

Example (about six minutes a seed on two CPU cores, and five more for a second judge):
    python -m benchmarks.run_seeds --seeds 1 2 3 4 5 --weights uniform calibrated --output benchmarks/seeds.md

A run that is finished is not run again. Every run that was asked for is in the tables. The judges after the first
start from the first one's seed training.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from scipy import stats

from stages.core.artifacts.files import write_text
from stages.core.artifacts.schemas import JUDGED, METRIC_SCORES, REWARDS, SUMMARY
from stages.core.artifacts.tables import read_table
from stages.core.evaluation.guard_tables import by_candidate
from stages.core.evaluation.guards import GUARDS, GUARDS_TABLE, Limits, seed_row
from stages.core.evaluation.statistics import Comparison, compare

Row = dict[str, Any]
Results = dict[int, tuple[list[Row], list[Row]]]
"""(summary rows, guard rows) by seed."""
IN_WORDS = {
    "uniform": "All timesteps count alike (the paper's judge)",
    "calibrated": "Weights fitted to the held-out pairs",
    "inverse_snr": "Weights by the signal-to-noise ratio",
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Run the embedded world with several seeds and judges, and put every result into one page."""

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Run seeds; 0 is the default run's."""
    weights: tuple[Literal["uniform", "inverse_snr", "calibrated"], ...] = ("uniform",)
    """score_candidates.weights of each run of a seed."""
    config: Path = Path("config/config.yaml")
    """The embedded world's config, or config/flow.yaml."""
    output: Path = Path("benchmarks/seeds.md")
    """Where the page goes (Markdown)."""
    cores: int = 2
    """CPU cores for Snakemake."""
    read_only: bool = False
    """Read finished runs and run none."""


def main(args: Args) -> None:
    """Run each seed with each judge, then write the page."""
    if not args.read_only:
        for seed, weights in itertools.product(args.seeds, args.weights):
            run(seed, weights, args)
    flags = f"--seeds {' '.join(map(str, args.seeds))} --weights {' '.join(args.weights)} --config {args.config}"
    text = f"Made by `python -m benchmarks.run_seeds {flags} --output {args.output}`.\n"
    for weights in args.weights:
        results = {seed: read_result(run_name(seed, weights, args)) for seed in args.seeds}
        text += f"\n## {IN_WORDS[weights]}\n"
        for metric in ("total", "caption_match", "appeal"):
            text += f"\n{metric_table(metric, results)}"
        text += f"\n{guard_table(results)}"
        text += f"\n{alarm_table(results)}"
    for weights in args.weights[1:]:
        text += f"\n{judges_table(args, weights)}"
    write_text(args.output, text)
    print(text)


def run(seed: int, weights: str, args: Args) -> None:
    """One run to its end."""
    name, first = run_name(seed, weights, args), run_name(seed, args.weights[0], args)
    config = [f"run={name}", f"seed={seed}", f"score_candidates={{weights: {weights}}}"]
    if name != first:
        config.append(f"train_seed={{policy: results/{first}/iter00/policy}}")
    command = ["snakemake", "--cores", str(args.cores), "--quiet", "all",
               "--configfile", str(args.config), "--config", *config]  # fmt: skip
    print("+", " ".join(command), file=sys.stderr)
    subprocess.run(command, check=True)


def run_name(seed: int, weights: str, args: Args) -> str:
    """The name of a run in results/."""
    world = "shapes" if args.config.stem == "config" else args.config.stem
    return f"{world}-seed{seed}-{weights}"


def read_result(name: str) -> tuple[list[Row], list[Row]]:
    """(summary rows, guard rows) of one run."""
    folder = Path("results") / name / "evaluation"
    return (
        read_table(folder / "summary.parquet", SUMMARY).to_pylist(),
        read_table(folder / "guards.parquet", GUARDS_TABLE).to_pylist(),
    )


def judges_table(args: Args, second: str) -> str:
    """The last policies of two judges on the same prompts and noise, and the judges themselves."""
    first = args.weights[0]
    lines = [
        f"## {IN_WORDS[second]}, beside: {IN_WORDS[first].lower()}\n",
        "The last policies on the same prompts and noise. Ranks: the judge's rank correlation with the truth "
        "among candidates, mean over iterations. Accuracy: on held-out pairs, mean over iterations from 0.\n",
        "| seed | total [95 %] | caption match | appeal | ranks | accuracy |",
        "|---|---|---|---|---|---|",
    ]
    gains = []
    for seed in args.seeds:
        names = [run_name(seed, weights, args) for weights in (second, first)]
        guards = [read_result(name)[1] for name in names]
        last = guards[0][-1]["policy"]
        found = {
            metric: paired(*(Path("results") / name / f"evaluation/shapes/{last}/scores/{metric}.parquet"
                             for name in names))
            for metric in ("total", "caption_match", "appeal")
        }  # fmt: skip
        gains.append(found["total"].difference)
        ranks, accuracies = (
            [np.mean([row[name] for row in rows if row[name] is not None]) for rows in guards]
            for name in ("rank_correlation", "reward_accuracy")
        )
        lines.append(
            f"| {seed} | {found['total'].difference:+.3f} [{found['total'].ci_low:+.3f}, "
            f"{found['total'].ci_high:+.3f}] | {found['caption_match'].difference:+.3f} | "
            f"{found['appeal'].difference:+.3f} | {ranks[0]:.2f} instead of {ranks[1]:.2f} | "
            f"{accuracies[0]:.3f} instead of {accuracies[1]:.3f} |"
        )
    lines += mean_line("difference in total", gains)
    lines += [
        f"\nOn the same candidates of the runs with {second} weights, rank correlation with the truth by the plain mean "
        "of Eq. 8 and by the weights, paired by prompt over all iterations:\n",
        "| seed | plain | weighted | difference [95 %] |",
        "|---|---|---|---|",
    ]
    for seed in args.seeds:
        paired_ranks = compare(*correlations(Path("results") / run_name(seed, second, args)))
        lines.append(
            f"| {seed} | {paired_ranks.baseline_mean:.3f} | {paired_ranks.mean:.3f} | {paired_ranks.difference:+.3f} "
            f"[{paired_ranks.ci_low:+.3f}, {paired_ranks.ci_high:+.3f}] |"
        )
    return "\n".join(lines) + "\n"


def correlations(run: Path) -> tuple[np.ndarray, np.ndarray]:
    """Spearman's correlation of (weighted, plain) rewards with the truth, by prompt of every iteration."""
    weighted: list[float] = []
    plain: list[float] = []
    for folder in sorted(run.glob("iter*/judged.parquet")):
        tables = (
            by_candidate([folder], JUDGED, "reward"),
            by_candidate(sorted(folder.parent.glob("scores/*.parquet")), REWARDS, "reward"),
        )
        truth = by_candidate(
            [folder.parent / "candidate_scores/total.parquet"], METRIC_SCORES, "score"
        )
        for name in sorted(truth):
            if np.ptp(truth[name]) > 0:
                for found, table in zip((weighted, plain), tables, strict=True):
                    found.append(float(stats.spearmanr(table[name], truth[name]).statistic))
    return np.array(weighted), np.array(plain)


def paired(ours: Path, theirs: Path) -> Comparison:
    """The comparison of two policies' scores, prompt by prompt."""
    means = []
    for path in (ours, theirs):
        by_prompt: dict[str, list[float]] = {}
        for row in read_table(path, METRIC_SCORES).to_pylist():
            by_prompt.setdefault(row["prompt_id"], []).append(row["score"])
        means.append(np.array([np.mean(by_prompt[name]) for name in sorted(by_prompt)]))
    return compare(*means)


def mean_line(what: str, values: list[float]) -> list[str]:
    """The mean over seeds with its t interval; nothing for one seed."""
    if len(values) < 2:
        return []
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    mean = np.mean(values)
    return [
        f"\nMean {what} over {len(values)} seeds: {mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}] (t)."
    ]


def metric_table(metric: str, results: Results) -> str:
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
    lines += mean_line(f"{last} - iter00", gains)
    return "\n".join(lines) + "\n"


def guard_table(results: Results) -> str:
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


def alarm_table(results: Results) -> str:
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
