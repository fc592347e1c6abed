"""Which policy to use and why, and whether the judge still judges as it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stages.core.artifacts.provenance import BASE
from stages.core.evaluation.gates import Gate, last_good
from stages.core.evaluation.guard import AnyLimits, Guard, Measured
from stages.core.evaluation.guards import GUARDS, hardly_moved, seed_row
from stages.core.evaluation.verdicts import Evaluation
from stages.core.evaluation.wording import number, p_value, percent

CLEAR = 0.05
"""p below which the judge's change counts, beside its interval."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The policy to use."""

    policy: str
    reason: str


def advise(
    evaluation: Evaluation,
    prompt_set: str,
    metric: str,
    rows: Sequence[Measured],
    limits: AnyLimits,
    gates: Sequence[Gate] = (),
) -> Advice:
    """What the gates decided; without gates the best of the policies that no guard warns of.

    That is the last one, unless one before it is clearly higher. It must be clearly higher than base.
    """
    good = last_good(gates)
    if good:
        return Advice(policy=good, reason="The guards decided so after each iteration.")
    passed_over = {
        policy: f"the guards warn of {policy} ({', '.join(titles).lower()})"
        for policy, titles in warned(rows, limits).items()
    } | {policy: f"{policy} hardly moved from {BASE}" for policy in hardly_moved(rows, limits)}
    own = [policy for policy in evaluation.policies if policy != BASE]
    clean = [policy for policy in own if policy not in passed_over]
    why_not = "; ".join(passed_over[policy] for policy in own if policy in passed_over)
    if not own:
        return Advice(policy=BASE, reason="No other policy was evaluated.")
    if not clean:
        return Advice(policy=BASE, reason=f"No policy is without a warning: {why_not}.")
    chosen = clean[-1]
    for rival in clean[:-1]:
        if is_higher(evaluation, prompt_set, metric, rival, chosen):
            chosen = rival
    row = evaluation.against(prompt_set, metric, chosen, BASE)
    others = f" Passed over: {why_not}." if why_not else ""
    if row is None or row.direction != "higher":
        return Advice(policy=BASE, reason=f"{chosen} is not clearly higher than {BASE}.{others}")
    which = "It is the last policy" if chosen == own[-1] else "None of the others is clearly higher"
    return Advice(
        policy=chosen,
        reason=f"{which}, it is clearly higher than {BASE} on {metric}, and no guard warns of it.{others}",
    )


def is_higher(evaluation: Evaluation, prompt_set: str, metric: str, one: str, other: str) -> bool:
    """Whether one policy is clearly higher than another one, in whichever order they were compared."""
    row = evaluation.against(prompt_set, metric, one, other)
    back = evaluation.against(prompt_set, metric, other, one)
    return (row is not None and row.direction == "higher") or (
        row is None and back is not None and back.direction == "lower"
    )


def warned(
    rows: Sequence[Measured], limits: AnyLimits, guards: Sequence[Guard] = GUARDS
) -> Mapping[str, Sequence[str]]:
    """By policy, the titles of the guards that tell of collapse and are beyond their limit."""
    seed = seed_row(rows)
    found = {
        row["policy"]: [
            guard.title
            for guard in guards
            if guard.tells_of_collapse and guard.warning(row, seed, limits)
        ]
        for row in rows
    }
    return {policy: titles for policy, titles in found.items() if titles}


@dataclass(frozen=True, kw_only=True)
class JudgeTrend:
    """Whether the last policy judges as iteration 0's did."""

    direction: str
    """'higher', 'lower' or 'unclear', as in verdicts."""
    label: str
    sentence: str


def judge_trend(rows: Sequence[Measured]) -> JudgeTrend | None:
    """The last iteration's judge beside iteration 0's on the same held-out pairs; None for one judge."""
    row, seed = rows[-1], seed_row(rows)
    change = row["accuracy_change"]
    if change is None:
        return None
    low, high, p = (row[f"accuracy_change_{name}"] for name in ("low", "high", "p"))
    direction, label = "unclear", "No clear change of the judge"
    if high < 0 and p < CLEAR:
        direction, label = "lower", "The judge fades"
    elif low > 0 and p < CLEAR:
        direction, label = "higher", "The judge improves"
    points, ends = (
        [number(100 * value, 0, sign=True) for value in values]
        for values in ([change], [low, high])
    )
    return JudgeTrend(
        direction=direction,
        label=label,
        sentence=(
            f"{row['policy']} ranks {percent(row['reward_accuracy'])} of {row['num_holdout_pairs']} "
            f"held-out pairs as people do, {seed['policy']} {percent(seed['reward_accuracy'])}: "
            f"{points[0]} points on the same pairs (95 % interval {ends[0]} to {ends[1]}; exact "
            f"paired test p {'' if p < 0.001 else '= '}{p_value(p)})."
        ),
    )
