"""What the guards of an iteration are measured on: the tables that it left."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from stages.core.artifacts.schemas import (
    DIVERSITY,
    HOLDOUT_REWARDS,
    JUDGED,
    METRIC_SCORES,
    TRAINING_PAIRS,
    Schema,
)
from stages.core.artifacts.tables import read_table, read_tables

JUDGEMENT = ("pair_id", "prompt_id", "winner_reward", "loser_reward", "probability", "drift")
"""Columns of the held-out pairs that guards look at: not the errors of every draw."""
Row = dict[str, Any]
ByPrompt = dict[str, Float[np.ndarray, " candidate"]]
"""For each prompt, one value for each of its candidates, in their order."""


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
    """Rewards of its candidates as the judge weighted them (schema judged)."""
    candidate_scores: Mapping[int, Sequence[Path]] = field(default_factory=dict)
    """A metric's scores of its candidates (schema metric_scores)."""
    truncated_share: float | None = None
    """Share of the evaluation prompts that the text encoder cuts, the same in every iteration."""


class Evidence:
    """What one iteration left. Each table is read when a guard first asks for it."""

    def __init__(self, tables: GuardTables, iteration: int) -> None:
        self.tables, self.iteration = tables, iteration

    @cached_property
    def held_out(self) -> pa.Table:
        """Held-out pairs as its policy judges them (schema holdout_rewards)."""
        path = self.tables.holdout[self.iteration]
        return read_table(path, HOLDOUT_REWARDS, list(JUDGEMENT))

    @cached_property
    def diversity(self) -> list[Row]:
        """How far its policy's images of each prompt differ (schema diversity)."""
        return read_table(self.tables.diversity[self.iteration], DIVERSITY).to_pylist()

    @cached_property
    def pairs(self) -> list[Row]:
        """The pairs that made its policy (schema training_pairs); none in iteration 0."""
        if self.iteration == 0:
            return []
        columns = ["prompt_id", "winner_candidate", "loser_candidate", "probability"]
        path = self.tables.pairs[self.iteration]
        return read_table(path, TRAINING_PAIRS, columns).to_pylist()

    @property
    def has_candidate_scores(self) -> bool:
        """Whether an independent metric scored the candidates that its pairs were chosen from."""
        return self.iteration > 0 and bool(self.tables.candidate_scores.get(self.iteration))

    @cached_property
    def rewards(self) -> ByPrompt:
        """The judge's rewards of the candidates."""
        return by_candidate(self.tables.rewards[self.iteration], JUDGED, "reward")

    @cached_property
    def candidate_scores(self) -> ByPrompt:
        """The independent metric's scores of the candidates."""
        return by_candidate(self.tables.candidate_scores[self.iteration], METRIC_SCORES, "score")


def by_candidate(paths: Sequence[Path], schema: Schema, column: str) -> ByPrompt:
    """For each prompt, a column in the order of its candidates."""
    rows = read_tables(paths, schema, ["prompt_id", "candidate", column]).to_pylist()
    groups: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        groups[row["prompt_id"]].append((row["candidate"], row[column]))
    return {name: np.array([value for _, value in sorted(group)]) for name, group in groups.items()}


def prompts_of(table: pa.Table) -> Int[np.ndarray, " row"]:
    """A number for each row, the same for rows of one prompt."""
    names = np.array(table.column("prompt_id").to_pylist())
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def floats(table: pa.Table, column: str) -> Float[np.ndarray, " row"]:
    """A column as float64."""
    return np.asarray(table.column(column).to_numpy(), np.float64)
