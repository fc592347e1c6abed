"""How well the reward ranks candidates, by how much noise its draws have: read off finished runs.

Example (after `snakemake --cores all --configfile config/flow.yaml`; seconds):
    python -m benchmarks.noise_levels --runs results/flow --output benchmarks/noise_levels.md

Each candidate's score keeps the errors of policy and reference at every draw. Here they are taken apart by the draw's
timestep, so that one sees which part of the noise schedule knows what people want. The truth is the run's
`evaluation.candidate_metric`, in the embedded worlds the total.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from jaxtyping import Float, Int, Shaped

from stages.core.artifacts.files import write_text
from stages.core.artifacts.judges import read_judge
from stages.core.artifacts.schemas import METRIC_SCORES, REWARDS
from stages.core.artifacts.tables import read_table, read_tables
from stages.core.evaluation.statistics import rank_correlation
from stages.core.method.calibration import NUM_BINS

Draws = Float[np.ndarray, "prompt candidate draw"]


@dataclass(frozen=True, kw_only=True)
class Args:
    """How well the reward ranks candidates, by how much noise its draws have."""

    runs: tuple[Path, ...] = (Path("results/flow"),)
    """Finished runs, with `evaluation.candidate_metric`."""
    metric: str = "total"
    """The truth: the runs' `evaluation.candidate_metric`."""
    num_timesteps: int = 1000
    """Length of the models' noise schedule."""
    output: Path = Path("benchmarks/noise_levels.md")
    """Where the table goes (Markdown)."""


@dataclass(frozen=True)
class Scored:
    """The draws of an iteration's candidates, and the truth."""

    gains: Draws
    """The reference's less the policy's error."""
    bins: Int[np.ndarray, "prompt candidate draw"]
    """Tenths of the noise schedule, from the cleanest."""
    truth: Float[np.ndarray, "prompt candidate"]

    @classmethod
    def of(cls, folder: Path, args: Args) -> Scored:
        """Read an iteration's folder."""
        names = ["prompt_id", "candidate", "policy_errors", "reference_errors", "timesteps"]
        paths = sorted(folder.glob("scores/shard-*.parquet"))
        rows = read_tables(paths, REWARDS, names).to_pylist()
        scores = read_table(folder / f"candidate_scores/{args.metric}.parquet", METRIC_SCORES)
        truth = {(row["prompt_id"], row["candidate"]): row["score"] for row in scores.to_pylist()}
        rows.sort(key=lambda row: (row["prompt_id"], row["candidate"]))
        num_prompts = len({row["prompt_id"] for row in rows})

        def stacked(values: list[Shaped[np.ndarray, "..."]]) -> Shaped[np.ndarray, "..."]:
            found = np.stack(values)
            return found.reshape(num_prompts, -1, *found.shape[1:])

        errors = [np.subtract(row["reference_errors"], row["policy_errors"]) for row in rows]
        timesteps = stacked([np.asarray(row["timesteps"]) for row in rows])
        return cls(
            gains=stacked(errors),
            bins=timesteps * NUM_BINS // args.num_timesteps,
            truth=stacked([np.asarray(truth[row["prompt_id"], row["candidate"]]) for row in rows]),
        )

    def correlation(self, weights: Draws) -> float:
        """Mean over prompts of the rank correlation between the truth and the weighted sum of the gains."""
        return rank_correlation((self.gains * weights).sum(axis=2), self.truth)


def main(args: Args) -> None:
    """Read the runs, write the table."""
    text = "\n".join(page(args)) + "\n"
    write_text(args.output, text)
    print(text)


def page(args: Args) -> Iterator[str]:
    """The table's lines: one for each iteration of each run."""
    names = " ".join(map(str, args.runs))
    edges = [f"{number * args.num_timesteps // NUM_BINS} on" for number in range(NUM_BINS)]
    yield "# How well the reward ranks candidates, by how much noise its draws have\n"
    yield (
        f"Made by `python -m benchmarks.noise_levels --runs {names} --output {args.output}`. Rank correlation with "
        f"`{args.metric}` among the candidates of a prompt, mean over prompts: of all draws alike (the paper's "
        "reward), of the run's own weights, and of the draws of each tenth of the noise schedule alone, from the "
        "cleanest.\n"
    )
    yield f"| run | iteration | all alike | own weights | {' | '.join(edges)} |"
    yield "|---|---|---|---|" + "---|" * NUM_BINS
    for run in args.runs:
        for folder in sorted(run.glob("iter*/candidate_scores")):
            yield line(run, folder.parent, args)


def line(run: Path, folder: Path, args: Args) -> str:
    """An iteration's line."""
    scored = Scored.of(folder, args)
    cells = [f"{scored.correlation(np.ones_like(scored.gains)):+.2f}", "-"]
    judge = run / f"evaluation/judges/iter{int(folder.name[4:]) - 1:02d}.json"
    if judge.exists():
        cells[1] = f"{scored.correlation(np.array(read_judge(judge).weights)[scored.bins]):+.2f}"
    for number in range(NUM_BINS):
        cells.append(f"{scored.correlation((scored.bins == number).astype(float)):+.2f}")
    return f"| {run.name} | {folder.name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
