"""What an evaluation says, in words: which policy is higher, by how much, how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from stages.core.artifacts.provenance import BASE
from stages.core.evaluation.statistics import Comparison
from stages.core.evaluation.wording import number, percent

Direction = Literal["higher", "lower", "small", "unclear"]

LABELS: Mapping[Direction, str] = {
    "higher": "higher",
    "lower": "lower",
    "small": "hardly different",
    "unclear": "no clear difference",
}


SMALL = 0.1
"""Of what the better of two images gains: a difference that is surely below it hardly matters."""


@dataclass(frozen=True, kw_only=True)
class SummaryRow(Comparison):
    """One row of an evaluation summary: a policy against a baseline, on one metric."""

    prompt_set: str
    metric: str
    policy: str
    baseline: str
    sign_p_holm: float
    wilcoxon_p_holm: float
    better_of_two: float | None
    """What keeping the better of two images of a prompt gains over one of the baseline's."""

    @property
    def size(self) -> float | None:
        """The difference, of what the better of two images gains; None where that is not known."""
        return self.difference / self.better_of_two if self.better_of_two else None

    @property
    def direction(self) -> Direction:
        """Where the whole 95 % interval lies: 'small' around 0, or 'unclear' when it holds 0."""
        farthest = max(abs(self.ci_low), abs(self.ci_high))
        if self.better_of_two and farthest < SMALL * self.better_of_two:
            return "small"
        if self.ci_low > 0:
            return "higher"
        return "lower" if self.ci_high < 0 else "unclear"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A direction and the sentence that says it."""

    direction: Direction
    sentence: str


class Evaluation:
    """An evaluation summary, by prompt set, metric, policy and baseline."""

    def __init__(self, rows: Iterable[Mapping[str, Any]], order: Sequence[str]) -> None:
        found = [SummaryRow(**row) for row in rows]
        self._rows = {(r.prompt_set, r.metric, r.policy, r.baseline): r for r in found}
        self.prompt_sets = list(dict.fromkeys(row.prompt_set for row in found))
        self.policies = sorted(
            {row.policy for row in found},
            key=lambda name: (name != BASE, _position(name, order), name),
        )
        """Base first, then as in `order`, then the rest by name."""
        baselines = dict.fromkeys(row.baseline for row in found)
        self.others = [name for name in baselines if name not in self.policies]
        """Policies of other runs that this run's are compared with."""

    def metrics(self, prompt_set: str) -> list[str]:
        """Metrics that were measured on a prompt set, in the order of the table."""
        return list(dict.fromkeys(metric for name, metric, *_ in self._rows if name == prompt_set))

    def against(
        self, prompt_set: str, metric: str, policy: str, baseline: str
    ) -> SummaryRow | None:
        """A policy against another one; None if they are the same or were not compared."""
        if policy == baseline:
            return None
        return self._rows.get((prompt_set, metric, policy, baseline))

    def mean(self, prompt_set: str, metric: str, policy: str) -> float | None:
        """Mean score of a policy; None if it has none."""
        for row in self._rows.values():
            if (row.prompt_set, row.metric) == (prompt_set, metric):
                if row.policy == policy:
                    return row.mean
                if row.baseline == policy:
                    return row.baseline_mean
        return None

    def previous(self, policy: str) -> str:
        """The policy before it; base for base."""
        return self.policies[max(0, self.policies.index(policy) - 1)]

    def decimals(self, prompt_set: str, metric: str) -> int:
        """Decimals that show a typical interval of the metric with two digits, between 0 and 6."""
        widths = sorted(
            row.ci_high - row.ci_low
            for row in self._rows.values()
            if (row.prompt_set, row.metric) == (prompt_set, metric) and row.ci_high > row.ci_low
        )
        if not widths:
            return 3
        return min(6, max(0, 1 - math.floor(math.log10(widths[len(widths) // 2]))))


def interval(row: SummaryRow, decimals: int) -> str:
    """'+0.41 (95 % interval +0.33 to +0.49)'."""
    low, high = (number(end, decimals, sign=True) for end in (row.ci_low, row.ci_high))
    return f"{number(row.difference, decimals, sign=True)} (95 % interval {low} to {high})"


def verdict(row: SummaryRow, decimals: int) -> Verdict:
    """One comparison as a sentence that claims no more than its interval allows.

    It tells size beside sign, in images: what one would gain by drawing twice and keeping the better.
    """
    wins = f"wins {percent(row.win_rate)} of {row.num_prompts} prompts"
    if row.direction == "small":
        sentence = (
            f"{row.policy} hardly differs from {row.baseline} on {row.metric}: "
            f"{interval(row, decimals)}, {size_in_words(row)}; it {wins}."
        )
    elif row.direction == "unclear":
        sentence = (
            f"No clear difference between {row.policy} and {row.baseline} on {row.metric}: "
            f"{interval(row, decimals)}; {row.policy} {wins}."
        )
    else:
        sentence = (
            f"{row.policy} is {row.direction} than {row.baseline} on {row.metric}: "
            f"{interval(row, decimals)}{', ' if row.size else ''}{size_in_words(row)}; it {wins}."
        )
    return Verdict(direction=row.direction, sentence=sentence)


def size_in_words(row: SummaryRow) -> str:
    """'1.4 times what keeping the better of two images gives'; empty where that is not known."""
    if row.size is None:
        return ""
    size = abs(row.size)
    amount = f"{size:.1f} times" if size >= 1 else f"{percent(size)} of"
    return f"{amount} what keeping the better of two images gives"


def steps_sentence(steps: Sequence[SummaryRow]) -> str:
    """How many updates rose, fell, or are undecided; empty for a single one."""
    if len(steps) < 2:
        return ""
    counts = {name: sum(step.direction == name for step in steps) for name in LABELS}
    return (
        f"Of {len(steps)} updates in a row, {counts['higher']} rose over the policy before, "
        f"{counts['lower']} fell, {counts['small']} hardly changed it, {counts['unclear']} made no "
        "clear difference."
    )


def sides_sentence(rows: Sequence[SummaryRow]) -> str:
    """The same two policies on several metrics: what is higher, what is lower; empty for none."""
    if not rows:
        return ""
    parts = []
    for direction, label in LABELS.items():
        names = [row.metric for row in rows if row.direction == direction]
        if names:
            parts.append(f"{label} on {', '.join(names)}")
    return f"On the other metrics, {rows[0].policy} against {BASE}: {'; '.join(parts)}."


def best_sentence(evaluation: Evaluation, prompt_set: str, metric: str) -> str:
    """Which policy has the highest mean, if that is not the last one; otherwise empty."""
    means = {
        policy: mean
        for policy in evaluation.policies
        if (mean := evaluation.mean(prompt_set, metric, policy)) is not None
    }
    best = max(means, key=means.__getitem__)
    if best == evaluation.policies[-1]:
        return ""
    value = number(means[best], evaluation.decimals(prompt_set, metric))
    return f"The highest mean is that of {best}, {value}."


def _position(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)
