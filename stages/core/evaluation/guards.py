"""The quantities that turn when self-training goes wrong, and what to say then. SAIL Sec. 5.5."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan
from typing import Literal

from stages.core.errors import UserError
from stages.core.evaluation.wording import percent

Field = Literal[
    "reward_accuracy",
    "confident_share",
    "diversity",
    "feature_diversity",
    "rank_correlation",
    "best_beats_worst",
    "drift",
    "blank_share",
    "truncated_share",
]


@dataclass(frozen=True, kw_only=True)
class Guard:
    """One row of a guards table."""

    iteration: int
    policy: str
    reward_accuracy: float
    reward_accuracy_low: float
    reward_accuracy_high: float
    num_holdout_pairs: int
    diversity: float
    feature_diversity: float
    features: str
    drift: float
    blank_share: float
    truncated_share: float
    rank_correlation: float | None
    best_beats_worst: float | None
    confident_share: float | None


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Where a guard becomes a warning."""

    min_reward_accuracy: float = 0.5
    """The interval of the reward's accuracy reaches down to this; 0.5 is chance."""
    max_confident_share: float = 0.9
    """More than this share of an iteration's pairs has p(winner > loser) > 0.9."""
    min_diversity_share: float = 0.6
    """Diversity, of pixels or of features, falls below this share of iteration 0's."""
    max_blank_share: float = 0.01
    """More than this share of images is of nearly one colour."""
    max_truncated_share: float = 0.05
    """A text encoder cuts more than this share of the evaluation prompts."""
    max_drift: float | None = None
    """Predictions are further than this from the base's; None never warns."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How a guard is shown, and what it tells someone who has not read the paper."""

    field: Field
    title: str
    is_share: bool
    meaning: str


MEASURES = (
    Measure(
        field="reward_accuracy",
        title="Reward accuracy",
        is_share=True,
        meaning="How often the policy, as a judge, prefers the image that people preferred, in "
        "pairs no training saw. At 50 % it might as well toss a coin.",
    ),
    Measure(
        field="rank_correlation",
        title="Rank correlation",
        is_share=False,
        meaning="How far the judge orders the candidates of a prompt as the independent metric "
        "does: 1 is the same order, 0 is no relation, below 0 is the opposite.",
    ),
    Measure(
        field="best_beats_worst",
        title="Best beats worst",
        is_share=True,
        meaning="How often the image the judge called best is also better by the independent "
        "metric. At 50 % the pairs teach nothing.",
    ),
    Measure(
        field="diversity",
        title="Diversity",
        is_share=False,
        meaning="How much the images of one prompt differ from each other. A steep fall means "
        "that the model draws the same picture again and again.",
    ),
    Measure(
        field="feature_diversity",
        title="Diversity of features",
        is_share=False,
        meaning="The same as a viewer would see it: by the cosine of a CLIP's features, or by colour "
        "from some steps away. Noise and grain do not count.",
    ),
    Measure(
        field="confident_share",
        title="Confident share",
        is_share=True,
        meaning="How many pairs the judge is more than 90 % sure of. When it is sure of nearly "
        "all of them, its reward has inflated.",
    ),
    Measure(
        field="drift",
        title="Drift",
        is_share=False,
        meaning="How far the policy's predictions have moved from those of base. It grows with "
        "training; a jump is a reason to look at the images.",
    ),
    Measure(
        field="blank_share",
        title="Blank images",
        is_share=True,
        meaning="How many images are black or of nearly one colour, as a safety checker leaves "
        "them or a broken model draws them. Their scores mean nothing.",
    ),
    Measure(
        field="truncated_share",
        title="Truncated prompts",
        is_share=True,
        meaning="How many evaluation prompts are longer than the text encoder reads, so that "
        "their end has no influence. The same for every policy.",
    ),
)


def seed_guard(guards: Sequence[Guard]) -> Guard:
    """The guard of iteration 0, with which diversity is compared; UserError without it."""
    for guard in guards:
        if guard.iteration == 0:
            return guard
    raise UserError(
        f"the guards are those of iterations {', '.join(str(g.iteration) for g in guards)}; "
        "iteration 0 is needed, with which diversity is compared. Make the guards anew."
    )


def warning(guard: Guard, field: Field, seed: Guard, limits: Limits) -> str | None:
    """A sentence if the guard's field is beyond its limit; None otherwise, or without a limit."""
    if field == "reward_accuracy":
        return accuracy_warning(guard, limits.min_reward_accuracy)
    if field == "confident_share":
        return confidence_warning(guard, limits.max_confident_share)
    if field == "diversity":
        return diversity_warning(guard, seed, limits.min_diversity_share)
    if field == "feature_diversity":
        return feature_warning(guard, seed, limits.min_diversity_share)
    if field == "drift":
        return drift_warning(guard, limits.max_drift)
    if field == "blank_share":
        return blank_warning(guard, limits.max_blank_share)
    if field == "truncated_share":
        return truncated_warning(guard, limits.max_truncated_share)
    return None


def warnings(guards: Sequence[Guard], limits: Limits) -> list[str]:
    """Every guard's warnings, iteration by iteration; the same sentence once."""
    seed = seed_guard(guards)
    found = (warning(guard, item.field, seed, limits) for guard in guards for item in MEASURES)
    return list(dict.fromkeys(sentence for sentence in found if sentence))


def blindness_warning(guards: Sequence[Guard]) -> str | None:
    """A sentence if a diversity is not known (nan), so that no limit of it is ever passed."""
    blind = [g.policy for g in guards if isnan(g.diversity) or isnan(g.feature_diversity)]
    if not blind:
        return None
    return (
        f"The diversity of {' and '.join(dict.fromkeys(blind))} is not known, so lost diversity "
        "goes unseen: it needs two images a prompt. Set evaluation.images_per_prompt to 2 or more."
    )


def accuracy_warning(guard: Guard, limit: float) -> str | None:
    """Set when the judge is not clearly better than the limit: the interval reaches down to it."""
    if guard.reward_accuracy_low > limit:
        return None
    worse = guard.reward_accuracy_high < limit
    bound = "chance (50 %)" if limit == 0.5 else f"the limit of {percent(limit)}"
    return (
        f"As a judge, {guard.policy} is {'worse than' if worse else 'not clearly better than'} "
        f"{bound}: it ranks {percent(guard.reward_accuracy)} of {guard.num_holdout_pairs} held-out "
        f"pairs as people do (95 % interval {percent(guard.reward_accuracy_low)} to "
        f"{percent(guard.reward_accuracy_high)})."
    )


def confidence_warning(guard: Guard, limit: float) -> str | None:
    """Set when the judge is sure of more than the limit's share of its pairs."""
    if guard.confident_share is None or not guard.confident_share > limit:
        return None
    return (
        f"The reward looks inflated: {percent(guard.confident_share)} of the pairs of iteration "
        f"{guard.iteration} have p(winner > loser) above 0.9 (limit {percent(limit)})."
    )


def diversity_warning(guard: Guard, seed: Guard, limit: float) -> str | None:
    """Set when diversity has fallen below the limit's share of iteration 0's."""
    if not guard.diversity < limit * seed.diversity:
        return None
    return (
        f"{guard.policy} has lost diversity: its images of one prompt differ "
        f"{percent(guard.diversity / seed.diversity)} as much as those of {seed.policy} "
        f"(limit {percent(limit)})."
    )


def feature_warning(guard: Guard, seed: Guard, limit: float) -> str | None:
    """Set when the features' diversity has fallen below the limit's share of iteration 0's."""
    if not guard.feature_diversity < limit * seed.feature_diversity:
        return None
    return (
        f"{guard.policy} draws the same picture again and again: by features ({guard.features}) its "
        f"images of one prompt differ {percent(guard.feature_diversity / seed.feature_diversity)} "
        f"as much as those of {seed.policy} (limit {percent(limit)})."
    )


def drift_warning(guard: Guard, limit: float | None) -> str | None:
    """Set when the predictions are further from the base's than the limit, if there is one."""
    if limit is None or not guard.drift > limit:
        return None
    return f"{guard.policy} has drifted {guard.drift:.3g} from base (limit {limit:.3g})."


def blank_warning(guard: Guard, limit: float) -> str | None:
    """Set when more images than the limit's share are of nearly one colour."""
    if not guard.blank_share > limit:
        return None
    return (
        f"{guard.blank_share:.1%} of the images of {guard.policy} are black or of nearly one "
        f"colour (limit {limit:.1%}): look at them, and at whether a safety checker is on."
    )


def truncated_warning(guard: Guard, limit: float) -> str | None:
    """Set when a text encoder cuts more than the limit's share of the evaluation prompts."""
    if not guard.truncated_share > limit:
        return None
    return (
        f"{guard.truncated_share:.1%} of the evaluation prompts are longer than the text encoder "
        f"reads (limit {limit:.1%}): metrics see words that the model does not."
    )
