"""Scored candidates in; one preference pair a prompt out. Paper: SAIL Sec. 4.1 (best against worst).

Example: paste the line from logs/<run>/iter01/select_pairs.log
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from stages.core.artifacts.images import image_size
from stages.core.artifacts.judges import JudgeRecord, judge_of
from stages.core.artifacts.provenance import policy_files, policy_name
from stages.core.artifacts.schemas import CANDIDATES, JUDGED, METRIC_SCORES, REWARDS, TRAINING_PAIRS
from stages.core.artifacts.spools import RowSpool
from stages.core.artifacts.tables import (
    read_batches,
    read_table,
    read_tables,
    write_rows,
    write_table,
)
from stages.core.errors import UserError
from stages.core.execution.runtime import log, progress, run_stage, stage
from stages.core.method.calibration import BinWeights
from stages.core.method.rewards import (
    implicit_reward,
    margin_standard_error,
    preference_probability,
)
from stages.core.method.seeding import seed_of
from stages.core.method.selection import best_worst, random_pair

Row = dict[str, Any]

IMAGES_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True)
class Args:
    """Scored candidates in, one preference pair a prompt out."""

    candidates: tuple[Path, ...]
    """All shards of the candidates (schema candidates)."""
    rewards: tuple[Path, ...]
    """Their implicit rewards (schema rewards)."""
    judges: tuple[Path, ...] = ()
    """What each timestep counts, of this policy and perhaps of others; without, all count alike."""
    ranking: tuple[Path, ...] = ()
    """Scores of a metric that ranks instead of the implicit reward (schema metric_scores)."""
    strategy: Literal["best_worst", "random"]
    """'best_worst' (paper) or 'random' (Table 5), which is ordered by score all the same."""
    candidates_per_prompt: int
    """Candidates each prompt must have."""
    min_margin_in_standard_errors: float
    """Leave out pairs whose margin is smaller than this many standard errors; 0 keeps all."""
    min_probability: float = 0.0
    """Leave out pairs with a smaller p(winner > loser); 0 keeps all (paper)."""
    dpo_beta: float
    """For p(winner > loser), Eq. 9; ranks nothing."""
    policy: str
    """Policy folder that sampled the candidates, or 'base'; its digest is kept with every pair."""
    seed: int
    """Run seed, for the strategy 'random'."""
    iteration: int
    """Number of this iteration, from 1."""
    judged: Path | None = None
    """Where all candidates' rewards go as this judge weights them (schema judged); None leaves it out."""
    output: Path
    """Where the pairs go (schema training_pairs)."""


def main(args: Args) -> None:
    """Choose two candidates of each prompt and put them side by side."""
    with stage("select_pairs") as run:
        policy = policy_name(args.policy)
        judge = judge_of(args.judges, policy) if args.judges else None
        rewards = by_prompt(read_tables(args.rewards, REWARDS).to_pylist())
        rewards = {name: weigh(rows, judge) for name, rows in rewards.items()}
        if args.judged is not None:
            write_judged(rewards, args)
        metric = by_prompt(read_tables(args.ranking, METRIC_SCORES).to_pylist()) if (
            args.ranking) else {}  # fmt: skip
        chosen = {name: choose(name, rows, metric.get(name, []) if args.ranking else None, judge, args)
                  for name, rows in rewards.items()}  # fmt: skip
        different = {name: pair for name, pair in chosen.items() if pair is not None}
        if not different:
            raise UserError(
                f"the two images of each of {len(chosen)} pairs have the same score: the judge has no "
                f"opinion. {args.policy} may be the model that score_candidates.reference compares it with: "
                "look whether its training moved it (iterNN/training.parquet), and train it longer or faster."
            )
        if len(different) < len(chosen):
            alike = len(chosen) - len(different)
            log.warning("select_pairs: %d pairs of equal scores are left out", alike)
        kept = {name: pair for name, pair in different.items() if is_clear(pair, args)}
        if not kept:
            surest = max(pair["probability"] for pair in different.values())
            raise UserError(
                f"none of {len(different)} pairs has a margin of at least "
                f"{args.min_margin_in_standard_errors} standard errors and p(winner > loser) of at least "
                f"{args.min_probability} (the surest has {surest:.3f}). Lower "
                "select_pairs.min_margin_in_standard_errors or min_probability, or raise "
                "score_candidates.num_draws."
            )
        log.info("select_pairs: %d of %d pairs kept", len(kept), len(chosen))
        with RowSpool(args.output.parent) as spool:
            found = spool_images(spool, kept, args)
            rows = (
                to_row(
                    spool.read(found[name, kept[name]["winner"]]),
                    spool.read(found[name, kept[name]["loser"]]),
                    kept[name], policy, args,
                )
                for name in sorted(kept)
            )  # fmt: skip
            run.rows_in = sum(map(len, rewards.values()))
            run.rows_out = write_rows(
                args.output, rows, TRAINING_PAIRS, stage="select_pairs", arguments=args,
                inputs=[*args.candidates, *args.rewards, *args.judges, *args.ranking,
                        *policy_files(args.policy)],
            )  # fmt: skip


def by_prompt(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of each prompt, in the order of their candidate numbers."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["prompt_id"]].append(row)
    return {name: sorted(group, key=lambda row: row["candidate"]) for name, group in groups.items()}


def weigh(rows: list[Row], judge: JudgeRecord | None) -> list[Row]:
    """The rewards of one prompt's candidates with the judge's weights; as they are without a judge."""
    if judge is None:
        return rows
    result = implicit_reward(
        policy_errors=np.array([row["policy_errors"] for row in rows]),
        reference_errors=np.array([row["reference_errors"] for row in rows]),
        weights=draw_weights(rows, judge),
    )
    return [
        row
        | {"reward": float(reward), "standard_error": float(error) if np.isfinite(error) else None}
        for row, reward, error in zip(rows, result.reward, result.standard_error, strict=True)
    ]


def draw_weights(rows: list[Row], judge: JudgeRecord | None) -> np.ndarray | None:
    """What each draw of one prompt counts; None if all count alike."""
    if judge is None:
        return None
    weights = BinWeights(np.array(judge.weights))
    return weights.of(np.array(rows[0]["timesteps"]), judge.num_timesteps)


def write_judged(rewards: Mapping[str, list[Row]], args: Args) -> None:
    """Every candidate's reward as the judge weights it."""
    names = JUDGED.arrow.names
    rows = [{name: row[name] for name in names} for group in rewards.values() for row in group]
    assert args.judged is not None
    write_table(
        args.judged, rows, JUDGED, stage="select_pairs", arguments=args,
        inputs=[*args.rewards, *args.judges],
    )  # fmt: skip


def choose(
    name: str,
    rewards: list[Row],
    metric: list[Row] | None,
    judge: JudgeRecord | None,
    args: Args,
) -> Row | None:
    """The two candidates of one prompt, with margin, standard error and probability.

    None where both have the same score: neither is better.
    """
    ranking = [r["reward"] for r in rewards] if metric is None else [r["score"] for r in metric]
    for what, count in (("rewards", len(rewards)), ("scores", len(ranking))):
        if count != args.candidates_per_prompt:
            raise UserError(
                f"prompt {name} has {count} {what}, expected candidates_per_prompt = "
                f"{args.candidates_per_prompt}. Run sample_candidates and score_candidates again "
                f"for iteration {args.iteration}."
            )
    scores = np.array(ranking, np.float64)
    if args.strategy == "best_worst":
        winner, loser = best_worst(scores)
    else:
        rng = np.random.default_rng(seed_of(args.seed, "select_pairs", args.iteration, name))
        winner, loser = random_pair(scores, rng)
    if scores[winner] == scores[loser]:
        return None
    margin = rewards[winner]["reward"] - rewards[loser]["reward"]
    error = margin_standard_error(
        policy_errors=np.array([row["policy_errors"] for row in rewards]),
        reference_errors=np.array([row["reference_errors"] for row in rewards]),
        best=winner,
        worst=loser,
        weights=draw_weights(rewards, judge),
    )
    beta = args.dpo_beta if judge is None or judge.log_odds is None else 2 * judge.log_odds
    return {
        "winner": rewards[winner]["candidate"],
        "loser": rewards[loser]["candidate"],
        "winner_score": ranking[winner],
        "loser_score": ranking[loser],
        "margin": margin,
        "margin_standard_error": error if np.isfinite(error) else None,
        "probability": preference_probability(margin, beta),
    }


def is_clear(pair: Row, args: Args) -> bool:
    """Whether the judge is sure enough, and the margin large enough beside its standard error.

    Not so where it has none.
    """
    if args.min_probability and pair["probability"] < args.min_probability:
        return False
    if args.min_margin_in_standard_errors == 0:
        return True
    margin, error = pair["margin"], pair["margin_standard_error"]
    if error is None:
        return False
    return bool(margin > 0 and margin >= args.min_margin_in_standard_errors * error)


def spool_images(
    spool: RowSpool, kept: Mapping[str, Row], args: Args
) -> dict[tuple[str, int], int]:
    """Keep the images of the pairs, shard after shard; where each (prompt_id, candidate) is.

    UserError unless every one is there, once.
    """
    columns = ["prompt_id", "prompt", "candidate", "seed", "image", "latents"]
    wanted = {(name, pair[side]) for name, pair in kept.items() for side in ("winner", "loser")}
    found: dict[tuple[str, int], int] = {}
    for path in progress(args.candidates, "reading", "shards"):
        keys = read_table(path, CANDIDATES, ["prompt_id", "candidate"]).to_pylist()
        names = [(key["prompt_id"], key["candidate"]) for key in keys]
        rows = [row for row, name in enumerate(names) if name in wanted]
        numbers = [
            number
            for batch in read_batches(path, CANDIDATES, columns, size=IMAGES_AT_ONCE, rows=rows)
            for number in spool.add(batch)
        ]
        for row, number in zip(rows, numbers, strict=True):
            if names[row] in found:
                raise UserError(
                    f"{path}, row {row}: candidate {names[row][1]} of prompt {names[row][0]} is there "
                    f"twice. Run sample_candidates again for iteration {args.iteration}."
                )
            found[names[row]] = number
    missing = sorted({name for name, _ in wanted - found.keys()})
    if missing:
        raise UserError(
            f"the candidates hold {len(kept) - len(missing)} of the {len(kept)} prompts that the "
            f"rewards have; {missing[0]} is missing. Run sample_candidates and score_candidates "
            f"again for iteration {args.iteration}."
        )
    return found


def to_row(winner: Row, loser: Row, pair: Row, policy: str, args: Args) -> Row:
    """A row of the pairs table, with where its images came from."""
    scores = {name: pair[name] for name in pair if name not in ("winner", "loser")}
    return {
        "pair_id": f"iter{args.iteration:02d}-{winner['prompt_id']}",
        "prompt_id": winner["prompt_id"],
        "prompt": winner["prompt"],
        "winner": winner["image"],
        "loser": loser["image"],
        "source": "generated",
        "iteration": args.iteration,
        "policy_digest": policy,
        "winner_candidate": winner["candidate"],
        "loser_candidate": loser["candidate"],
        "winner_seed": winner["seed"],
        "loser_seed": loser["seed"],
        "winner_latents": winner["latents"],
        "loser_latents": loser["latents"],
        "winner_geometry": native_geometry(winner["image"]["bytes"]),
        "loser_geometry": native_geometry(loser["image"]["bytes"]),
        **scores,
    }


def native_geometry(data: bytes) -> list[int]:
    """The geometry of an image that a model made: its own size, nothing cropped."""
    width, height = image_size(data)
    return [height, width, 0, 0, height, width]


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
