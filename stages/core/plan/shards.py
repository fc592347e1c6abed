"""How long a run's jobs take, and into how many its work would be cut for jobs of a given length."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.core.plan.costs import Counts, Rates
from stages.core.plan.run import RunPlan

LITTLE = 0.1
"""Share of a device's time that starts may take before fewer devices are better."""


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Jobs that share one piece of work; each starts, and loads the model."""

    key: str
    """The config's key of their number."""
    number: int
    seconds: float
    """Of a device, for all of them together, without their starts."""

    @property
    def minutes(self) -> float:
        """Of one job, without its start."""
        return self.seconds / self.number / 60

    def share_of_starts(self, start: float) -> float:
        """Of a device's time, if a start takes so many seconds."""
        return start / (start + self.seconds / self.number)

    def fitting(self, minutes: float, *, devices: int, start: float) -> int:
        """The number that makes jobs of at most so many minutes, equally many on each device.

        Where one job would do, all devices share its work if starts take little of their time.
        """
        number = max(1, math.ceil(self.seconds / (60 * minutes)))
        if number == 1 and start * devices > LITTLE * (start * devices + self.seconds):
            return 1
        return devices * math.ceil(number / devices)


def shards_of(config: Mapping[str, Any], counts: Counts, rates: Rates) -> list[Shards]:
    """Of an iteration's candidates (sampling or scoring, what takes longer), of a policy's images, of human pairs."""
    candidates = counts.candidates_of_an_iteration
    scoring = counts.reward_draws * rates.score_draw
    images = counts.evaluation_images / max(1, counts.policies + 1)
    sets = max(1, len(RunPlan(config=config).prompt_sets))
    pairs = max(0, counts.human_pairs - config["preferences"]["num_holdout"])
    found = [
        Shards(
            key="sample_candidates.shards",
            number=config["sample_candidates"]["shards"],
            seconds=candidates * max(rates.sample_candidate, scoring),
        ),
        Shards(
            key="evaluation.shards",
            number=config["evaluation"]["shards"],
            seconds=images / sets * rates.sample_image,
        ),
        Shards(
            key="preferences.shards",
            number=counts.encoding_shards,
            seconds=2 * pairs * rates.encode_image,
        ),
    ]
    return [each for each in found if each.seconds]
