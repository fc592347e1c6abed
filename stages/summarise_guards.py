"""What warns of collapse, one row an iteration: the judge's accuracy, diversity, inflation, drift.

Paper: SAIL Sec. 5.5 names the two failures, overconfidence with lost diversity and a judge that
forgets. Example: paste the line from logs/<run>/evaluation/summarise_guards.log
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from jaxtyping import Float
from numpy.typing import NDArray

from stages.core.artifacts import read_table, read_tables, write_table
from stages.core.images import decode_image
from stages.core.runtime import log, run_stage, stage
from stages.core.schemas import (
    GUARDS,
    HOLDOUT_REWARDS,
    IMAGES,
    METRIC_SCORES,
    REWARDS,
    TRAINING_PAIRS,
)
from stages.core.statistics import mean_pairwise_distance, rank_correlation, share_interval

CONFIDENT = 0.9
"""p(winner > loser) above which a pair counts as confident (paper: Sec. 5.5)."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """What warns of collapse, one row an iteration."""

    holdout: tuple[Path, ...]
    """Held-out pairs as each policy judges them, from iteration 0 (schema holdout_rewards)."""
    images: tuple[tuple[int, Path], ...]
    """Iteration and images of its policy, for diversity (schema images)."""
    pairs: tuple[Path, ...]
    """Generated pairs of each iteration, from 1 (schema training_pairs)."""
    rewards: tuple[tuple[int, Path], ...]
    """Iteration and rewards of its candidates (schema rewards)."""
    candidate_scores: tuple[tuple[int, Path], ...] = ()
    """Iteration and a metric's scores of its candidates (schema metric_scores)."""
    output: Path
    """Where the measures go (schema guards)."""


def main(args: Args) -> None:
    """Measure every iteration by itself."""
    with stage("summarise_guards") as run:
        rows = [measure(iteration, args) for iteration in range(len(args.holdout))]
        for row in rows:
            log.info(
                "guards, %s: reward accuracy %.3f [%.3f, %.3f], diversity %.3f, drift %.5f%s",
                row["policy"], row["reward_accuracy"], row["reward_accuracy_low"],
                row["reward_accuracy_high"], row["diversity"], row["drift"],
                "".join(f", {name} {row[name]:.3f}" for name in
                        ("rank_correlation", "best_beats_worst", "confident_share")
                        if row.get(name) is not None),
            )  # fmt: skip
        inputs = [*args.holdout, *args.pairs]
        for named in (args.images, args.rewards, args.candidate_scores):
            inputs += [path for _, path in named]
        write_table(
            args.output, rows, GUARDS, stage="summarise_guards", arguments=args, inputs=inputs
        )
        run.rows_in, run.rows_out = len(inputs), len(rows)


def measure(iteration: int, args: Args) -> dict[str, Any]:
    """One row of the guards table."""
    judged = read_table(args.holdout[iteration], HOLDOUT_REWARDS)
    agrees = _floats(judged, "winner_reward") > _floats(judged, "loser_reward")
    low, high = share_interval(int(agrees.sum()), len(agrees))
    row: dict[str, Any] = {
        "iteration": iteration,
        "policy": f"iter{iteration:02d}",
        "reward_accuracy": float(agrees.mean()),
        "reward_accuracy_low": low,
        "reward_accuracy_high": high,
        "num_holdout_pairs": len(agrees),
        "diversity": diversity([path for i, path in args.images if i == iteration]),
        "drift": float(_floats(judged, "drift").mean()),
    }
    if iteration > 0:
        pairs = read_table(
            args.pairs[iteration - 1], TRAINING_PAIRS,
            ["prompt_id", "winner_candidate", "loser_candidate", "probability"],
        ).to_pylist()  # fmt: skip
        row["confident_share"] = float(np.mean([p["probability"] > CONFIDENT for p in pairs]))
        truth = [path for i, path in args.candidate_scores if i == iteration]
        if truth:
            scores = by_candidate(truth, METRIC_SCORES, "score")
            rewards = by_candidate(
                [path for i, path in args.rewards if i == iteration], REWARDS, "reward"
            )
            names = sorted(rewards)
            row["rank_correlation"] = rank_correlation(
                np.stack([rewards[name] for name in names]),
                np.stack([scores[name] for name in names]),
            )
            gaps = [
                scores[p["prompt_id"]][p["winner_candidate"]]
                - scores[p["prompt_id"]][p["loser_candidate"]]
                for p in pairs
            ]
            row["best_beats_worst"] = float(np.mean(np.array(gaps) > 0))
    return row


def by_candidate(
    paths: list[Path], schema: Any, column: str
) -> dict[str, Float[NDArray[np.float64], " candidate"]]:
    """For each prompt, a column in the order of its candidates."""
    rows = read_tables(paths, schema, ["prompt_id", "candidate", column]).to_pylist()
    groups: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        groups[row["prompt_id"]].append((row["candidate"], row[column]))
    return {name: np.array([value for _, value in sorted(group)]) for name, group in groups.items()}


def diversity(paths: list[Path]) -> float:
    """Mean distance of two images of one prompt, over prompts; nan with one image a prompt."""
    rows = read_tables(paths, IMAGES, ["prompt_id", "image"]).to_pylist()
    groups: dict[str, list[NDArray[np.uint8]]] = defaultdict(list)
    for row in rows:
        groups[row["prompt_id"]].append(np.asarray(decode_image(row["image"]["bytes"])))
    distances = [mean_pairwise_distance(np.stack(g)) for g in groups.values() if len(g) > 1]
    return float(np.mean(distances)) if distances else float("nan")


def _floats(table: Any, column: str) -> Float[NDArray[np.float64], " row"]:
    return np.asarray(table.column(column).to_numpy(), np.float64)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
