"""Scored candidates in; preference pairs out, one a prompt. Paper: SAIL Sec. 4.1 (best against worst).

Example: paste the line from logs/<run>/iter01/select_pairs.log
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from stages.core.artifacts.judges import JudgeRecord, judge_of
from stages.core.artifacts.pair_rows import pair_row, spool_candidates, spool_human
from stages.core.artifacts.provenance import policy_files, policy_name
from stages.core.artifacts.schemas import JUDGED, METRIC_SCORES, REWARDS, TRAINING_PAIRS
from stages.core.artifacts.spools import RowSpool
from stages.core.artifacts.tables import read_tables, write_rows, write_table
from stages.core.errors import UserError
from stages.core.execution.runtime import log, progress, run_stage, stage
from stages.core.method.allocation import completed, density_of, importance_weights
from stages.core.method.calibration import BinWeights
from stages.core.method.rewards import (
    implicit_reward,
    margin_standard_error,
    preference_probability,
)
from stages.core.method.seeding import seed_of
from stages.core.method.selection import (
    Strategy,
    best_worst,
    folded,
    random_pair,
    win_probabilities,
)

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Args:
    """Scored candidates in, preference pairs out, one a prompt."""

    candidates: tuple[Path, ...]
    """All shards of the candidates (schema candidates)."""
    rewards: tuple[Path, ...]
    """Their implicit rewards (schema rewards)."""
    judges: tuple[Path, ...] = ()
    """What each timestep counts, of this policy and perhaps of others; without, all count alike."""
    ranking: tuple[Path, ...] = ()
    """Scores of a metric that ranks instead of the implicit reward (schema metric_scores)."""
    allocation: Literal["uniform", "importance"] = "uniform"
    """How score_candidates drew timesteps: 'importance' by what each counts."""
    strategy: Strategy
    """'best_worst' (paper), 'random' (Table 5), which is ordered by score all the same, 'listwise': all candidates, in
    pairs of best and worst, second and second to last ...; or 'spin': a person's image against the first candidate."""
    human: Path | None = None
    """Only with spin: human pairs (schema preferences), whose winners win."""
    human_latents: Path | None = None
    """Only with spin: their latents (schema pair_latents)."""
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
        rewards = {name: weigh(rows, judge, args) for name, rows in rewards.items()}
        if args.judged is not None:
            write_judged(rewards, args)
        metric = by_prompt(read_tables(args.ranking, METRIC_SCORES).to_pylist()) if (
            args.ranking) else {}  # fmt: skip
        chosen = [
            pair | {"name": name, "number": number}
            for name, rows in rewards.items()
            for number, pair in enumerate(
                choose(name, rows, metric.get(name, []) if args.ranking else None, judge, args)
            )
        ]
        kept = refuse_none(chosen, args)
        log.info("select_pairs: %d of %d pairs kept", len(kept), len(chosen))
        wanted = {(pair["name"], pair[side]) for pair in kept for side in ("winner", "loser")
                  if pair[side] is not None}  # fmt: skip
        with RowSpool(args.output.parent) as spool, RowSpool(args.output.parent) as others:
            shards = progress(args.candidates, "reading", "shards")
            found = spool_candidates(spool, wanted, shards, args.iteration)
            people = human_images(others, kept, args)
            rows = (
                pair_row(
                    name_of(pair, args),
                    others.read(people[pair["name"]])
                    if people
                    else spool.read(found[pair["name"], pair["winner"]]),
                    spool.read(found[pair["name"], pair["loser"]]),
                    pair,
                    iteration=args.iteration,
                    policy=policy,
                )
                for pair in sorted(kept, key=lambda pair: (pair["name"], pair["number"]))
            )
            run.rows_in = sum(map(len, rewards.values()))
            run.rows_out = write_rows(
                args.output, rows, TRAINING_PAIRS, stage="select_pairs", arguments=args,
                inputs=[*args.candidates, *args.rewards, *args.judges, *args.ranking,
                        *filter(None, (args.human, args.human_latents)), *policy_files(args.policy)],
            )  # fmt: skip


def refuse_none(chosen: Sequence[Row], args: Args) -> list[Row]:
    """The pairs that are kept; UserError for none, which says why."""
    different = [pair for pair in chosen if not pair["is_tie"]]
    if not different:
        raise UserError(
            f"the two images of each of {len(chosen)} pairs have the same score: the judge has no "
            f"opinion. {args.policy} may be the model that score_candidates.reference compares it with: "
            "look whether its training moved it (iterNN/training.parquet), and train it longer or faster."
        )
    if len(different) < len(chosen):
        alike = len(chosen) - len(different)
        log.warning("select_pairs: %d pairs of equal scores are left out", alike)
    kept = [pair for pair in different if is_clear(pair, args)]
    if not kept:
        surest = max(pair["probability"] for pair in different)
        raise UserError(
            f"none of {len(different)} pairs has a margin of at least "
            f"{args.min_margin_in_standard_errors} standard errors and p(winner > loser) of at least "
            f"{args.min_probability} (the surest has {surest:.3f}). Lower "
            "select_pairs.min_margin_in_standard_errors or min_probability, or raise "
            "score_candidates.num_draws."
        )
    return kept


def by_prompt(rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of each prompt, in the order of their candidate numbers."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["prompt_id"]].append(row)
    return {name: sorted(group, key=lambda row: row["candidate"]) for name, group in groups.items()}


def weigh(rows: list[Row], judge: JudgeRecord | None, args: Args) -> list[Row]:
    """The rewards of one prompt's candidates with the judge's weights; as they are without a judge."""
    if judge is None:
        return rows
    best_known = fully_drawn(rows)
    errors = errors_of(best_known, judge, args)
    result = implicit_reward(**errors)
    rewards, standard_errors = list(result.reward), list(result.standard_error)
    if len(best_known) < len(rows):
        parts, num_seen = parts_of(rows, judge, args)
        rewards = list(completed(parts, num_seen))
        standard_errors = [
            row[:seen].std(ddof=1) / np.sqrt(seen)
            for row, seen in zip(parts, num_seen, strict=True)
        ]
    return [
        row
        | {"reward": float(reward), "standard_error": float(error) if np.isfinite(error) else None}
        for row, reward, error in zip(rows, rewards, standard_errors, strict=True)
    ]


def fully_drawn(rows: list[Row]) -> list[Row]:
    """The candidates that got all draws: the others are known to be neither best nor worst."""
    longest = max(len(row["policy_errors"]) for row in rows)
    return [row for row in rows if len(row["policy_errors"]) == longest]


def errors_of(rows: list[Row], judge: JudgeRecord | None, args: Args) -> dict[str, Any]:
    """Errors of candidates with equally many draws, and what each draw counts; weights None: all count alike.

    Draws by importance count in inverse proportion to how often they are made: they are multiplied, not averaged, by
    it, for a mean without bias.
    """
    policy, reference = (
        np.array([row[name] for row in rows]) for name in ("policy_errors", "reference_errors")
    )
    weights = None
    if judge is not None:
        timesteps = np.array(rows[0]["timesteps"])
        weights = BinWeights(np.array(judge.weights)).of(timesteps, judge.num_timesteps)
        if args.allocation == "importance":
            density = density_of(np.array(judge.weights), np.array(judge.spreads))
            shares = weights * importance_weights(timesteps, judge.num_timesteps, density)
            policy, reference, weights = policy * shares, reference * shares, None
    return {"policy_errors": policy, "reference_errors": reference, "weights": weights}


def parts_of(rows: list[Row], judge: JudgeRecord, args: Args) -> tuple[np.ndarray, np.ndarray]:
    """(what each draw adds to each candidate's reward, how many draws it has); nan beyond those."""
    num_draws = len(fully_drawn(rows)[0]["timesteps"])
    timesteps = fully_drawn(rows)[0]["timesteps"]
    unit = {"policy_errors": [0.0] * num_draws, "reference_errors": [1.0] * num_draws}
    one = errors_of([unit | {"timesteps": timesteps}], judge, args)
    counts = one["reference_errors"][0]
    if one["weights"] is not None:
        counts = one["weights"] * num_draws / one["weights"].sum()
    num_seen = np.array([len(row["policy_errors"]) for row in rows])
    parts = np.full((len(rows), num_draws), np.nan)
    for place, row in enumerate(rows):
        gains = np.subtract(row["reference_errors"], row["policy_errors"])
        parts[place, : num_seen[place]] = gains * counts[: num_seen[place]]
    return parts, num_seen


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
) -> list[Row]:
    """The pairs of one prompt, with margin, standard error and probability; `is_tie` where neither is better."""
    ranking = [r["reward"] for r in rewards] if metric is None else [r["score"] for r in metric]
    for what, count in (("rewards", len(rewards)), ("scores", len(ranking))):
        if count != args.candidates_per_prompt:
            raise UserError(
                f"prompt {name} has {count} {what}, expected candidates_per_prompt = "
                f"{args.candidates_per_prompt}. Run sample_candidates and score_candidates again "
                f"for iteration {args.iteration}."
            )
    if args.strategy == "spin":
        return [own_sample(rewards[0]["candidate"], ranking[0])]
    if metric is None:
        rewards = fully_drawn(rewards)
        ranking = [row["reward"] for row in rewards]
    scores = np.array(ranking, np.float64)
    if args.strategy == "best_worst":
        places = [best_worst(scores)]
    elif args.strategy == "listwise":
        places = folded(scores)
    else:
        rng = np.random.default_rng(seed_of(args.seed, "select_pairs", args.iteration, name))
        places = [random_pair(scores, rng)]
    beta = args.dpo_beta if judge is None or judge.log_odds is None else 2 * judge.log_odds
    shown = ranking
    if args.strategy == "listwise":
        shown = win_probabilities(scores, beta / 2 if metric is None else math.inf).tolist()
    return [
        as_pair(rewards, shown, place, beta, errors_of(rewards, judge, args))
        | {"is_tie": scores[place[0]] == scores[place[1]]}
        for place in places
    ]


def as_pair(
    rewards: list[Row],
    scores: Sequence[float],
    places: tuple[int, int],
    dpo_beta: float,
    errors: dict[str, Any],
) -> Row:
    """The two candidates at (winner's, loser's) places, and how sure the judge is of them."""
    winner, loser = places
    margin = rewards[winner]["reward"] - rewards[loser]["reward"]
    error = margin_standard_error(best=winner, worst=loser, **errors)
    return {
        "winner": rewards[winner]["candidate"],
        "loser": rewards[loser]["candidate"],
        "winner_score": scores[winner],
        "loser_score": scores[loser],
        "margin": margin,
        "margin_standard_error": error if np.isfinite(error) else None,
        "probability": preference_probability(margin, dpo_beta),
    }


def own_sample(candidate: int, score: float) -> Row:
    """A person's image against the policy's own: nobody has judged the first."""
    unknown = dict.fromkeys(("winner_score", "margin", "margin_standard_error", "probability"))
    return {
        "winner": None,
        "loser": candidate,
        "loser_score": score,
        "is_tie": False,
        **unknown,
    }


def is_clear(pair: Row, args: Args) -> bool:
    """Whether the judge is sure enough, and the margin large enough beside its standard error.

    Not so where it has none.
    """
    if args.strategy == "spin":  # nobody has judged the person's image
        return True
    if args.min_probability and pair["probability"] < args.min_probability:
        return False
    if args.min_margin_in_standard_errors == 0:
        return True
    margin, error = pair["margin"], pair["margin_standard_error"]
    if error is None:
        return False
    return bool(margin > 0 and margin >= args.min_margin_in_standard_errors * error)


def name_of(pair: Row, args: Args) -> str:
    """The name of a pair, which says iteration, prompt and, in a list, the place."""
    place = f"-{pair['number']}" if args.strategy == "listwise" else ""
    return f"iter{args.iteration:02d}-{pair['name']}{place}"


def human_images(spool: RowSpool, kept: Sequence[Row], args: Args) -> dict[str, int]:
    """With spin, where a person's image of each prompt is; of several pairs one is drawn."""
    if args.strategy != "spin":
        return {}
    if args.human is None or args.human_latents is None:
        raise UserError("--strategy spin pairs people's images: give --human and --human-latents")

    def choose_one(name: str, rows: Sequence[int]) -> int:
        rng = np.random.default_rng(seed_of(args.seed, "select_pairs", args.iteration, name))
        return int(rng.choice(rows))

    names = [pair["name"] for pair in kept]
    return spool_human(spool, names, args.human, args.human_latents, choose_one)


if __name__ == "__main__":
    run_stage(main, tyro.cli(Args, description=__doc__))
