"""The guards of one iteration, from the tables that it left."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from stages.core.artifacts.schemas import (
    DIVERSITY,
    HOLDOUT_REWARDS,
    METRIC_SCORES,
    REWARDS,
    TRAINING_PAIRS,
    Schema,
)
from stages.core.artifacts.tables import read_table, read_tables
from stages.core.evaluation.statistics import rank_correlation, share_interval

CONFIDENT = 0.9
"""p(winner > loser) above which a pair counts as confident (paper: Sec. 5.5)."""

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class GuardTables:
    """Tables that guards are measured on, by iteration."""

    holdout: Mapping[int, Path]
    """Held-out pairs as the policy judges them (schema holdout_rewards)."""
    diversity: Mapping[int, Path]
    """How far its images differ (schema diversity)."""
    pairs: Mapping[int, Path]
    """The pairs that made it, from iteration 1 (schema training_pairs)."""
    rewards: Mapping[int, Sequence[Path]] = field(default_factory=dict)
    """Rewards of its candidates (schema rewards)."""
    candidate_scores: Mapping[int, Sequence[Path]] = field(default_factory=dict)
    """A metric's scores of its candidates (schema metric_scores)."""


def guard_row(iteration: int, tables: GuardTables) -> Row:
    """One row of the guards table, save the share of truncated prompts."""
    judged = read_table(tables.holdout[iteration], HOLDOUT_REWARDS)
    agrees = floats(judged, "winner_reward") > floats(judged, "loser_reward")
    low, high = share_interval(int(agrees.sum()), len(agrees))
    row: Row = {
        "iteration": iteration,
        "policy": f"iter{iteration:02d}",
        "reward_accuracy": float(agrees.mean()),
        "reward_accuracy_low": low,
        "reward_accuracy_high": high,
        "num_holdout_pairs": len(agrees),
        **of_images(tables.diversity[iteration]),
        "drift": float(floats(judged, "drift").mean()),
    }
    if iteration > 0:
        columns = ["prompt_id", "winner_candidate", "loser_candidate", "probability"]
        pairs = read_table(tables.pairs[iteration], TRAINING_PAIRS, columns).to_pylist()
        row["confident_share"] = float(np.mean([p["probability"] > CONFIDENT for p in pairs]))
        if tables.candidate_scores.get(iteration):
            row |= of_candidates(
                pairs,
                by_candidate(tables.rewards[iteration], REWARDS, "reward"),
                by_candidate(tables.candidate_scores[iteration], METRIC_SCORES, "score"),
            )
    return row


def of_images(path: Path) -> Row:
    """Diversity, mean over prompts, and the share of blank images; nan with one image a prompt."""
    table = read_table(path, DIVERSITY)
    rows = table.to_pylist()

    def mean(column: str) -> float:
        known = [row[column] for row in rows if row[column] is not None]
        return float(np.mean(known)) if known else float("nan")

    return {
        "diversity": mean("pixel_distance"),
        "feature_diversity": mean("feature_distance"),
        "features": rows[0]["features"],
        "blank_share": sum(row["num_blank"] for row in rows) / sum(r["num_images"] for r in rows),
    }


def of_candidates(
    pairs: Sequence[Row],
    rewards: Mapping[str, Float[np.ndarray, " candidate"]],
    scores: Mapping[str, Float[np.ndarray, " candidate"]],
) -> Row:
    """How far the judge's order of the candidates is that of an independent metric."""
    names = sorted(rewards)
    gaps = [
        scores[p["prompt_id"]][p["winner_candidate"]] - scores[p["prompt_id"]][p["loser_candidate"]]
        for p in pairs
    ]
    return {
        "rank_correlation": rank_correlation(
            np.stack([rewards[name] for name in names]), np.stack([scores[name] for name in names])
        ),
        "best_beats_worst": float(np.mean(np.array(gaps) > 0)),
    }


def by_candidate(
    paths: Sequence[Path], schema: Schema, column: str
) -> dict[str, Float[np.ndarray, " candidate"]]:
    """For each prompt, a column in the order of its candidates."""
    rows = read_tables(paths, schema, ["prompt_id", "candidate", column]).to_pylist()
    groups: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        groups[row["prompt_id"]].append((row["candidate"], row[column]))
    return {name: np.array([value for _, value in sorted(group)]) for name, group in groups.items()}


def floats(table: pa.Table, column: str) -> Float[np.ndarray, " row"]:
    """A column as float64."""
    return np.asarray(table.column(column).to_numpy(), np.float64)
