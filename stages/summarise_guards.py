"""What warns of collapse, one row an iteration: the judge's accuracy, diversity, inflation, drift.

Paper: SAIL Sec. 5.5 names the two failures, overconfidence with lost diversity and a judge that
forgets. Example: paste the line from logs/<run>/evaluation/summarise_guards.log
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

from stages.core.artifacts import read_table, read_tables, write_table
from stages.core.guards import Guard, Limits, warnings
from stages.core.images import decode_image
from stages.core.models import ModelSettings, load_model
from stages.core.runtime import log, run_stage, stage
from stages.core.schemas import (
    GUARDS,
    HOLDOUT_REWARDS,
    IMAGES,
    METRIC_SCORES,
    PROMPTS,
    RELIABILITY,
    REWARDS,
    TRAINING_PAIRS,
)
from stages.core.statistics import (
    mean_pairwise_distance,
    rank_correlation,
    reliability,
    share_interval,
)

CONFIDENT = 0.9
"""p(winner > loser) above which a pair counts as confident (paper: Sec. 5.5)."""
PAIRS_PER_BIN = 20
"""Of the reliability curve, at least; up to eight bins."""
BLANK = 2.0
"""Largest standard deviation of a channel's values, of 255, below which an image is blank: JPEG
noise on one colour stays under it, a plain background with anything on it does not."""


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
    prompts: tuple[Path, ...]
    """Evaluation prompts, to see how many the text encoder cuts (any table with a column prompt)."""
    model: ModelSettings
    """The pretrained model, for its tokenizers."""
    limits: Limits
    """Where a measure becomes a warning on the terminal."""
    output: Path
    """Where the measures go (schema guards)."""
    reliability: Path
    """Where the judge's reliability goes (schema reliability)."""
    threads: int = 1
    """CPU threads."""


def main(args: Args) -> None:
    """Measure every iteration by itself."""
    with stage("summarise_guards") as run:
        torch.set_num_threads(args.threads)
        cut = truncated_share(args)
        rows = [
            {**measure(iteration, args), "truncated_share": cut}
            for iteration in range(len(args.holdout))
        ]
        for row in rows:
            log.info(
                "guards, %s: reward accuracy %.3f [%.3f, %.3f], diversity %.3f, drift %.5f%s",
                row["policy"], row["reward_accuracy"], row["reward_accuracy_low"],
                row["reward_accuracy_high"], row["diversity"], row["drift"],
                "".join(f", {name} {row[name]:.3f}" for name in
                        ("rank_correlation", "best_beats_worst", "confident_share")
                        if row.get(name) is not None),
            )  # fmt: skip
        empty: dict[str, Any] = dict.fromkeys(GUARDS.arrow.names)
        for sentence in warnings([Guard(**(empty | row)) for row in rows], args.limits):
            log.warning("guards: %s", sentence)
        inputs = [*args.holdout, *args.pairs, *args.prompts]
        for named in (args.images, args.rewards, args.candidate_scores):
            inputs += [path for _, path in named]
        write_table(
            args.output, rows, GUARDS, stage="summarise_guards", arguments=args, inputs=inputs
        )
        write_table(
            args.reliability, reliability_rows(args.holdout), RELIABILITY,
            stage="summarise_guards", arguments=args, inputs=args.holdout,
        )  # fmt: skip
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
        **of_images([path for i, path in args.images if i == iteration]),
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


def of_images(paths: list[Path]) -> dict[str, float]:
    """Diversity, the mean distance of two images of one prompt over prompts, and blank_share.

    Diversity is nan with one image a prompt.
    """
    rows = read_tables(paths, IMAGES, ["prompt_id", "image"]).to_pylist()
    groups: dict[str, list[NDArray[np.uint8]]] = defaultdict(list)
    for row in rows:
        where = f"{paths[0].parent}, prompt {row['prompt_id']}"
        image = decode_image(row["image"]["bytes"], where)
        groups[row["prompt_id"]].append(np.asarray(image))
    blank = [is_blank(image) for group in groups.values() for image in group]
    distances = [mean_pairwise_distance(np.stack(g)) for g in groups.values() if len(g) > 1]
    return {
        "diversity": float(np.mean(distances)) if distances else float("nan"),
        "blank_share": float(np.mean(blank)),
    }


def is_blank(image: UInt8[NDArray[np.uint8], "height width rgb"]) -> bool:
    """Whether an image is of nearly one colour, as a black one is."""
    return bool(image.std(axis=(0, 1), dtype=np.float64).max() < BLANK)


def truncated_share(args: Args) -> float:
    """Share of the different evaluation prompts that the model's text encoder cuts."""
    texts = read_tables(args.prompts, PROMPTS, ["prompt"]).column("prompt").to_pylist()
    different = list(dict.fromkeys(texts))
    model = load_model(args.model, device=torch.device("cpu"))
    return model.num_truncated(different) / len(different)


def reliability_rows(holdout: tuple[Path, ...]) -> list[dict[str, Any]]:
    """The judge's bins of every iteration."""
    rows = []
    for iteration, path in enumerate(holdout):
        judged = _floats(read_table(path, HOLDOUT_REWARDS), "probability")
        num_bins = min(8, max(1, len(judged) // PAIRS_PER_BIN))
        rows += [
            {"iteration": iteration, "policy": f"iter{iteration:02d}", **asdict(part)}
            for part in reliability(judged, num_bins)
        ]
    return rows


def _floats(table: Any, column: str) -> Float[NDArray[np.float64], " row"]:
    return np.asarray(table.column(column).to_numpy(), np.float64)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
