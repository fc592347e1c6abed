"""Guards of the policy as a judge: whether it is right, how sure it is, how far it has moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from stages.core.artifacts.schemas import column
from stages.core.evaluation.guard import Guard, Limit, Line, Measured
from stages.core.evaluation.guard_tables import Evidence, floats, prompts_of
from stages.core.evaluation.statistics import (
    clustered_share_interval,
    compare,
    rank_correlation,
)
from stages.core.evaluation.wording import number, percent

SIGNIFICANT = 0.05
"""p below which a change of accuracy counts."""
CONFIDENT = 0.9
"""p(winner > loser) above which a pair counts as confident (paper: Sec. 5.5)."""


def measure_accuracy(evidence: Evidence) -> Measured:
    """How often the reward ranks held-out pairs as people do, with its interval."""
    judged = evidence.held_out
    gain = floats(judged, "winner_reward") - floats(judged, "loser_reward")
    points = (gain > 0) + 0.5 * (gain == 0)
    low, high = clustered_share_interval(points, prompts_of(judged))
    return {
        "reward_accuracy": float(points.mean()),
        "reward_accuracy_low": low,
        "reward_accuracy_high": high,
        "num_holdout_pairs": len(points),
    }


def accuracy_sentence(row: Measured, seed: Measured, limit: float) -> str | None:
    """Set when the judge is not clearly better than the limit: the interval reaches down to it."""
    low, high = row["reward_accuracy_low"], row["reward_accuracy_high"]
    if low > limit:
        return None
    bound = "chance (50 %)" if limit == 0.5 else f"the limit of {percent(limit)}"
    return (
        f"As a judge, {row['policy']} is {'worse than' if high < limit else 'not clearly better than'} "
        f"{bound}: it ranks {percent(row['reward_accuracy'])} of {row['num_holdout_pairs']} held-out "
        f"pairs as people do (95 % interval {percent(low)} to {percent(high)})."
    )


def accuracy_note(row: Measured) -> str:
    """The interval, and of how many pairs."""
    low, high = (number(100 * row[f"reward_accuracy_{end}"], 0) for end in ("low", "high"))
    return f"{low} to {high} %, n = {row['num_holdout_pairs']}"


REWARD_ACCURACY = Guard(
    columns=(
        column("reward_accuracy", pa.float64(), "share of held-out pairs it ranks as people"),
        column(
            "reward_accuracy_low",
            pa.float64(),
            "95 % interval, pairs clustered by prompt, lower end",
        ),
        column(
            "reward_accuracy_high",
            pa.float64(),
            "95 % interval, pairs clustered by prompt, upper end",
        ),
        column("num_holdout_pairs", pa.int32(), "held-out human pairs"),
    ),
    title="Reward accuracy",
    meaning="How often the policy, as a judge, prefers the image that people preferred, in pairs that no "
    "training of this run saw or was stopped by. At 50 % it might as well toss a coin.",
    measure=measure_accuracy,
    limit=Limit(
        key="min_reward_accuracy",
        default=0.5,
        meaning="The interval of the reward's accuracy reaches down to this; 0.5 is chance.",
    ),
    sentence=accuracy_sentence,
    advice="Look at the labels, give more pairs, or use the policy before.",
    limit_line=lambda limit, seed: Line(limit, "chance" if limit == 0.5 else "limit"),
    is_share=True,
    interval=("reward_accuracy_low", "reward_accuracy_high"),
    note=accuracy_note,
)


def points_of(judged: pa.Table) -> dict[str, float]:
    """By pair: 1 if the reward ranks it as people do, one half in a tie."""
    gain = floats(judged, "winner_reward") - floats(judged, "loser_reward")
    points = (gain > 0) + 0.5 * (gain == 0)
    return dict(zip(judged.column("pair_id").to_pylist(), map(float, points), strict=True))


def measure_change(evidence: Evidence) -> Measured:
    """The accuracy less iteration 0's, on the pairs that both judged; nothing in iteration 0 itself."""
    if evidence.iteration == 0 or 0 not in evidence.tables.holdout:
        return {}
    judged = evidence.held_out
    now, then = points_of(judged), points_of(Evidence(evidence.tables, 0).held_out)
    names = judged.column("pair_id").to_pylist()
    both = [place for place, name in enumerate(names) if name in then]
    if len(both) < 2:
        return {}
    found = compare(
        np.array([now[names[place]] for place in both]),
        np.array([then[names[place]] for place in both]),
        clusters=prompts_of(judged)[both],
    )
    return {
        "accuracy_change": found.difference,
        "accuracy_change_low": found.ci_low,
        "accuracy_change_high": found.ci_high,
        "accuracy_change_p": found.sign_p,
    }


def change_sentence(row: Measured, seed: Measured, limit: float) -> str | None:
    """Set when the judge is clearly worse than iteration 0's: the whole interval is below the limit."""
    change, p = row["accuracy_change"], row["accuracy_change_p"]
    if change is None or not (row["accuracy_change_high"] < -limit and p < SIGNIFICANT):
        return None
    return (
        f"The judge fades: {row['policy']} ranks {percent(row['reward_accuracy'])} of the held-out pairs as "
        f"people do, where {seed['policy']} ranked {percent(seed['reward_accuracy'])} (on the same pairs "
        f"{100 * change:+.1f} points, {100 * row['accuracy_change_low']:+.1f} to "
        f"{100 * row['accuracy_change_high']:+.1f}, p = {p:.2g})."
    )


ACCURACY_CHANGE = Guard(
    columns=(
        column(
            "accuracy_change",
            pa.float64(),
            "reward accuracy less iteration 0's, on the same held-out pairs",
            nullable=True,
        ),
        column(
            "accuracy_change_low",
            pa.float64(),
            "95 % interval of it, pairs clustered by prompt, lower end",
            nullable=True,
        ),
        column(
            "accuracy_change_high",
            pa.float64(),
            "95 % interval of it, pairs clustered by prompt, upper end",
            nullable=True,
        ),
        column(
            "accuracy_change_p",
            pa.float64(),
            "exact sign test of it (McNemar's where every prompt has one pair), two-sided",
            nullable=True,
        ),
    ),
    title="Change of accuracy",
    meaning="How much better or worse it judges than the policy of iteration 0, on the same held-out pairs. "
    "Below 0 the judge fades.",
    measure=measure_change,
    limit=Limit(
        key="max_accuracy_loss",
        default=0.0,
        meaning="Accuracy is below iteration 0's by more than this, with its whole interval.",
    ),
    sentence=change_sentence,
    advice="Use the policy before, more human pairs in the mix, or fewer iterations.",
    limit_line=lambda limit, seed: Line(-limit, "iteration 0" if limit == 0 else "limit"),
    interval=("accuracy_change_low", "accuracy_change_high"),
    note=lambda row: (
        f"{100 * row['accuracy_change_low']:+.0f} to {100 * row['accuracy_change_high']:+.0f} points"
        if row["accuracy_change"] is not None
        else ""
    ),
)


def measure_rank_correlation(evidence: Evidence) -> Measured:
    """How far the judge's order of each prompt's candidates is the metric's."""
    if not evidence.has_candidate_scores:
        return {}
    names = sorted(evidence.rewards)
    rewards, scores = (
        np.stack([values[name] for name in names])
        for values in (evidence.rewards, evidence.candidate_scores)
    )
    if rewards.shape[1] < 2:
        return {}
    return {"rank_correlation": rank_correlation(rewards, scores)}


RANK_CORRELATION = Guard(
    columns=(
        column(
            "rank_correlation",
            pa.float64(),
            "Spearman's, of reward and candidate metric within a prompt's candidates, mean "
            "over prompts; of the judge that made this iteration's pairs",
            nullable=True,
        ),
    ),
    title="Rank correlation",
    meaning="How far the judge orders the candidates of a prompt as the independent metric "
    "does: 1 is the same order, 0 is no relation, below 0 is the opposite.",
    measure=measure_rank_correlation,
    fixed_line=Line(0.0, "no relation"),
)


def measure_best(evidence: Evidence) -> Measured:
    """How often the metric prefers a pair's winner too; of a list's pairs the first is the best and the worst."""
    if not evidence.has_candidate_scores:
        return {}
    scores = evidence.candidate_scores
    first: dict[str, Mapping[str, Any]] = {}
    for pair in evidence.pairs:
        first.setdefault(pair["prompt_id"], pair)
    gaps = [
        scores[p["prompt_id"]][p["winner_candidate"]] - scores[p["prompt_id"]][p["loser_candidate"]]
        for p in first.values()
        if p["winner_candidate"] is not None
    ]
    if not gaps:  # people's images against the policy's own
        return {}
    found = np.array(gaps)
    return {"best_beats_worst": float(np.mean((found > 0) + 0.5 * (found == 0)))}


BEST_BEATS_WORST = Guard(
    columns=(
        column(
            "best_beats_worst",
            pa.float64(),
            "share of this iteration's pairs whose winner has the higher candidate metric; a tie is half",
            nullable=True,
        ),
    ),
    title="Best beats worst",
    meaning="How often the image the judge called best is also better by the independent "
    "metric. At 50 % the pairs teach nothing.",
    measure=measure_best,
    fixed_line=Line(0.5, "chance"),
    is_share=True,
)


def measure_confidence(evidence: Evidence) -> Measured:
    """How many of the new pairs the judge is confident of."""
    known = [pair["probability"] for pair in evidence.pairs if pair["probability"] is not None]
    if not known:
        return {}
    sure = [probability > CONFIDENT for probability in known]
    return {"confident_share": float(np.mean(sure))}


def confidence_sentence(row: Measured, seed: Measured, limit: float) -> str | None:
    """Set when the judge is sure of more than the limit's share of its pairs."""
    if row["confident_share"] is None or not row["confident_share"] > limit:
        return None
    return (
        f"The reward looks inflated: {percent(row['confident_share'])} of the pairs of iteration "
        f"{row['iteration']} have p(winner > loser) above {CONFIDENT} (limit {percent(limit)})."
    )


CONFIDENT_SHARE = Guard(
    columns=(
        column(
            "confident_share",
            pa.float64(),
            "share of this iteration's pairs with p(winner > loser) > 0.9",
            nullable=True,
        ),
    ),
    title="Confident share",
    meaning="How many pairs the judge is more than 90 % sure of. When it is sure of nearly "
    "all of them, its reward has inflated.",
    measure=measure_confidence,
    limit=Limit(
        key="max_confident_share",
        default=None,
        meaning="More than this share of an iteration's pairs has p(winner > loser) > 0.9; None never warns.",
    ),
    sentence=confidence_sentence,
    advice="Where the reliability curve shows it as right as it is sure, go on; else use the policy before.",
    is_share=True,
)


def drift_sentence(row: Measured, seed: Measured, limit: float) -> str | None:
    """Set when the predictions are further from the base's than the limit."""
    if not row["drift"] > limit:
        return None
    return f"{row['policy']} has drifted {row['drift']:.3g} from base (limit {limit:.3g})."


DRIFT = Guard(
    columns=(
        column("drift", pa.float64(), "mean squared change of the prediction from the base's"),
    ),
    title="Drift",
    meaning="How far the policy's predictions have moved from those of base. It grows with "
    "training; a jump is a reason to look at the images.",
    measure=lambda evidence: {"drift": float(floats(evidence.held_out, "drift").mean())},
    limit=Limit(
        key="max_drift",
        default=None,
        meaning="Predictions are further than this from the base's; None never warns.",
    ),
    sentence=drift_sentence,
    advice="Look at its images before you use it.",
)
